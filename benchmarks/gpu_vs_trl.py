"""Ours beside TRL's trainers on one GPU: seconds a step or update and peak memory. Five minutes.

    python -m benchmarks.gpu_vs_trl --trl FOLDER         a folder with trl==1.12.0, the last with a PPO
    python -m benchmarks.gpu_vs_trl --size tiny          seconds, on a CPU: that it runs

Llamas of SmolLM2-360M's size with random weights, in bfloat16 by autocast, without checkpointing, the same rows,
batches and optimizer on both sides; each side is a process of its own, one after the other. PPO: 64 responses an
update of up to 128 tokens after prompts of 32 to 256, four epochs; responses end after a third of the budget on
average, and both sides get the same lengths (`benchmarks.ppo_vs_trl`). SFT, reward model, DPO: 16 rows (pairs) a step
of 32 to 512 tokens. Seconds are wall seconds, the device waited for; the first two steps are not counted.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# As a stage has it (`pipeline.running.job`), on both sides.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from transformers import TrainerCallback

from benchmarks import floor, measure, ppo_vs_trl

STAGES = ("sft", "reward_model", "dpo", "ppo")
SIDES = ("trl", "ours")
# As SmolLM2-360M's config.json, but for its groups of queries.
SIZES = {
    "360m": (floor.Shape(hidden=960, intermediate=2560, layers=32, vocabulary=49152), 15, 64, 8192),
    "tiny": (floor.Shape(hidden=32, intermediate=64, layers=2, vocabulary=4096), 4, 8, 1024),
}
UNCOUNTED = 2


class Seconds(TrainerCallback):
    """Wall seconds of each step, the device waited for."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.started = 0.0

    @staticmethod
    def now() -> float:
        """After all that was begun."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        """The first step begins."""
        self.started = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        """A step is done, and the next begins."""
        now = self.now()
        self.steps.append(now - self.started)
        self.started = now


def sizes(size: str) -> tuple[floor.Shape, int, ppo_vs_trl.Workload, int]:
    """The models' shape and heads, PPO's work, and the tokens of one of our passes."""
    shape, heads, rows, tokens = SIZES[size]
    return shape, heads, ppo_vs_trl.Workload(rows, (32, 256), 128, 128 / 3, micro=min(16, rows)), tokens


def device() -> torch.device:
    """Where models are made: on the GPU that is a second, on the host a minute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def texts(rows: int) -> list[dict[str, str]]:
    """Pairs of 32 to 512 tokens."""
    draw = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{draw.randrange(400)}" for _ in range(draw.randint(low, high)))

    return [{"prompt": words(16, 256), "chosen": " " + words(16, 256), "rejected": " " + words(16, 256)}
            for _ in range(rows)]  # fmt: skip


def pairs_trainer(stage: str, side: str, given: argparse.Namespace, folder: str, seconds: Seconds) -> Any:
    """The trainer of SFT, reward model or DPO."""
    from tests.device.jobs import trained

    shape, heads, workload, _ = sizes(given.size)
    with device():
        policy, _, reward, _, tokenizer = ppo_vs_trl.models(workload, shape, heads)
    batch = workload.micro
    more = {"per_device_train_batch_size": batch, "max_steps": given.steps + UNCOUNTED, "max_length": None,
            "logging_steps": 1000, "bf16": torch.cuda.is_available(), "learning_rate": 1e-6,
            "use_cpu": not torch.cuda.is_available()}  # fmt: skip
    model = reward if stage == "reward_model" else policy
    if model is policy:
        # Its biased head is PPO's alone: TRL's DPO reads the model from a folder again.
        model.lm_head = torch.nn.Linear(shape.hidden, shape.vocabulary, bias=False, device=device())
    rows = texts(batch * (given.steps + UNCOUNTED))
    trainer = trained(Path(folder), stage, side == "trl", model, tokenizer, rows, **more)
    trainer.add_callback(seconds)
    return trainer


