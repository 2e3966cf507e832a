"""The stage: from a run folder to a trained policy in it, resumed by itself."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import ppo_vs_dpo.ppo.stage.train as ppo_train
from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import write_parquet
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.callbacks import RunCallback
from ppo_vs_dpo.ppo.stage.config import PPOStage
from ppo_vs_dpo.ppo.stage.train import reward_functions, run_stage, split_prompts
from ppo_vs_dpo.reward_model.scorer import store_bias
from tests.ppo.conftest import PROMPTS

ROOT = Path(__file__).parents[3]


def shortness(prompts, completions, **columns):
    """A gold reward for the tests."""
    return [-float(len(completion.split())) for completion in completions]


@pytest.fixture
def run_folder(tmp_path, tiny_llama, tiny_reward, word_tokenizer):
    """A run whose sft and reward_model stages are done; keywords change its ppo section."""
    root = tmp_path / "run"

    def make(**settings):
        section = {
            "max_steps": 4,
            "rollout_batch_size": 8,
            "per_device_train_batch_size": 8,
            "response_length": 6,
            "learning_rate": 1e-3,
            "validation_prompts": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "kl_coef": 0.2,
            "use_cpu": True,
            "report_to": "none",
            "num_ppo_epochs": 1,
            **settings,
        }
        config = {"seed": 3, "model": {}, "data": {"gold": "tests.ppo.stage.test_train:shortness"}, "ppo": section}
        root.mkdir(exist_ok=True)
        (root / "config.yaml").write_text(yaml.safe_dump(config))
        write_parquet(root / "data" / "prompts_train.parquet", Dataset.from_dict({"prompt": PROMPTS}))
        for stage, model in (("sft", tiny_llama(0)), ("reward_model", tiny_reward(1))):
            model.save_pretrained(root / stage / "model")
            word_tokenizer.save_pretrained(root / stage / "model")
            (root / stage / "done.json").write_text(json.dumps({"stage": stage, "figures": {}}))
        return RunFolder(root)

    return make


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def test_training_that_ends_before_its_last_update_is_no_result(run_folder, monkeypatch):
    class Stops(RunCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            control.should_training_stop = state.global_step == 2

    run = run_folder()
    with monkeypatch.context() as patch:
        patch.setattr(ppo_train, "RunCallback", Stops)
        with pytest.raises(UserError, match="ppo: training ended at step 2 of 4"):
            run_stage(StageContext(run, "ppo"))
    assert run.done("ppo") is None


def test_the_stage_leaves_a_plain_model_and_its_figures(run_folder):
    run = run_folder()
    run_stage(StageContext(run, "ppo"))
    done = run.done("ppo")["figures"]
    assert done["updates"] == 4
    assert done["episodes"] == 32
    assert {"eval_reward", "eval_kl", "eval_objective"} <= done["evaluation"].keys()
    model = AutoModelForCausalLM.from_pretrained(run.path("ppo", "model"))
    start = AutoModelForCausalLM.from_pretrained(run.path("sft", "model"))
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert AutoTokenizer.from_pretrained(run.path("ppo", "model")).eos_token == "</s>"
    assert [row["step"] for row in metrics(run.path("ppo")) if "objective/kl" in row] == [1, 2, 3, 4]


def test_a_point_of_a_sweep_has_a_folder_of_its_own(run_folder):
    run = run_folder(max_steps=1)
    run_stage(StageContext(run, "ppo", {"kl_coef": 0.0}))
    assert run.done("ppo,kl_coef=0.0")["figures"]["kl_coef"] == 0.0
    assert run.path("sweep", "ppo,kl_coef=0.0", "model", "config.json").exists()
    assert run.done("ppo") is None


def test_interrupted_stage_goes_on_to_the_same_end(run_folder):
    """Stopped after the second checkpoint, started again: the model and the metrics of an uninterrupted run."""
    from transformers.trainer_callback import TrainerCallback

    import ppo_vs_dpo.ppo.stage.train as stage

    run = run_folder()
    run_stage(StageContext(run, "ppo"))
    expected = run.path("ppo", "model", "model.safetensors").read_bytes(), metrics(run.path("ppo"))
    run.clear("ppo")

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    class Interrupted(stage.PPOTrainer):
        def __init__(self, *args, callbacks=None, **kwargs):
            super().__init__(*args, callbacks=[*callbacks, Interrupt()], **kwargs)

    original, stage.PPOTrainer = stage.PPOTrainer, Interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            run_stage(StageContext(run, "ppo"))
    finally:
        stage.PPOTrainer = original
    assert run.done("ppo") is None
    run_stage(StageContext(run, "ppo"))
    assert run.path("ppo", "model", "model.safetensors").read_bytes() == expected[0]
    assert metrics(run.path("ppo")) == expected[1]


def test_adapters_are_merged(run_folder):
    run = run_folder(lora={"r": 2, "alpha": 4, "target_modules": ["q_proj"]}, max_steps=1)
    run_stage(StageContext(run, "ppo"))
    merged = AutoModelForCausalLM.from_pretrained(run.path("ppo", "model"))
    start = dict(AutoModelForCausalLM.from_pretrained(run.path("sft", "model")).named_parameters())
    changed = {name for name, tensor in merged.named_parameters() if not torch.equal(tensor, start[name])}
    assert changed
    assert all("q_proj" in name for name in changed)
    assert run.path("ppo", "adapter", "adapter_config.json").exists()


def test_gold_reward_in_place_of_the_reward_model(run_folder):
    run = run_folder(gold_reward=True, max_steps=1)
    context = StageContext(run, "ppo")
    (gold,) = reward_functions(context, PPOStage(gold_reward=True))
    assert gold(["a"], ["good film"]) == [-2.0]
    run.clear("reward_model")
    run_stage(context)
    assert metrics(run.path("ppo"))[0]["objective/scores"] <= 0


OWN = "def words(prompts, completions, **columns):\n    return [100.0 + len(one.split()) for one in completions]\n"


def test_a_function_of_one_s_own_alone_or_beside_the_reward_model(run_folder, tmp_path):
    """ppo.reward: the file's function is what is optimised; in a list its share is what reward_weights says."""
    (tmp_path / "own.py").write_text(OWN)
    name = f"{tmp_path}/own.py:words"
    scores = {}
    for reward, weights in (("reward_model", None), (name, None), (["reward_model", name], [1.0, 0.5])):
        run = run_folder(reward=reward, reward_weights=weights, max_steps=1, missing_eos_penalty=None)
        if reward == name:
            run.clear("reward_model")
        run_stage(StageContext(run, "ppo"))
        scores[str(reward)] = metrics(run.path("ppo"))[0]["objective/scores"]
        run.clear("ppo")
    model, own, mixed = scores.values()
    assert 100 <= own <= 106
    assert mixed == pytest.approx(model + own / 2, abs=1e-4)


