"""Forty steps of SFT, reward model, DPO and PPO end where the recorded ones did."""

import os
import subprocess
import sys

import pytest

from benchmarks import trajectories
from benchmarks.trajectories import RECORDED, STAGES, STEPS, TOLERANCE, comparable, compare, machine, read_record


def test_every_stage_follows_its_record():
    """In a process of its own, where no other test has left threads, seeds or settings behind."""
    for stage in STAGES:
        if not comparable(read_record(RECORDED / f"{stage}.csv")[1], machine()):
            pytest.skip(f"tests/trajectories/{stage}.csv was recorded with other versions")
    done = subprocess.run(
        [sys.executable, "-m", trajectories.__name__, "--tolerance", str(TOLERANCE)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    assert [line.split()[0] for line in done.stdout.splitlines() if f"({STEPS} steps" in line] == list(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_figure_that_moved_is_seen(stage, capsys):
    series, _ = read_record(RECORDED / f"{stage}.csv")
    assert compare(stage, series, 0.0)
    name = "loss/policy_avg" if stage == "ppo" else "loss"
    scale = max(map(abs, series[name]))
    capsys.readouterr()
    for share, tolerance, good in [(1e-5, 0.0, False), (1e-5, TOLERANCE, True), (1e-3, TOLERANCE, False)]:
        moved = {**series, name: [*series[name][:-1], series[name][-1] + share * scale]}
        assert compare(stage, moved, tolerance) is good
        assert ("BEYOND THE BOUND" in capsys.readouterr().out) is not good
    # A figure that is no longer logged, or not at every step, has moved too.
    assert not compare(stage, {key: values for key, values in series.items() if key != name}, TOLERANCE)
    assert not compare(stage, {**series, name: series[name][:-1]}, TOLERANCE)


def test_ppo_clips_in_its_record():
    """Else the trajectory would say nothing about the clipped objective."""
    series, _ = read_record(RECORDED / "ppo.csv")
    for name in ("policy/clipfrac_avg", "val/clipfrac_avg"):
        assert max(series[name]) > 0.1
    assert sum(value > 0 for value in series["policy/clipfrac_avg"]) > STEPS // 2


def test_a_record_keeps_every_bit(tmp_path):
    series = {"step": [1.0, 2.0], "loss": [0.1 + 0.2, 1 / 3], "a/b": [5e-324, -1.7976931348623157e308]}
    trajectories.write_record(tmp_path / "x.csv", series, machine())
    assert read_record(tmp_path / "x.csv") == (series, machine())
