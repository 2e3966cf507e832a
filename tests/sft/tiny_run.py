"""A run folder in which each stage trains in a second: the word tokenizer of conftest, a Llama of 16 units."""

import random
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.files import write_json, write_parquet
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.artifacts.stage import StageContext

ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
# One step of eight; checkpoints often enough to be interrupted between two of them.
COMMON = {
    "per_device_train_batch_size": 8,
    "learning_rate": 3.0e-3,
    "max_steps": 6,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "report_to": "none",
    "max_length": 64,
}
GOOD, BAD = ["good", "bright"], ["bad", "dull"]


def chat(text: str, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def make_rows(n: int, conversational: bool, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of reviews in which the chosen side has the kinder word; answers of uneven length."""
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        prompt = rng.choice(["the film was", "the plot was", "a story", "the cast was not a"])
        ending = ["and"] * rng.randrange(4)
        chosen = " " + " ".join([*ending, rng.choice(GOOD)])
        rejected = " " + " ".join([*["very"] * rng.randrange(3), rng.choice(BAD)])
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if conversational:
            row = {
                "prompt": chat(prompt, "user"),
                "chosen": chat(chosen.strip(), "assistant"),
                "rejected": chat(rejected.strip(), "assistant"),
            }
        rows.append({**row, "pair_id": f"pair{number}", "chosen_score": 1.0, "rejected_score": -1.0})
    return rows


def make_run(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel | None = None,
    conversational: bool = False,
    pairs: int = 32,
    model: dict[str, Any] | None = None,
    **sections: dict[str, Any],
) -> RunFolder:
    """Write a run folder in which ``data``, ``pairs`` and, with a ``policy``, ``sft`` are done.

    Args:
        sections: ``sft``, ``reward_model``, ``dpo``: keys on top of `COMMON`.
    """
    own = {"sft": {}, "reward_model": {"samples": 8, "sample_max_new_tokens": 8}, "dpo": {"beta": 0.5}}
    config = {name: {**COMMON, **keys, **sections.get(name, {})} for name, keys in own.items()}
    OmegaConf.save(
        OmegaConf.create({"seed": 1, "model": model or {"path": None, "architecture": ARCHITECTURE}, **config}),
        _folder(folder) / "config.yaml",
    )
    rows = make_rows(pairs, conversational)
    tokenizer.save_pretrained(folder / "data" / "tokenizer")
    sft_rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    write_parquet(folder / "data" / "sft_train.parquet", sft_rows)
    write_parquet(folder / "data" / "prompts_train.parquet", [{"prompt": row["prompt"]} for row in rows])
    write_parquet(folder / "pairs" / "train.parquet", rows)
    write_parquet(folder / "pairs" / "test.parquet", make_rows(20, conversational, seed=1))
    done = {"figures": {"pair_set": {"hash": "abc", "n_train": pairs, "n_test": 20}}}
    write_json(folder / "data" / "done.json", {"figures": {}})
    write_json(folder / "pairs" / "done.json", done)
    if policy is not None:
        policy.save_pretrained(folder / "sft" / "model")
        tokenizer.save_pretrained(folder / "sft" / "model")
        write_json(folder / "sft" / "done.json", {"figures": {}})
    return RunFolder(folder)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def context_of(run: RunFolder, stage: str, point: dict[str, Any] | None = None) -> StageContext:
    """The context of a stage, its folder made, as ``stage_main`` does."""
    context = StageContext(run, stage, point)
    context.dir.mkdir(parents=True, exist_ok=True)
    return context


def weights(folder: Path) -> bytes:
    """The bytes of a saved model."""
    return (folder / "model.safetensors").read_bytes()
