"""Kills at random moments over all stages: of the command, the launcher, one rank, one child; four kinds of signal."""

import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.compare.server import Server
from tests.faults import small

# Seconds after a signal within which everything must be gone.
GRACE = 60.0
MODES = ("KILL", "TERM", "INT", "INT twice", "STOP, KILL", "child KILL", "child STOP, INT", "KILL, again at once")


@dataclass
class Tally:
    """What a campaign of kills saw."""

    kills: int = 0
    modes: dict[str, int] = field(default_factory=dict)
    stages: dict[str, int] = field(default_factory=dict)
    orphans: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    paid_twice: int = 0
    tracebacks: int = 0
    slowest: float = 0.0


def verdict(question: str, number: int) -> str:
    """The stub's verdict: by the words alone, so that equal questions get equal answers."""
    return f"Comparison: fine.\n{'A' if sum(question.encode()) % 2 else 'B'}"


def stage_at_work(run: Path) -> str:
    """The stage that the command is at."""
    return next((name for name in small.STAGES if not (run / name / "done.json").is_file()), "end")


def at_work(tag: str) -> bool:
    """Whether a stage's process is there."""
    return any("-m ppo_vs_dpo." in line and ".cli" not in line and "checking" not in line and "measured" not in line
               for line in small.survivors(tag).values())  # fmt: skip


def end_all(process, tag: str, mode: str, random_: random.Random) -> None:
    """Send what a mode says."""
    children = [pid for pid in small.survivors(tag) if pid != process.pid]
    victim = random_.choice(children) if children else process.pid
    with contextlib.suppress(ProcessLookupError):
        if mode.startswith("KILL"):
            os.kill(process.pid, signal.SIGKILL)
        elif mode == "TERM":
            os.kill(process.pid, signal.SIGTERM)
        elif mode == "INT":
            os.killpg(process.pid, signal.SIGINT)
        elif mode == "INT twice":
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.4)
            os.killpg(process.pid, signal.SIGINT)
        elif mode == "STOP, KILL":
            os.killpg(process.pid, signal.SIGSTOP)
            time.sleep(0.5)
            os.killpg(process.pid, signal.SIGKILL)
        elif mode == "child KILL":
            os.kill(victim, signal.SIGKILL)
        elif mode == "child STOP, INT":
            os.kill(victim, signal.SIGSTOP)
            os.killpg(process.pid, signal.SIGINT)


def campaign(folder: Path, seed: int, kills: int, ranks: int, say=print) -> Tally:
    """Kill one run again and again, let it end, and compare it with an undisturbed one.

    Args:
        folder: where runs are made.
        seed: of moments, modes and victims.
        kills: how often.
        ranks: processes of each training stage.
    """
    random_, tally = random.Random(seed), Tally()
    more = [f"launch.processes={ranks}", "launch.workers=1"]
    with contextlib.closing(Server(verdict)) as calm:
        code, words = small.whole(folder / "calm", calm.url, f"calm{seed}", *more)
        assert code == 0, words
        expected, price = small.bits(folder / "calm" / "quickstart"), len(calm.requests)
    run, tag = folder / "cut" / "quickstart", f"cut{seed}-{ranks}"
    with contextlib.closing(Server(verdict)) as judge:
        while tally.kills < kills:
            process, stage = small.start(folder / "cut", judge.url, tag, *more), stage_at_work(run)
            # One in five before any stage works; the others some time after one has begun, or when several have ended.
            began, working = time.monotonic(), random_.random() > 0.2
            while working and process.poll() is None and not at_work(tag):
                time.sleep(0.05)
            deadline = (time.monotonic() if working else began) + random_.uniform(
                0.2, random_.choice((6.0, 20.0, 60.0))
            )
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            if process.poll() is not None:
                if process.returncode == 0:
                    break
                continue
            stage, mode = stage_at_work(run), random_.choice(MODES)
            sent = time.monotonic()
            end_all(process, tag, mode, random_)
            tally.kills += 1
            tally.modes[mode] = tally.modes.get(mode, 0) + 1
            tally.stages[stage] = tally.stages.get(stage, 0) + 1
            try:
                process.wait(GRACE)
            except Exception:
                tally.hangs.append(f"{stage}, {mode}")
                process.kill()
                process.wait()
            if mode != "KILL, again at once":
                until = time.monotonic() + 3
                while (left := small.survivors(tag)) and time.monotonic() < until:
                    time.sleep(0.1)
                tally.orphans += [f"{stage}, {mode}: {line}" for line in left.values()]
                if left:
                    say(f"orphans: {sorted(left.values())}")
                for pid in left:
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
            tally.slowest = max(tally.slowest, time.monotonic() - sent)
            say(f"kill {tally.kills}: {mode} in {stage}, {len(tally.orphans)} orphans so far")
        code, words = small.whole(folder / "cut", judge.url, tag, *more)
        said = (folder / "cut" / "said.txt").read_text(errors="replace") + words
        tally.tracebacks = said.count("Traceback (most recent")
        if code != 0:
            tally.lost.append(f"the last command ended with {code}: {words[-500:]}")
        tally.paid_twice = max(0, len(judge.requests) - price)
    if code == 0:
        found = small.bits(run)
        tally.lost += sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        tally.leftovers = small.leftovers(run)
    return tally


def as_dict(tally: Tally) -> dict[str, Any]:
    """For the table."""
    return {key: len(value) if isinstance(value, list) else value for key, value in vars(tally).items()}
