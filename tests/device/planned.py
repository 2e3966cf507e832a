"""What `plan` says of memory beside what the pretended device counts: stages of twelve kinds, a model of each.

``python -m tests.device.planned [NAME ...]`` prints both. Sizes are small, and weights, activations, logits and caches
all weigh: what a formula leaves out shows. All sequences have the whole length, as a plan assumes.
"""

import argparse
import contextlib
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl.trainer import utils as trl_utils

from ppo_vs_dpo.pipeline.planning import memory
from ppo_vs_dpo.pipeline.planning.estimate import Job, estimate
from ppo_vs_dpo.pipeline.planning.memory import GPUS, Shape, Sharding
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.rollouts.clock import Clock
from ppo_vs_dpo.ppo.trainer import PPOTrainer
from tests.device.jobs import COMMON, LORA, TOKENIZER, llama, on_one_base
from tests.device.pretended import ALLOCATED, Probe, trainers_on_device
from tests.device.work import ON_HOST, half_precision_kernel

# A row: tokens of its prompt and of its response, and rows of a pass.
PROMPT, RESPONSE, ROWS = 24, 24, 8
SIZES = {"vocabulary": 512, "hidden_size": 64, "intermediate_size": 128}
# TRL's head works on so many entries of the vocabulary at once; here it must fit the sizes.
memory.TILE = 256
WORDS = ["the", "film", "was", "very", "good", "and", "plot", "of", "a", "story", "not", "bad", "but", "bright"]


@dataclass(frozen=True)
class Case:
    """One stage in one way.

    Attributes:
        stage: as in `Job`.
        checkpointing: activations are made again.
        lora: adapters train.
        one_base: PPO's roles are adapters on one base.
        accumulate: passes of one step.
        reference: DPO has a reference of its own in memory.
    """

    stage: str
    checkpointing: bool = False
    lora: bool = False
    one_base: bool = False
    accumulate: int = 1
    layers: int = 4


CASES = {
    "sft": Case("sft"),
    "sft, checkpointing": Case("sft", checkpointing=True, layers=8),
    "sft, lora, accumulation": Case("sft", lora=True, accumulate=2),
    "reward model": Case("reward_model"),
    "reward model, lora, checkpointing": Case("reward_model", lora=True, checkpointing=True, layers=8),
    "dpo": Case("dpo"),
    "dpo, lora": Case("dpo", lora=True),
    "dpo, checkpointing, accumulation": Case("dpo", checkpointing=True, accumulate=2, layers=8),
    "ppo": Case("ppo"),
    "ppo, checkpointing": Case("ppo", checkpointing=True, layers=8),
    "ppo, lora": Case("ppo", lora=True),
    "ppo, one base": Case("ppo", lora=True, one_base=True),
    "ppo, one base, checkpointing": Case("ppo", lora=True, one_base=True, checkpointing=True, layers=8),
}


def planned(case: Case, config: Any) -> dict[str, float]:
    """Bytes by phase, and their peak, as the plan has them."""
    adapters = (LORA.r, tuple(LORA.target_modules)) if case.lora else None
    pairs = 2 if case.stage in ("reward_model", "dpo") else 1
    common: dict[str, Any] = {"checkpointing": case.checkpointing, "adapters": adapters}
    if case.stage == "ppo":
        common |= {"forward_rows": ROWS, "reference": not case.lora, "reward": True, "shared": case.one_base}
    job = Job(case.stage, pairs * ROWS, 2 * pairs * ROWS, PROMPT, RESPONSE, passes=case.accumulate, **common)
    found = estimate(Shape.of(config), job, Sharding(1, half=True), GPUS["h100-80gb"])
    phases = {name: found.held + sum(extra.values()) for name, extra in found.phases.items()}
    return {**phases, "peak": found.peak}