def ppo_trainer(side: str, given: argparse.Namespace, folder: str, seconds: Seconds) -> Any:
    """PPO's: TRL 1.12's or ours."""
    from datasets import Dataset

    shape, heads, workload, tokens = sizes(given.size)
    steps = given.steps + UNCOUNTED
    with device():
        policy, reference, reward, value, tokenizer = ppo_vs_trl.models(workload, shape, heads)
    half = torch.cuda.is_available()
    settings = {**ppo_vs_trl.settings(workload, steps), "bf16": half, "use_cpu": not half, "output_dir": folder}
    data = Dataset.from_dict({"input_ids": ppo_vs_trl.prompt_ids(workload)})
    parts = {"processing_class": tokenizer, "model": policy, "ref_model": reference, "reward_model": reward,
             "value_model": value, "train_dataset": data, "callbacks": [seconds]}  # fmt: skip
    if side == "trl":
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        policy.generate = ppo_vs_trl.planned_generation(workload, policy.generate)
        more = {"stop_token": "eos", "num_sample_generations": 0}
        return PPOTrainer(args=PPOConfig(**settings, **more), eval_dataset=data, **parts)
    from ppo_vs_dpo.models.sampling import generation
    from ppo_vs_dpo.ppo.config import PPOConfig
    from ppo_vs_dpo.ppo.trainer import PPOTrainer

    generation.uniform_rows = ppo_vs_trl.planned_uniforms(workload, steps, generation.uniform_rows)
    more = {"missing_eos": "subtract", "micro_batch_tokens": tokens, "diagnose": False}
    return PPOTrainer(args=PPOConfig(**settings, **more), **parts)


def work(stage: str, side: str, given: argparse.Namespace) -> dict[str, float]:
    """One side of one stage, in this process."""
    if torch.cuda.is_available():
        # TRL's PPO makes an accelerator of its own, which asks here.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    seconds = Seconds()
    with tempfile.TemporaryDirectory() as folder:
        make = ppo_trainer if stage == "ppo" else lambda *a: pairs_trainer(stage, *a)
        trainer = make(side, given, folder, seconds)
        trainer.train()
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else measure.memory_now("VmHWM") / 1e3
    return {"seconds": statistics.median(seconds.steps[UNCOUNTED:]), "peak": peak}


def start(stage: str, side: str, given: argparse.Namespace) -> dict[str, float]:
    """`work` in a process of its own, with TRL 1.12 where it is TRL's PPO."""
    old = [given.trl] if given.trl and (stage, side) == ("ppo", "trl") else []
    command = [sys.executable, "-m", "benchmarks.gpu_vs_trl", "--stage", stage, "--side", side, "--size", given.size,
               "--steps", str(given.steps)]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=measure.ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*old, str(measure.ROOT), *sys.path]), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    sys.stderr.write(f"{stage}, {side}: {time.perf_counter() - began:.0f} s in all\n")
    if done.returncode:
        raise SystemExit(f"{stage}, {side}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.rpartition(measure.MARK)[2])


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", help="folder with trl==1.12.0 installed (default: installed into a throw-away one)")
    parser.add_argument("--size", choices=list(SIZES), default="360m")
    parser.add_argument("--steps", type=int, default=4, help="counted (default: %(default)s)")
    parser.add_argument("--stage", choices=STAGES, help="one stage")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        sys.stdout.write(f"{measure.MARK}{json.dumps(work(given.stage, given.side, given))}\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        given.trl = given.trl or measure.install_trl("1.12.0", str(Path(folder) / "site"))
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else measure.machine()
        sys.stdout.write(f"{name}, torch {torch.__version__}\n\n")
        head = ["one step of", *(f"{side}: {what}" for side in ("TRL", "ours") for what in ("s", "peak GB")),
                "times as fast", "memory"]  # fmt: skip
        sys.stdout.write(f"| {' | '.join(head)} |\n| {' | '.join(['---'] * len(head))} |\n")
        for stage in (given.stage,) if given.stage else STAGES:
            theirs, ours = (start(stage, side, given) for side in SIDES)
            cells = [stage, *(f"{x[key]:.3g}" for x in (theirs, ours) for key in ("seconds", "peak")),
                     f"{theirs['seconds'] / ours['seconds']:.2f}", f"{ours['peak'] / theirs['peak']:.2f}"]  # fmt: skip
            sys.stdout.write(f"| {' | '.join(cells)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
