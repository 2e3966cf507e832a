"""The pages keep their word: code runs, every option and metric is explained, figures are those of the record."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.settings import removed
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.trainer import PPOTrainer

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")


def code_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S)


def test_every_option_is_explained():
    """In docs/ppo.md, and with evidence or meaning in its own help."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = [field for field in dataclasses.fields(PPOConfig) if field.name not in inherited]
    assert len(own) > 40
    assert [field.name for field in own if f"`{field.name}" not in PAGE] == []
    assert all(field.metadata.get("help") for field in own)


def test_every_metric_is_explained(make_trainer):
    trainer = make_trainer(max_steps=1, kl_in="loss", kl_estimator="k2")
    trainer.train()
    logged = next(row for row in trainer.state.log_history if "objective/kl" in row)
    for name in logged:
        short = name.split("/")[-1]
        assert f"`{name}`" in PAGE or f"`{short}`" in PAGE or name in ("step", "epoch"), name


def test_the_migrated_script_runs(tmp_path, monkeypatch, tiny_llama, tiny_reward, word_tokenizer, capsys):
    """The script of docs/migrate-from-trl.md, on tiny models, resuming included."""
    monkeypatch.chdir(tmp_path)
    before, after = code_blocks("migrate-from-trl.md")
    assert "trl.experimental.ppo" in before
    names = {
        "tokenizer": word_tokenizer,
        "policy": tiny_llama(0),
        "ref_policy": tiny_llama(0),
        "reward_model": tiny_reward(1),
        "value_model": tiny_reward(1),
        "tokenized_dataset": Dataset.from_dict({"input_ids": [word_tokenizer("the film was")["input_ids"]] * 16}),
    }
    exec(after, names)
    assert names["trainer"].state.global_step == 2
    assert (tmp_path / "out" / "checkpoint-2" / "ppo_state.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "my_policy")
    assert "completion" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(removed.CONFIG))
def test_arguments_that_are_gone_name_their_replacement(name, tmp_path):
    """Each is really gone, what is named in its place is really there, and the message says so."""
    fields = {field.name for field in dataclasses.fields(PPOConfig)}
    assert name not in fields
    for word in re.findall(r"(?:use|in|and) ([a-z]+_[a-z_]+)", removed.CONFIG[name]):
        assert word in fields, word
    with pytest.raises(UserError, match=f"(?s)migrate-from-trl.*{name}: "):
        PPOConfig(str(tmp_path), **{name: 1})


def test_all_of_trl_s_arguments_are_there_or_explained(tmp_path):
    """The fields of TRL 1.12's PPOConfig and OnPolicyConfig, as its source has them."""
    theirs = [
        "run_name",
        "dataset_num_proc",
        "num_mini_batches",
        "total_episodes",
        "local_rollout_forward_batch_size",
        "num_sample_generations",
        "response_length",
        "stop_token",
        "stop_token_id",
        "temperature",
        "missing_eos_penalty",
        "sft_model_path",
        "world_size",
        "num_total_batches",
        "micro_batch_size",
        "local_batch_size",
        "batch_size",
        "local_mini_batch_size",
        "mini_batch_size",
        "push_to_hub",
        "exp_name",
        "reward_model_path",
        "model_adapter_name",
        "ref_adapter_name",
        "num_ppo_epochs",
        "whiten_rewards",
        "kl_coef",
        "kl_estimator",
        "cliprange",
        "vf_coef",
        "cliprange_value",
        "gamma",
        "lam",
        "ds3_gather_for_generation",
    ]
    fields = {field.name for field in dataclasses.fields(PPOConfig)}
    assert [name for name in theirs if name not in fields and name not in removed.CONFIG] == []
    with pytest.raises(TypeError, match=r"no argument 'kl_coeff'\. Did you mean kl_coef"):
        PPOConfig(str(tmp_path), kl_coeff=1)
    assert copy.deepcopy(PPOConfig(str(tmp_path))).kl_coef == PPOConfig(str(tmp_path)).kl_coef


def test_the_trainer_s_own_removed_arguments(tiny_llama, word_tokenizer):
    with pytest.raises(UserError, match=r"(?s)data_collator: padding is.*tokenizer: use processing_class"):
        PPOTrainer(model=tiny_llama(0), data_collator=None, tokenizer=word_tokenizer)
    # As TRL 0.12 called them: the policy is then in none of our arguments.
    with pytest.raises(UserError, match=r"(?s)policy: use model.*ref_policy: use ref_model"):
        PPOTrainer(policy=tiny_llama(0), ref_policy=tiny_llama(0), processing_class=word_tokenizer)
    with pytest.raises(UserError, match="needs the policy to train: model="):
        PPOTrainer(processing_class=word_tokenizer)
    with pytest.raises(TypeError, match="no argument 'reward_fun'"):
        PPOTrainer(model=tiny_llama(0), reward_fun=None)


def test_completions_of_the_evaluation_prompts(make_trainer, capsys):
    trainer = make_trainer(max_steps=1, eval_strategy="no")
    prompts = trainer.prompts
    trainer.eval_prompts = prompts
    rows = trainer.generate_completions()
    assert [row["prompt"] for row in rows] == list(prompts.prompts)
    assert all(isinstance(row["score"], float) and isinstance(row["completion"], str) for row in rows)
    assert rows[:3] == trainer.generate_completions(sampling=True, limit=3)
    trainer.eval_prompts = None
    with pytest.raises(UserError, match="the prompts of eval_dataset, and there is none"):
        trainer.generate_completions()


def test_the_example_runs(tmp_path, monkeypatch, tiny_llama, word_tokenizer):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "quickstart" / "sft" / "model"
    tiny_llama(0).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    names: dict = {}
    exec(code_blocks("ppo.md")[0], names)
    assert names["trainer"].state.global_step == 3


def test_verification_holds_the_recorded_figures():
    """docs/verification.md is what `benchmarks/convergence.py` makes of its record, to the letter."""
    from benchmarks.convergence import RESULTS, report
    from ppo_vs_dpo.artifacts.files import read_jsonl

    rows = read_jsonl(RESULTS) if RESULTS.exists() else []
    assert (ROOT / "docs" / "verification.md").read_text(encoding="utf-8") == report(rows)


@pytest.mark.parametrize("page", ["ppo.md", "migrate-from-trl.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target