def test_what_the_diagnosis_found_is_said_at_the_stage_s_end(run_folder, tmp_path):
    """A reward that gives the same to every response: in the log with its reason, and in ``done.json``."""
    (tmp_path / "same.py").write_text("def same(prompts, completions, **columns):\n    return [0.5] * len(prompts)\n")
    settings = {"reward": f"{tmp_path}/same.py:same", "missing_eos_penalty": None, "eval_strategy": "no"}
    for changed, flat in ((settings, True), ({}, False)):
        run = run_folder(**changed)
        run_stage(StageContext(run, "ppo"))
        warnings = run.done("ppo")["figures"]["warnings"]
        assert all(one.endswith(": log.txt says why, and what to try.") for one in warnings)
        assert ("reward without spread" in ", ".join(warnings)) is flat
        run.clear("ppo")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reward": "rewrd_model"}, "must be reward_model, judge, my_file.py:function, or a list"),
        ({"reward": []}, "must be reward_model, judge, my_file.py:function, or a list"),
        ({"reward": ["a.py:f", "a.py:f"]}, "a part stands there twice"),
        ({"reward": "a.py:f", "gold_reward": True}, "give one; the gold reward stands in place of all others"),
    ],
)
def test_a_reward_that_cannot_be_meant(settings, words):
    (problem,) = PPOStage(**settings).problems()
    assert words in problem
    with pytest.raises(UserError, match=r"ppo\.reward=nowhere\.py:f: .*does not exist"):
        reward_functions(None, PPOStage(reward="nowhere.py:f"))


def test_what_the_value_model_starts_from(run_folder, monkeypatch):
    """value_from: the reward model less its score bias, or the policy with a head of zeros."""
    from ppo_vs_dpo.ppo.stage import train

    made = {}

    class Spy(train.PPOTrainer):
        def train(self, *args, **kwargs):
            made[self.args.score_bias] = self
            return super().train(*args, **kwargs)

    monkeypatch.setattr(train, "PPOTrainer", Spy)
    for value_from, key in (("reward_model", 0.25), ("policy", 0.5)):
        run = run_folder(value_from=value_from, score_bias=key, max_steps=1, learning_rate=0.0, eval_strategy="no")
        store_bias(run.path("reward_model", "model"), 2.0)
        run_stage(StageContext(run, "ppo"))
        run.clear("ppo")
    copied, fresh = made[0.25].value_model, made[0.5].value_model
    assert copied.score.bias.item() == pytest.approx(-2.25)
    assert not fresh.score.weight.any()
    policy = made[0.5].policy.model.embed_tokens.weight
    assert torch.equal(fresh.model.embed_tokens.weight, policy)


