"""The pages keep their word: code runs, every option and metric is explained, figures are those of the record."""

import dataclasses
import re
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import TrainingArguments

from ppo_vs_dpo.ppo.config import PPOConfig

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


def test_the_migrated_script_runs(tmp_path, monkeypatch, tiny_llama, tiny_reward, word_tokenizer):
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
