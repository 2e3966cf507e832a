"""Kills at random moments of every stage: of the command, the launcher, one rank; each kind of signal.

An episode is one stage (sometimes with the next one) of a run whose earlier stages are done: killed a few times, then
let to its end, and compared bit by bit with an undisturbed run. What was seen goes into ``kills.jsonl``, a line each,
so that a campaign can be stopped, and goes on with the next episode.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.files import append_jsonl, read_jsonl
from ppo_vs_dpo.artifacts.guards.versions import source_hash
from tests.faults import small

# Seconds after a signal within which the command must have ended, and then everything that it started.
GRACE, GONE = 60.0, 3.0
# A command that goes on for longer after a signal, and ends as if there had been none, has not heeded it.
HEEDED = 8.0
KILLS_OF_AN_EPISODE = 6
# Of the command; of what it started; both; and how often each is taken.
MODES = {
    "command KILL": 4, "command TERM": 2, "command INT": 2, "command INT twice": 2, "command HUP": 1,
    "command STOP, KILL": 2, "command KILL, again at once": 3, "launcher KILL": 2, "launcher TERM": 1,
    "rank KILL": 4, "rank STOP, command INT": 2, "rank STOP": 1,
}  # fmt: skip
# When: seconds after the command began; after the stage's process began; while it works; at a checkpoint, a file
# being written, and the stage's end.
MOMENTS = {"start": 3, "loading": 5, "work": 4, "checkpoint": 4, "writing": 3, "end": 2}
WORKERS = tuple(f"ppo_vs_dpo.{room}" for room in ("preferences", "sft", "reward_model", "dpo", "ppo", "compare"))
BARS = ("lost", "orphans", "hangs", "leftovers", "paid_twice", "tracebacks", "unsaid")


def family(tag: str, command: int) -> tuple[list[int], list[int]]:
    """Of what a command started: launchers, and ranks (or the one process of a stage)."""
    launchers, ranks = [], []
    for pid, line in small.survivors(tag).items():
        if pid != command and "torch.distributed.run" in line:
            launchers.append(pid)
        elif pid != command and any(f"{name} " in line for name in WORKERS):
            ranks.append(pid)
    return launchers, ranks


def send(process: subprocess.Popen, tag: str, mode: str, random_: random.Random) -> str:
    """Send what a mode says; the mode that it was (without ranks, all is for the command)."""
    launchers, ranks = family(tag, process.pid)
    who, _, what = mode.partition(" ")
    if who != "command" and not ranks:
        mode, who, what = "command KILL", "command", "KILL"
    victim = random_.choice(ranks if who == "rank" else launchers or ranks) if who != "command" else process.pid
    with contextlib.suppress(ProcessLookupError):
        if what in ("KILL", "KILL, again at once", "HUP"):
            os.kill(victim, signal.SIGHUP if what == "HUP" else signal.SIGKILL)
        elif what == "TERM":
            os.kill(victim, signal.SIGTERM)
        elif what in ("INT", "INT twice"):
            os.killpg(process.pid, signal.SIGINT)
            if what == "INT twice":
                time.sleep(random_.uniform(0.05, 1.0))
                os.killpg(process.pid, signal.SIGINT)
        elif what == "STOP, KILL":
            os.killpg(process.pid, signal.SIGSTOP)
            time.sleep(0.5)
            os.killpg(process.pid, signal.SIGKILL)
        elif what == "STOP":
            os.kill(victim, signal.SIGSTOP)
        elif what == "STOP, command INT":
            os.kill(victim, signal.SIGSTOP)
            os.killpg(process.pid, signal.SIGINT)
        else:
            raise ValueError(mode)
    return mode


def being_written(folder: Path) -> bool:
    """Whether a stage is writing something under a temporary name, or a checkpoint that is not stamped yet."""
    for place in (folder, folder / "checkpoints"):
        with contextlib.suppress(OSError):
            for entry in os.scandir(place):
                if entry.name.endswith(".tmp"):
                    return True
                if entry.name.startswith("checkpoint-") and not Path(entry.path, "checkpoint.json").exists():
                    return True
    return False


def checkpoints(folder: Path) -> set[str]:
    """Names of a stage's whole checkpoints."""
    return {path.parent.name for path in folder.glob("checkpoints/checkpoint-*/checkpoint.json")}