def test_a_value_model_of_its_own(run_folder, tiny_reward, word_tokenizer, tmp_path, monkeypatch):
    """value_path: the critic starts from that checkpoint, not from the reward model; other vocabularies stop it."""
    from ppo_vs_dpo.ppo.stage import train

    made = {}

    class Spy(train.PPOTrainer):
        def train(self, *args, **kwargs):
            made["values"] = {name: p.detach().clone() for name, p in self.value_model.named_parameters()}
            return super().train(*args, **kwargs)

    monkeypatch.setattr(train, "PPOTrainer", Spy)
    own = tiny_reward(9)
    own.save_pretrained(tmp_path / "values")
    word_tokenizer.save_pretrained(tmp_path / "values")
    settings = {"value_path": str(tmp_path / "values"), "max_steps": 1, "eval_strategy": "no"}
    run_stage(StageContext(run_folder(**settings), "ppo"))
    for name, tensor in own.named_parameters():
        assert torch.equal(made["values"][name], tensor), name
    with pytest.raises(UserError, match="no values there"):
        run_stage(StageContext(run_folder(**settings, advantage="rloo", samples_per_prompt=2), "ppo"))
    other = copy.deepcopy(word_tokenizer)
    other.add_tokens(["another"])
    other.save_pretrained(tmp_path / "values")
    with pytest.raises(UserError, match="another vocabulary"):
        run_stage(StageContext(run_folder(**settings), "ppo"))


@pytest.mark.parametrize(
    ("settings", "best"),
    [
        ({"eval_steps": 3}, True),  # evaluations at updates 3 and, because it is the last, 4
        ({"eval_strategy": "no"}, False),
        ({"validation_prompts": 0}, False),
        ({"load_best_model_at_end": False}, False),
    ],
)
def test_the_best_checkpoint_is_kept_where_it_is_known(run_folder, settings, best):
    run = run_folder(**settings)
    run_stage(StageContext(run, "ppo"))
    figures = run.done("ppo")["figures"]
    rows = [row for row in metrics(run.path("ppo")) if "eval_objective" in row]
    if not best:
        assert figures["best_step"] is None
        return
    assert [row["step"] for row in rows] == [3, 4]
    step = max(rows, key=lambda row: row["eval_objective"])["step"]
    assert figures["best_step"] == step
    saved = AutoModelForCausalLM.from_pretrained(run.path("ppo", "checkpoints", f"checkpoint-{step}")).state_dict()
    final = AutoModelForCausalLM.from_pretrained(run.path("ppo", "model")).state_dict()
    assert all(torch.equal(saved[name], final[name]) for name in saved)


def test_validation_prompts_are_no_training_prompts():
    prompts = Dataset.from_dict({"prompt": PROMPTS * 3})
    train, validation = split_prompts(prompts, 3, seed=0)
    assert len(set(validation["prompt"])) == len(validation) == 3
    assert not set(validation["prompt"]) & set(train["prompt"])
    assert len(train) == 3 * (len(PROMPTS) - 3)
    assert split_prompts(prompts, 0, 0) == (prompts, None)
    with pytest.raises(UserError, match="8 different training prompts"):
        split_prompts(prompts, 8, 0)


def test_messages_for_bad_settings(run_folder):
    for settings, message in [
        ({"kl_coeff": 0.1}, r"ppo.kl_coeff: no such key. Did you mean kl_coef\?"),
        ({"value_from": "nowhere"}, "value_from is 'nowhere'"),
        ({"response_length": 64}, "no room is left for a prompt"),
    ]:
        with pytest.raises(UserError, match=message):
            run_stage(StageContext(run_folder(**settings), "ppo"))
    run = run_folder()
    run.clear("sft")
    with pytest.raises(UserError, match="stage sft"):
        run_stage(StageContext(run, "ppo"))


def test_the_command(run_folder, forked):
    """``python -m ppo_vs_dpo.ppo RUN`` as a process: exit code 2 and one sentence for a bad setting, no traceback."""
    run = run_folder(temperature=0.0)
    done = subprocess.run(
        [sys.executable, "-m", "ppo_vs_dpo.ppo", str(run.root)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "ppo.temperature is 0.0" in done.stderr
    assert "Traceback" not in done.stderr