def text(words: int, shift: int = 0) -> str:
    """So many words: tokens of this tokenizer."""
    return " ".join((WORDS * (words // len(WORDS) + 2))[shift : shift + words])


def measured(case: Case, probe: Probe, folder: Path) -> dict[str, float]:
    """Bytes by phase, and their peak, as the pretended device counts them."""
    gc.collect()
    before, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = ALLOCATED.bytes, memory.TILE
    counted = _ppo(case, probe, folder) if case.stage == "ppo" else _pairs(case, probe, folder)
    return {name: counts.peak - before for name, counts in counted.items()}


def _pairs(case: Case, probe: Probe, folder: Path) -> dict[str, Any]:
    from trl import DPOConfig, RewardConfig, SFTConfig

    import ppo_vs_dpo.dpo.train as dpo
    import ppo_vs_dpo.reward_model.train as reward_model
    import ppo_vs_dpo.sft.train as sft
    from ppo_vs_dpo.dpo.config import smoothed_loss
    from ppo_vs_dpo.dpo.data import dpo_dataset
    from ppo_vs_dpo.reward_model.data import reward_dataset
    from ppo_vs_dpo.sft.data import sft_dataset

    fixed = {**COMMON, **ON_HOST, "bf16": True, "gradient_checkpointing": case.checkpointing, "max_steps": 2,
             "per_device_train_batch_size": ROWS, "gradient_accumulation_steps": case.accumulate}  # fmt: skip
    # An end token is appended.
    rows = [{"prompt": text(PROMPT, n % 8), "chosen": " " + text(RESPONSE - 1, n % 5),
             "rejected": " " + text(RESPONSE - 1, n % 3)} for n in range(2 * ROWS * case.accumulate)]  # fmt: skip
    config = {"sft": SFTConfig, "reward_model": RewardConfig, "dpo": DPOConfig}[case.stage]
    args = config(str(folder), **fixed, **(smoothed_loss({}) if case.stage == "dpo" else {}))
    model = llama(case.stage == "reward_model", layers=case.layers, **SIZES).train()
    lora = {"lora": LORA if case.lora else None}
    if case.stage == "dpo":
        trainer = dpo.build_trainer(model, TOKENIZER, dpo_dataset(Dataset.from_list(rows), TOKENIZER), args, **lora)
    elif case.stage == "reward_model":
        data = reward_dataset(Dataset.from_list(rows), TOKENIZER)
        trainer = reward_model.build_trainer(model, TOKENIZER, data, args, **lora)
    else:
        texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        data = sft_dataset(Dataset.from_list(texts), TOKENIZER, True, None, None)
        trainer = sft.build_trainer(model, TOKENIZER, data, args, **lora)

    class Steps(TrainerCallback):
        """Both steps: the first makes the optimizer's state, so the second is the hungriest."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.part = probe.part("update")
            self.part.__enter__()

        def on_train_end(self, args, state, control, **kwargs):
            self.part.__exit__(None, None, None)

    trainer.add_callback(Steps())
    trainer.train()
    return {"update": probe.parts["update"], "peak": probe.parts["all"]}


def _ppo(case: Case, probe: Probe, folder: Path) -> dict[str, Any]:
    timed = Clock.__call__

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with timed(self, name), probe.part(name.rpartition("/")[2]):
            yield

    policy = llama(layers=case.layers, **SIZES)
    parts: dict[str, Any] = {"model": policy, "reward_model": llama(True, layers=case.layers, seed=1, **SIZES)}
    if case.one_base:
        parts = on_one_base(folder, policy)
    elif case.lora:
        parts["peft_config"] = LORA.peft_config("CAUSAL_LM")
    settings = {"output_dir": str(folder / "out"), "per_device_train_batch_size": ROWS, "max_steps": 2,
                "rollout_batch_size": 2 * ROWS, "num_ppo_epochs": 1, "num_mini_batches": 2 // case.accumulate,
                "response_length": RESPONSE, "learning_rate": 1e-3, "diagnose": False, "bf16": True,
                "local_rollout_forward_batch_size": ROWS, "gradient_checkpointing": case.checkpointing}  # fmt: skip
    Clock.__call__ = phase
    try:
        trainer = PPOTrainer(
            train_dataset=Dataset.from_dict({"prompt": [text(PROMPT, n) for n in range(8)]}),
            processing_class=TOKENIZER, args=PPOConfig(**{**COMMON, **ON_HOST, **settings}), **parts,
        )  # fmt: skip
        # No response ends before its budget.
        trainer.roles.engine.eos_token_ids = [SIZES["vocabulary"] + 1]
        trainer.train()
    finally:
        Clock.__call__ = timed
    found = {name: probe.parts[name] for name in ("generate", "score", "forward")}
    return {**found, "update": probe.parts["train"], "peak": probe.parts["all"]}


def config_of(case: Case) -> Any:
    """The configuration of the case's model."""
    return llama(layers=case.layers, **SIZES).config


def main() -> None:
    """Print what is planned and what is counted, as JSON at the end."""
    parser = argparse.ArgumentParser(prog="python -m tests.device.planned", description=main.__doc__)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)} (default: all)")
    found = {}
    for name in parser.parse_args().cases or CASES:
        gc.collect()
        with tempfile.TemporaryDirectory() as folder, Probe() as probe, trainers_on_device(), half_precision_kernel():
            counted = measured(CASES[name], probe, Path(folder))
        said = planned(CASES[name], config_of(CASES[name]))
        found[name] = {"planned": said["peak"], "counted": counted["peak"]}
        sys.stderr.write(f"{name}: {said['peak'] / counted['peak'] - 1:+.1%} of {counted['peak'] / 1e3:,.0f} kB; ")
        phases = [f"{phase} {said.get(phase, 0) / 1e3:,.0f} / {size / 1e3:,.0f}" for phase, size in counted.items()]
        sys.stderr.write(f"planned / counted: {', '.join(phases)}\n")
    sys.stdout.write(f"\nPLANNED {json.dumps(found)}\n")


if __name__ == "__main__":
    main()
