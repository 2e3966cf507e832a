"""kill -9 in every stage, and Ctrl-C: the same command goes on and ends with the same report."""

import json
import os
import signal
import subprocess
import time

import pytest

from tests.faults.small import as_typed
from tests.pipeline import mini

# When to kill each stage: as soon as this file or folder is there (relative to the run folder).
MOMENTS = {
    "data": "data/progress.json",
    "sft": "sft/checkpoints/checkpoint-10/checkpoint.json",
    "pairs": "pairs/progress.json",
    "reward_model": "reward_model/checkpoints/checkpoint-3/checkpoint.json",
    "dpo": "dpo/checkpoints/checkpoint-2/checkpoint.json",
    "ppo": "ppo/checkpoints/checkpoint-2/checkpoint.json",
    "compare": "compare/progress.json",
}


def stage_process(run, stage):
    """Process id of a running stage, or ``None``."""
    room = {"data": "preferences", "pairs": "preferences"}.get(stage, stage)
    found = subprocess.run(
        ["pgrep", "-f", "--", f"-m ppo_vs_dpo.{room} {run} "], capture_output=True, text=True, check=False
    )
    return int(found.stdout.split()[0]) if found.stdout else None


def kill_at(command, run, stage, number):
    """Start the command, send the stage a signal at its moment, return the command's exit code and words."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=mini.environment(),
        preexec_fn=as_typed,
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if (run / MOMENTS[stage]).exists() and not (run / stage / "done.json").exists():
            victim = stage_process(run, stage) if number == signal.SIGKILL else process.pid
            if victim:
                os.kill(victim, number)
                break
        time.sleep(0.02)
    _, words = process.communicate(timeout=120)
    return process.returncode, words


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    mini.run(folder)
    return mini.without_costs(json.loads((folder / "quickstart" / "compare" / "report.json").read_text()))


@pytest.mark.slow
def test_killed_once_in_every_stage(uninterrupted, tmp_path):
    run = tmp_path / "quickstart"
    killed = []
    for stage in MOMENTS:
        code, words = kill_at(mini.command(tmp_path), run, stage, signal.SIGKILL)
        if code == 2:
            assert f"stage {stage}" in words
            assert "killed by SIGKILL" in words
            killed.append(stage)
    assert set(killed) >= {"sft", "reward_model", "dpo", "ppo", "compare"}, f"only {killed} were caught at work"
    mini.run(tmp_path)
    assert mini.without_costs(json.loads((run / "compare" / "report.json").read_text())) == uninterrupted


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_can_be_resumed(uninterrupted, tmp_path):
    run = tmp_path / "quickstart"
    code, words = kill_at(mini.command(tmp_path), run, "sft", signal.SIGINT)
    assert code == 130
    assert "the same command goes on, a stage from its last checkpoint" in words
    assert "Traceback" not in words
    assert stage_process(run, "sft") is None
    mini.run(tmp_path)
    assert mini.without_costs(json.loads((run / "compare" / "report.json").read_text())) == uninterrupted
