"""The command that fills the table of docs/gpu.md runs, here at a size for a CPU."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_vs_trl
from ppo_vs_dpo.models.sampling import generation

ARGUMENTS = ["--size", "tiny", "--prompt", "16", "--response", "12", "--updates", "2", "--rows", "8"]


def cells_of(text: str) -> dict[str, str]:
    """The table's one row."""
    head, _, row = [line for line in text.splitlines() if line.startswith("| ")]
    return dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))


@pytest.mark.parametrize(
    ("more", "name"), [([], "tiny full"), (["--kind", "lora", "--no-graphs"], "tiny lora, no graphs")]
)
def test_a_row_of_the_table(capsys, monkeypatch, more, name):
    monkeypatch.setattr(sys, "argv", ["gpu", *ARGUMENTS, *more])
    gpu.main()
    cells = cells_of(capsys.readouterr().out)
    assert cells["model"] == name
    phases = [float(cells[f"{phase}, s"]) for phase in gpu.PHASES]
    assert abs(sum(phases) - float(cells["s an update"])) < 0.03
    # No response ends early: 8 of 12 tokens each.
    rate = float(cells["tokens/s"].replace(",", ""))
    assert abs(rate * float(cells["s an update"]) / 96 - 1) < 0.3


@pytest.mark.slow
def test_a_row_under_zero3_on_two_ranks():
    """Models are made in pieces, and the first rank alone prints."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benchmarks.gpu"]
    done = subprocess.run(
        [sys.executable, *command, *ARGUMENTS, "--deepspeed", "zero3"], cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    cells = cells_of(done.stdout)
    assert (cells["model"], cells["ranks"]) == ("tiny full, zero3", "2")


@pytest.mark.slow
@pytest.mark.parametrize("side", gpu_vs_trl.SIDES)
@pytest.mark.parametrize("stage", ["reward_model", "dpo"])
def test_a_side_of_a_stage(stage, side):
    """Ours and TRL's take the same rows; what is said of each is a median step and a peak."""
    given = argparse.Namespace(size="tiny", steps=1)
    found = gpu_vs_trl.work(stage, side, given)
    assert 0 < found["seconds"] < 60
    assert found["peak"] > 0


@pytest.mark.slow
def test_our_side_of_ppo(monkeypatch):
    monkeypatch.setattr(generation, "uniform_rows", generation.uniform_rows)
    assert gpu_vs_trl.work("ppo", "ours", argparse.Namespace(size="tiny", steps=1))["seconds"] > 0