def wait_for(
    process: subprocess.Popen, run: Path, stage: str, moment: str, random_: random.Random, took: float
) -> bool:
    """Wait for a moment of a stage; whether it came before the command had ended.

    Args:
        process: the command.
        run: its folder.
        stage: whose moment.
        moment: one of `MOMENTS`.
        random_: seconds are drawn from it.
        took: seconds of the stage's work in the undisturbed run.
    """
    folder, began = run / stage, time.time()
    before = checkpoints(folder)
    more = {"start": 4.0, "loading": 6.0, "work": 0.6 * took, "checkpoint": 0.3, "writing": 0.02, "end": 0.5}[moment]
    delay, fresh = random_.uniform(0.0, more), False

    def come() -> bool:
        if moment == "start":
            return True
        marker = folder / "started.json"
        with contextlib.suppress(OSError):
            if moment == "loading":
                return marker.stat().st_mtime >= began
            # An attempt removes this file when it begins, and writes it when it is at work.
            if not (folder / "progress.json").exists() and not (folder / "metrics.jsonl").exists():
                return False
        if moment == "checkpoint" and stage in small.TRAINING:
            return bool(checkpoints(folder) - before)
        if moment == "writing":
            return being_written(folder)
        if moment == "end":
            return (folder / "done.json").exists() or (folder / "model").exists() or (folder / "report.html").exists()
        with contextlib.suppress(OSError):
            return (folder / "progress.json").stat().st_mtime >= began
        return False

    while process.poll() is None and not fresh:
        fresh = come()
        time.sleep(0.002)
    until = time.monotonic() + delay
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    return fresh and process.poll() is None


def clear(tag: str) -> list[str]:
    """What is left `GONE` seconds later, as command lines; it is killed then."""
    until = time.monotonic() + GONE
    while (left := small.survivors(tag)) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return sorted(left.values())


def episode(
    calm: small.Calm, folder: Path, number: int, seed: int, judge: small.Judge, kills: int, say: Any
) -> dict[str, Any]:
    """One stage, killed up to ``kills`` times, ended, compared; a line for ``kills.jsonl``."""
    random_ = random.Random(f"{seed}, {number}, {calm.ranks}")
    # Every stage comes in turn, in another order each round.
    order = random.Random(f"{seed}, {number // len(small.STAGES)}").sample(small.STAGES, len(small.STAGES))
    stage = order[number % len(small.STAGES)]
    following = small.STAGES[small.STAGES.index(stage) + 1 :][: random_.random() < 0.3]
    stages, run, tag = [stage, *following], calm.folder(folder), f"episode{seed}-{number}-{calm.ranks}"
    calm.begin_at(stage, run)
    asked, seen, sent_again = len(judge.answers), [], False
    more = [*calm.more, f"stages=[{','.join(stages)}]"]
    (run.parent / "said.txt").unlink(missing_ok=True)
    deaths: list[float] = []
    for attempt in range(3 * kills):
        if len(seen) >= kills:
            break
        moment = random_.choices(list(MOMENTS), MOMENTS.values())[0]
        mode = random_.choices(list(MODES), MODES.values())[0]
        target = next((one for one in stages if not (run / one / "done.json").is_file()), stages[-1])
        if moment == "start" and not sent_again:
            (run / "cache" / "checked.json").unlink(missing_ok=True)  # the look at the settings is killed, too
        words = run.parent / "said.txt"
        length = words.stat().st_size if words.is_file() else 0
        process = small.start(run.parent, judge.url, tag, *more)
        sent_again = False
        there = wait_for(process, run, target, moment, random_, calm.seconds(target))
        if not there and process.poll() is not None:
            if process.returncode == 0:
                break
            seen.append({"attempt": attempt, "unasked": words.read_bytes()[length:].decode(errors="replace")[-400:]})
            continue
        mode, sent = send(process, tag, mode, random_), time.monotonic()
        deaths.append(time.monotonic())
        line = {"stage": target, "moment": moment, "mode": mode, "orphans": [], "hang": False, "unsaid": ""}
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            line["hang"] = True
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        line["code"], said = process.returncode, words.read_bytes()[length:].decode(errors="replace")
        if process.returncode in (1, 2) and "same command" not in said:
            line["unsaid"] = said[-400:]
        sent_again = mode.endswith("again at once")
        if not sent_again:
            line["orphans"] = clear(tag)
        line["took"] = round(time.monotonic() - sent, 1)
        if process.returncode == 0 and mode.startswith("command") and time.monotonic() - sent > HEEDED:
            line["unsaid"] = f"{mode} was not heeded: the command went on for {line['took']} s and ended with 0"
        seen.append(line)
        say(f"  {line['mode']} of {target}, {moment}: ended with {line['code']} in {line['took']:.0f} s")
    code, words = small.whole(run.parent, judge.url, tag, *more)
    said = (run.parent / "said.txt").read_text(errors="replace") + words
    found = {"episode": number, "seed": seed, "ranks": calm.ranks, "stages": stages, "kills": seen, "end": code}
    found |= {"source": source_hash(), "tracebacks": said.count("Traceback (most recent"), "lost": [], "leftovers": []}
    if code == 0:
        found["lost"] = small.different(calm.expected, small.bits(run), stages)
        found["leftovers"] = small.leftovers(run)
    else:
        found["lost"] = [f"the last command ended with {code}: {words[-500:]}"]
    found["orphans"] = clear(tag)
    found |= paid_twice(judge, asked, deaths)
    if "compare" in stages and len(judge.answers) - asked < calm.price:
        found["lost"].append("fewer replies were asked for than the undisturbed run's")
    return found


