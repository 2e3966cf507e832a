"""Disks that are full at a random write: one sentence, nothing lost, and with room again the same bits.

The run lies on a small `tmpfs` with room for so many bytes more than what was there, drawn at random; the kernel
refuses the write that needs more. Mounting needs root, or a user namespace of one's own (``unshare``).
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.files import append_jsonl, read_jsonl
from ppo_vs_dpo.artifacts.guards.versions import source_hash
from tests.faults import small

PAGE = 4096
ROOM = 400 << 20


def possible() -> bool:
    """Whether this process may mount."""
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount") is not None


def in_a_namespace(arguments: list[str]) -> list[str] | None:
    """The command line that runs this program where it may mount; ``None`` where there is no such place."""
    words = ["unshare", "--map-root-user", "--mount"]
    if shutil.which(words[0]) is None or subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        return None
    return [*words, sys.executable, "-m", "tests.faults", *arguments]


def pages(folder: Path) -> int:
    """Bytes that a folder takes on a tmpfs."""
    found = 0
    for path in folder.rglob("*"):
        size = path.lstat().st_size if path.is_file() else 1
        found += PAGE * (1 + (size - 1) // PAGE if size else 1)
    return found


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A tmpfs of so many bytes while the block runs."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(calm: small.Calm, folder: Path, number: int, seed: int, judge: small.Judge) -> dict[str, Any]:
    """One stage on a disk that gets full at a random byte of what it writes."""
    random_ = random.Random(f"{seed}, {number}")
    order = random.Random(f"{seed}, {number // len(small.STAGES)}").sample(small.STAGES, len(small.STAGES))
    stage, run = order[number % len(small.STAGES)], calm.folder(folder)
    calm.begin_at(stage, run)
    before = folder / "before"
    shutil.rmtree(before, ignore_errors=True)
    run.parent.rename(before)
    writes = pages(calm.root / stage)
    room = random_.randrange(writes)
    found: dict[str, Any] = {"number": number, "seed": seed, "stage": stage, "room": room, "of": writes}
    found |= {"source": source_hash(), "lost": [], "traceback": False}
    more = [*calm.more, f"stages=[{stage}]"]
    with small_disk(run.parent, ROOM):
        shutil.copytree(before / "quickstart", run, symlinks=True)
        size = pages(run.parent) + 16 * PAGE + room
        subprocess.run(["mount", "-o", f"remount,size={size}", str(run.parent)], check=True)
        code, words = small.whole(run.parent, judge.url, f"disk{number}", *more)
        found |= {"code": code, "said": "disk is full" in words, "words": words.strip()[-300:]}
        found["traceback"] = "Traceback (most recent" in words
        found["leftovers"] = small.leftovers(run)
        subprocess.run(["mount", "-o", f"remount,size={ROOM}", str(run.parent)], check=True)
        again, words = small.whole(run.parent, judge.url, f"disk{number}", *more)
        found["traceback"] |= "Traceback (most recent" in words
        found["again"] = again
        found["lost"] = small.different(calm.expected, small.bits(run), [stage]) if again == 0 else [words[-300:]]
        found["leftovers"] += small.leftovers(run)
    return found


def bad(row: dict[str, Any]) -> bool:
    """Whether a full disk was not what it should be: a sentence, and then the same bits."""
    well = row["code"] == 0 or (row["code"] == 2 and row["said"])
    return bool(not well or row["traceback"] or row["again"] or row["lost"] or row["leftovers"])


def campaign(
    folder: Path, seed: int, number: int, minutes: float = 1e9, say: Callable[[str], object] = print
) -> list[dict[str, Any]]:
    """So many full disks, those of ``disks.jsonl`` included; all of them.

    Args:
        folder: where runs are made and what was seen is kept.
        seed: of stages and sizes.
        number: how many in all.
        minutes: stop after so many.
    """
    book, began = folder / "disks.jsonl", time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(small.judge_of(folder)) as judge:
        calm = small.calm(folder, judge, 1, say)
        while True:
            rows = read_jsonl(book) if book.is_file() else []
            if len(rows) >= number or time.monotonic() - began > 60 * minutes:
                return rows
            following = 1 + max((row["number"] for row in rows if row["seed"] == seed), default=-1)
            row = fill(calm, folder, following, seed, judge)
            append_jsonl(book, row)
            say(f"disk full {following}: {row['stage']} after {row['room']:,} of {row['of']:,} bytes: {row['code']}")
            if bad(row):
                say(f"  NOT as it should be: {row}")
