"""The comparison on two real ranks, with whole models and with ZeRO-3's shards: the report of one process."""

import functools
import math
import re
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_vs_dpo.artifacts.files import read_json, read_parquet
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.models.sharding.deepspeed import held_bytes
from tests.compare.helpers import check_schema, make_run, set_config
from tests.compare.test_stage import compare, figures
from tests.ranks import launch_forked, settings_of


def close(one, other, where: str = "") -> None:
    """The same figures to 1e-5, everything else the same."""
    if isinstance(one, float) and isinstance(other, float):
        assert math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-5), (where, one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            close(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            close(*pair, f"{where}/{number}")
    else:
        assert one == other, (where, one, other)


def compared(folder: Path, tokenizer, budget: int = 12) -> Path:
    """A run that one process has compared: an odd number of prompts, a policy that is an adapter, best-of-n of PPO."""
    root = make_run(folder / "run", tokenizer)
    base = AutoModelForCausalLM.from_pretrained(root / "sft" / "model")
    get_peft_model(base, LoraConfig(r=2, init_lora_weights=False)).save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    added = f"policies: {{mine: {{path: {root}/adapter}}}}"
    set_config(root, f"n_prompts: 47, {added}, best_of: {{ppo: [2]}}, other_temperatures: [0.5]")
    config = (root / "config.yaml").read_text()
    (root / "config.yaml").write_text(config.replace("max_new_tokens: 12", f"max_new_tokens: {budget}"))
    compare(root)
    return root


@pytest.fixture(scope="module")
def alone(tmp_path_factory, word_tokenizer):
    """One such run for all tests."""
    return compared(tmp_path_factory.mktemp("alone"), word_tokenizer)


def on_ranks(alone: Path, root: Path, deepspeed: str | None, ranks: int = 2) -> str:
    """The same run, compared anew on several ranks; what they printed."""
    shutil.copytree(alone, root)
    shutil.rmtree(root / "compare")
    shutil.rmtree(root / "cache")
    if deepspeed:
        config = OmegaConf.load(root / "config.yaml")
        config.deepspeed = settings_of(deepspeed)
        OmegaConf.save(config, root / "config.yaml")
    return launch_forked(RunFolder(root), "compare", ranks)


def same_report(*roots: Path) -> None:
    """The same completions token for token, the same figures to 1e-5, the same account of the work."""
    reports = [check_schema(read_json(root / "compare" / "report.json")) for root in roots]
    close(*map(figures, reports))
    assert "mine" in reports[1]["policies"]
    drawn = [sorted((root / "cache" / "completions").glob("*.parquet")) for root in roots]
    assert len(drawn[0]) == 6
    for mine, theirs in zip(*drawn, strict=True):
        assert mine.name == theirs.name
        for column in ("completion", "token_ids", "finished"):
            assert read_parquet(mine)[column][:] == read_parquet(theirs)[column][:]
    for name, entry in reports[0]["cost"]["generation"].items():
        assert entry["tokens"] == reports[1]["cost"]["generation"][name]["tokens"]
        assert entry["flops"] == reports[1]["cost"]["generation"][name]["flops"]


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("deepspeed", "ranks"), [("zero3", 2), slow(None, 2), slow("zero2", 2), slow("zero3_offload", 2), slow("zero3", 1)]
)
def test_ranks_give_the_report_of_one_process(alone, tmp_path, deepspeed, ranks):
    said = on_ranks(alone, tmp_path / "run", deepspeed, ranks)
    same_report(alone, tmp_path / "run")
    lines = [line for line in said.splitlines() if " holds reference " in line]
    assert len(lines) == (ranks if deepspeed and "zero3" in deepspeed else 0)
    folders = {"reference": AutoModelForCausalLM, "reward_model": AutoModelForSequenceClassification}
    for line in lines:
        held = dict(re.findall(r"(reference|reward_model) ([\d,]+) bytes", line))
        for name, cls in folders.items():
            model = cls.from_pretrained(alone / name.replace("reference", "sft") / "model")
            share, parameters = int(held[name].replace(",", "")), len(list(model.parameters()))
            # A parameter of odd size is rounded up on each rank.
            assert held_bytes(model) / ranks <= share <= held_bytes(model) / ranks + 4 * parameters


@pytest.mark.slow
def test_an_enumerable_space_on_two_ranks(tmp_path, word_tokenizer):
    alone = compared(tmp_path / "alone", word_tokenizer, budget=2)
    assert read_json(alone / "compare" / "report.json")["optimum"]["kind"] == "exact"
    on_ranks(alone, tmp_path / "run", "zero3")
    same_report(alone, tmp_path / "run")
