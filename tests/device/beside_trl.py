"""One PPO update of ours and of TRL 1.12's, the last release that had one, on the pretended device.

    python -m tests.device.beside_trl [--trl FOLDER] [--record]     # installs trl==1.12.0 into a throw-away folder

The same four Llamas, prompts of 8 to 24 tokens, 16 responses of 16 tokens (no end token is sampled), micro-batches of
four rows, bfloat16 by autocast, as `benchmarks.ppo_vs_trl` has them. Counted is the second update, sampling and
scoring in it. ``--record`` writes `counts.json` and docs/gpu.md's table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks import measure, ppo_vs_trl
from tests.device.pretended import DEVICE, Probe, trainers_on_device

MARK = "BESIDE"
WORKLOAD = ppo_vs_trl.Workload(rows=16, prompts=(8, 24), budget=16, mean=None, micro=4, epochs=1)
SIDES = ("ours", "trl")


class Second(TrainerCallback):
    """Counts the second update: the first makes the optimizer's state."""

    def __init__(self, probe: Probe):
        self.probe, self.part = probe, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.part = self.probe.part("update")
            self.part.__enter__()
        elif self.part is not None:
            self.part.__exit__(None, None, None)
            self.part = None


def settings() -> dict[str, Any]:
    """Of both trainers."""
    return {**ppo_vs_trl.settings(WORKLOAD, 2), "bf16": True, "local_rollout_forward_batch_size": 8}


def check_trained(trainer: Any) -> None:
    """Every weight of policy and value model has moments, on the device."""
    moments = [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {value.device for value in moments} == {DEVICE}
    assert sum(value.numel() for value in moments) == 2 * sum(p.numel() for p in trained) > 0


def run_trl(probe: Probe, folder: str) -> None:
    """TRL's side: its package comes first on the path."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    *models, tokenizer = ppo_vs_trl.models(WORKLOAD)
    # Before its optimizer is made: weights that come to this device are other objects, not so on a GPU.
    policy, reference, reward, value = (model.to(DEVICE) for model in models)
    data = Dataset.from_dict({"input_ids": ppo_vs_trl.prompt_ids(WORKLOAD)})
    trainer = PPOTrainer(
        args=PPOConfig(output_dir=folder, stop_token="eos", num_sample_generations=0, **settings()),
        processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
        train_dataset=data, eval_dataset=data, callbacks=[Second(probe)],
    )  # fmt: skip
    trainer.train()
    check_trained(trainer)


def run_ours(probe: Probe, folder: str) -> None:
    """Our side."""
    from ppo_vs_dpo.ppo.config import PPOConfig
    from ppo_vs_dpo.ppo.trainer import PPOTrainer
    from tests.device.work import half_precision_kernel

    policy, reference, reward, value, tokenizer = ppo_vs_trl.models(WORKLOAD)
    with half_precision_kernel():
        trainer = PPOTrainer(
            args=PPOConfig(output_dir=folder, missing_eos="subtract", diagnose=False, **settings()),
            processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": ppo_vs_trl.prompt_ids(WORKLOAD)}), callbacks=[Second(probe)],
        )  # fmt: skip
        trainer.train()
    check_trained(trainer)


def count(side: str) -> dict[str, Any]:
    """The counts of one side, in this process."""
    # TRL's makes an accelerator of its own, which asks here.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    with tempfile.TemporaryDirectory() as folder, Probe(strict=side == "ours") as probe, trainers_on_device():
        (run_trl if side == "trl" else run_ours)(probe, folder)
    counts = probe.parts["update"]
    return {"waits": sum(counts.waits.values()), "uploads": sum(counts.uploads.values()),
            "operations": counts.operations, "largest": counts.largest[0], "peak": counts.peak,
            "products": dict(sorted(counts.products.items()))}  # fmt: skip


def start(side: str, trl: str) -> dict[str, Any]:
    """The counts of one side, in a process of its own with that side's TRL."""
    path = [*([trl] if side == "trl" else []), str(measure.ROOT), *sys.path]
    command = [sys.executable, "-m", "tests.device.beside_trl", "--side", side]
    done = subprocess.run(
        command, cwd=measure.ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.rpartition(f"{MARK} ")[2])


def main() -> None:
    """Print both sides' counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", help="folder with trl==1.12.0 installed")
    parser.add_argument("--record", action="store_true", help="write tests/device/counts.json and docs/gpu.md's table")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.side:
        sys.stdout.write(f"\n{MARK} {json.dumps(count(given.side))}\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        trl = given.trl or measure.install_trl("1.12.0", str(Path(folder) / "site"))
        found = {f"ppo update, {side}": start(side, trl) for side in SIDES}
    if given.record:
        from tests.device import work

        work.record(found)
    sys.stdout.write(f"\n{MARK} {json.dumps(found)}\n")


if __name__ == "__main__":
    main()
