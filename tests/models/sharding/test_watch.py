"""A rank that stands still is named before a collective gives up; a meeting waits for whoever works alone."""

import io
import os
import re
import sys
import time

import pytest
import torch

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.sharding import watch
from ppo_vs_dpo.models.sharding.deepspeed import named_step
from ppo_vs_dpo.models.sharding.watch import meet, watched
from tests.ranks import on_ranks

PATIENCE = 4.0


class Timed(io.StringIO):
    """What was written, and when first."""

    first: float | None = None

    def write(self, text: str) -> int:
        self.first = self.first or time.monotonic()
        return super().write(text)


def stalled() -> tuple[float, float, str]:
    """Rank 1 works alone for longer than rank 0 waits for it; seconds until it spoke and gave up, and what it said."""
    sys.stderr, started, step = Timed(), time.monotonic(), ["before"]
    try:
        with named_step(lambda: f"test, {step[0]}", PATIENCE):
            step[0] = "all_reduce"
            if os.environ["RANK"] == "1":
                time.sleep(1.6 * PATIENCE)
            else:
                torch.distributed.all_reduce(torch.ones(1))
    except UserError as raised:
        sys.stderr.write(str(raised))
    return (sys.stderr.first or started) - started, time.monotonic() - started, sys.stderr.getvalue()


def test_a_stalled_rank_is_named_before_the_collective_gives_up():
    (named, gave_up, said), (_, _, other) = on_ranks(2, stalled, timeout=PATIENCE, orderly=False)
    assert 0.7 * PATIENCE < named < gave_up
    assert gave_up > PATIENCE
    assert "rank 0 has been in this step for 3 s: test, all_reduce" in said
    assert said.count("has been in this step") == 1
    assert "rank 0 waited in vain for another rank in this step: test, all_reduce" in said
    # It is not said of the one that waits, and the one that does not is named with its line.
    assert "It waits for the others at all_reduce (" in said
    assert re.search(r"\)\. rank 1 is at stalled \(\S*test_watch\.py, line \d+\)\. ddp_timeout", said), said
    assert "does not wait for others: it is at stalled (" in other


def test_on_a_cpu_too_a_collective_is_given_up_after_ddp_timeout(tmp_path, monkeypatch):
    """transformers hands it on to groups with an accelerator or DeepSpeed only."""
    from trl import SFTConfig

    from ppo_vs_dpo.artifacts.run import RunFolder
    from ppo_vs_dpo.artifacts.stage import StageContext
    from ppo_vs_dpo.models.training import training_arguments

    (tmp_path / "config.yaml").write_text("seed: 1\nsft: {}\nmodel: {path: x}\n")
    joined = []

    class Joined(Exception):
        """Far enough."""

    def join(backend, timeout):
        joined.append((backend, timeout.total_seconds()))
        raise Joined

    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for passed in ({"use_cpu": True}, {"use_cpu": True, "ddp_timeout": 7}):
        with pytest.raises(Joined):
            training_arguments(SFTConfig, StageContext(RunFolder(tmp_path), "sft"), passed)
    assert joined == [("gloo", 1800), ("gloo", 7)]


def slow_and_well() -> tuple[list[str], list[str]]:
    """Rank 1 is slow in one step and then goes on: who is blamed while it is, and afterwards."""
    with named_step(lambda: "test", 0.8):
        if os.environ["RANK"] == "1":
            time.sleep(1.2)
        during = watch.not_waiting()
    meet(pause=0.05)
    return during, watch.not_waiting()


def test_one_that_was_slow_and_went_on_is_not_blamed_later():
    (_, after), (during, after_too) = on_ranks(2, slow_and_well)
    assert during[0].startswith("rank 1 is at slow_and_well (")
    assert after == after_too == []


def test_steps_that_change_are_not_named(capsys, monkeypatch):
    monkeypatch.setattr(watch, "ranks", lambda: 2)
    step = iter(range(10_000))
    with watched(lambda: str(next(step)), 0.4):
        time.sleep(0.8)
    assert "has been in this step" not in capsys.readouterr().err
    with watched(lambda: "the same", 0.4):
        time.sleep(0.8)
    assert "the same" in capsys.readouterr().err


def test_one_process_is_not_watched(capsys):
    with watched(lambda: pytest.fail("asked"), 0.01):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def alone() -> float:
    """Rank 0 works for twice as long as a collective may take, and the others wait."""
    started = time.monotonic()
    if os.environ["RANK"] == "0":
        time.sleep(2.0)
    meet(pause=0.05)
    meet(pause=0.05)
    return time.monotonic() - started


def test_a_meeting_outlasts_a_collective():
    assert all(2.0 <= seconds < 8 for seconds in on_ranks(2, alone, timeout=1.0, orderly=False))
