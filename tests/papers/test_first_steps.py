"""Every full configuration takes its first steps end to end: a tiny model, tiny data in the real shapes."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.papers.settings import CONFIGS, MINIATURE, unknown
from ppo_vs_dpo.pipeline.composing.compose import load
from ppo_vs_dpo.pipeline.running.command import run_pipeline
from ppo_vs_dpo.preferences.reading.mappings import MappingOptions, detect, map_row, mapping_named
from tests.papers import shapes
from tests.pipeline.chat_model import save_chat_model

FULL = sorted(path for path in CONFIGS.rglob("*.yaml") if path.stem != MINIATURE)
# One of each kind runs where all cannot: a whole pipeline, DPO alone, pairs that are made.
DATA_KEYS = ("path", "sft_path", "prompts_path")


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def data_of(path: Path):
    return OmegaConf.load(path).get("data") or {}


def sources(path: Path) -> dict[str, str]:
    """Data key -> Hub name, for what a configuration names and leaves not open."""
    data = data_of(path)
    return {key: data[key] for key in DATA_KEYS if key in data and not OmegaConf.is_missing(data, key)}


@pytest.mark.parametrize("path", FULL, ids=name_of)
def test_the_named_data_are_mapped(path):
    """The format that a configuration names fits the shape of the set that it names."""
    data = data_of(path)
    for key, hub in sources(path).items():
        row = shapes.SHAPES[hub](3)
        if key != "path":
            continue
        named = data.get("format", "auto")
        mapping = mapping_named(detect(row) if named == "auto" else named)
        pair = map_row(row, mapping, MappingOptions(dimension=data.get("dimension", "helpful")))
        texts = [
            pair[side] if isinstance(pair[side], str) else pair[side][-1]["content"] for side in ("chosen", "rejected")
        ]
        assert texts[0].strip().startswith("An animal")
        assert texts[1].strip().startswith("A car")


def rows_file(folder: Path, hub: str | None, count: int = 60) -> Path:
    """A file of rows as that set has them; prompts where the configuration names none."""
    path = folder / f"{(hub or 'prompts').replace('/', '--')}.jsonl"
    make = shapes.SHAPES[hub] if hub else shapes.prompt
    path.write_text("".join(json.dumps(make(number)) + "\n" for number in range(count)), encoding="utf-8")
    return path


def speakers() -> list[str]:
    """Helper, critic and judge of a constitution as a program: a random model says nothing that could be paired."""
    roles = ("helper", "critic", "judge")
    return [
        word
        for role in roles
        for word in (f"data.{role}.kind=python", f"data.{role}.function=tests.papers.shapes:speaker")
    ]


def small(path: Path, folder: Path) -> list[str]:
    """The overrides that make a configuration tiny; what is not tiny stays as it is."""
    data = data_of(path)
    words = [
        f"paper={name_of(path)}",
        f"output_dir={folder / 'runs'}",
        f"model.path={save_chat_model(folder / 'model')}",
        "model.dtype=float32",
        "deepspeed=none",
        "launch.processes=1",
        "launch.nodes=1",
    ]
    words += [f"data.{key}={rows_file(folder, hub)}" for key, hub in sources(path).items()]
    if OmegaConf.is_missing(data, "path"):
        words.append(f"data.path={rows_file(folder, 'HuggingFaceH4/ultrafeedback_binarized')}")
    if OmegaConf.is_missing(data, "prompts_path"):
        words.append(f"data.prompts_path={rows_file(folder, None)}")
    model = OmegaConf.load(path).get("model") or OmegaConf.create({})
    if "chat_template" in model or OmegaConf.is_missing(model, "chat_template"):
        words.append("model.chat_template=null")
    # The tiny model is a chat model; where the configuration leaves the form of the data open, messages are meant.
    if "conversational" not in data:
        words.append("data.conversational=true")
    if "test_split" in data:
        words.append("data.test_split=null")
    composed = load([words[0], "model.path=x"], check_missing=False)
    made = composed.data.source != "pairs"
    if made:
        # A random model of 260 tokens ends within 200 of them about every second time.
        words += ["data.train_prompts=8", "data.test_prompts=4", "data.heldout_prompts=4", "data.max_new_tokens=200"]
        words += ["data.temperature=1.0", "data.generation_batch_size=16", "data.gold=tests.papers.shapes:gold"]
        words += (
            ["data.sft_examples=16"]
            if composed.data.source == "rejection"
            else ["data.batch=8", "data.rounds=1", *speakers()]
        )
        words += ["data.samples=4"] if composed.data.source == "rejection" else ["data.constitution=default"]
        if OmegaConf.is_missing(data, "reward_model"):
            words.append("data.reward_model=null")
    elif "gold" in data or OmegaConf.is_missing(data, "gold"):
        words.append("data.gold=tests.papers.shapes:gold")
    common = [
        "max_steps=1",
        "bf16=false",
        "per_device_train_batch_size=2",
        "gradient_accumulation_steps=1",
        "max_length=400",
    ]
    common += ["save_steps=1", "warmup_steps=0"]
    for stage in ("sft", "reward_model", "dpo"):
        words += [f"{stage}.{one}" for one in common]
        words += [f"{stage}.{key.split('.')[1]}=1e-5" for key in unknown(path) if key == f"{stage}.learning_rate"]
    words += ["reward_model.num_train_epochs=1", "sft.num_train_epochs=1"]
    words += ["reward_model.samples=4", "reward_model.sample_max_new_tokens=4", "dpo.sweep=null", "ppo.sweep=null"]
    if "dpo.beta" in unknown(path):
        words.append("dpo.beta=0.1")
    words += ["ppo.total_episodes=null", "ppo.max_steps=1", "ppo.bf16=false", "ppo.rollout_batch_size=8"]
    words += ["ppo.per_device_train_batch_size=4", "ppo.response_length=8", "ppo.max_prompt_length=400"]
    words += [
        "ppo.validation_prompts=2",
        "ppo.learning_rate=1e-5",
        "ppo.local_rollout_forward_batch_size=8",
        "ppo.save_steps=1",
    ]
    words += ["ppo.eval_steps=1", "ppo.warmup_steps=0"]
    words += ["compare.n_prompts=4", "compare.max_new_tokens=8", "compare.pool_size=4", "compare.best_of_n=[2]"]
    words += ["compare.baseline_draws=1", "compare.resamples=100", "compare.batch_size=16"]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("path", FULL, ids=name_of)
def test_first_steps(path, tmp_path):
    config = load(small(path, tmp_path))
    run_pipeline(config)
    run = RunFolder(Path(config.output_dir) / config.name)
    assert all(run.done(stage) is not None for stage in config.stages)