def paid_twice(judge: small.Judge, since: int, deaths: list[float]) -> dict[str, int]:
    """Questions asked again whose answer had been sent half a second before a kill (lost), or at it (on the way).

    What is on its way when a process is killed has been billed and was not received: nobody can avoid that.
    """
    sent: dict[str, float] = {}
    lost = on_the_way = 0
    for question, when in judge.answers[since:]:
        if question in sent:
            near = any(sent[question] > death - 0.5 for death in deaths if sent[question] < death + 5.0)
            on_the_way += near
            lost += not near
        sent[question] = when
    return {"paid_twice": lost, "on_the_way": on_the_way}


def campaign(
    folder: Path, seed: int, kills: int, ranks: int, minutes: float = 1e9, say: Any = print
) -> dict[str, Any]:
    """Episodes until there were so many kills, or the time is over; what ``kills.jsonl`` then holds, added up.

    Args:
        folder: where runs are made and what was seen is kept.
        seed: of stages, moments, modes and victims.
        kills: how many in all, those of earlier calls on this folder included.
        ranks: processes of each training stage.
        minutes: stop after so many.
    """
    book, began = folder / "kills.jsonl", time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(small.judge_of(folder)) as judge:
        calm = small.calm(folder, judge, ranks, say)
        while True:
            rows = [row for row in (read_jsonl(book) if book.is_file() else []) if row["ranks"] == ranks]
            done, number = (
                tally(rows)["kills"],
                1 + max((row["episode"] for row in rows if row["seed"] == seed), default=-1),
            )
            if done >= kills or time.monotonic() - began > 60 * minutes:
                break
            say(f"episode {number}, ranks {ranks}: {done} of {kills} kills so far")
            row = episode(calm, folder, number, seed, judge, min(KILLS_OF_AN_EPISODE, kills - done), say)
            append_jsonl(book, row)
            bad = {key: row[key] for key in ("lost", "orphans", "leftovers", "paid_twice", "tracebacks") if row[key]}
            if bad or any(one.get(key) for one in row["kills"] for key in ("orphans", "hang", "unsaid", "unasked")):
                say(f"  NOT as it should be: {bad} {row['kills']}")
                kept = folder / f"bad-{ranks}-{number}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(calm.folder(folder).parent, kept, symlinks=True)
    return tally(rows)


def tally(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Episodes added up: kills, their stages, modes and moments, and what each bar counts."""
    kills = [kill | {"ranks": row["ranks"]} for row in rows for kill in row["kills"] if "mode" in kill]
    unasked = [kill["unasked"] for row in rows for kill in row["kills"] if "unasked" in kill]
    return {
        "kills": len(kills),
        "episodes": len(rows),
        "stages": dict(Counter(kill["stage"] for kill in kills)),
        "modes": dict(Counter(kill["mode"] for kill in kills)),
        "moments": dict(Counter(kill["moment"] for kill in kills)),
        "slowest": max((kill["took"] for kill in kills), default=0.0),
        "lost": [f"{row['stages']}: {one}" for row in rows for one in row["lost"]],
        "orphans": [one for row in rows for one in row["orphans"]] + [o for kill in kills for o in kill["orphans"]],
        "hangs": [f"{kill['stage']}, {kill['mode']}" for kill in kills if kill["hang"]],
        "leftovers": [one for row in rows for one in row["leftovers"]],
        "paid_twice": sum(row["paid_twice"] for row in rows),
        "on_the_way": sum(row["on_the_way"] for row in rows),
        "tracebacks": sum(row["tracebacks"] for row in rows),
        "unsaid": [kill["unsaid"] for kill in kills if kill["unsaid"]] + unasked,
    }
