"""The quickstart made small: every stage for real, in about a minute on two cores."""

import os
import subprocess
import sys
from pathlib import Path

SMALL = [
    "experiment=quickstart",
    "data.sft_examples=640", "data.train_prompts=256", "data.heldout_prompts=48", "data.pairs=256",
    "data.test_pairs=96",
    "data.max_new_tokens=24",
    "sft.num_train_epochs=2", "sft.save_steps=5", "sft.logging_steps=5",
    "reward_model.num_train_epochs=2", "reward_model.save_steps=3", "reward_model.samples=64",
    "dpo.save_steps=2", "dpo.sweep={beta: [1.0]}",
    "ppo.max_steps=4", "ppo.rollout_batch_size=32", "ppo.per_device_train_batch_size=16", "ppo.save_steps=1",
    "ppo.eval_steps=2", "ppo.validation_prompts=16", "ppo.sweep={kl_coef: [0.0]}",
    "compare.n_prompts=48", "compare.pool_size=4", "compare.best_of_n=[2,4]", "compare.resamples=200",
]  # fmt: skip


def command(output_dir: Path, *more: str) -> list[str]:
    """The command line of a small run."""
    return [sys.executable, "-m", "ppo_vs_dpo.pipeline.cli", *SMALL, f"output_dir={output_dir}", *more]


def environment() -> dict[str, str]:
    """No network, one thread, and no compiler: nothing may need one on a CPU."""
    without_compiler = {"PATH": str(Path(sys.executable).parent), "CC": "no-compiler", "CXX": "no-compiler"}
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **threads, **without_compiler, "HF_HUB_OFFLINE": "1"}


def run(output_dir: Path, *more: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run it to the end; a run that fails where it should not says so in its own words."""
    ended = subprocess.run(
        command(output_dir, *more), capture_output=True, text=True, check=False, env=environment(), timeout=900
    )
    assert not check or ended.returncode == 0, ended.stderr
    return ended


def without_costs(report: dict) -> dict:
    """The figures of a report: everything but what was spent on them."""
    return {key: value for key, value in report.items() if key not in ("cost", "provenance")}
