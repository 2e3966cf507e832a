"""Files of a run spoilt one at a time: the same command names the fault or mends it, and ends with the same bits.

Of a finished run: markers, tables, models, reports, caches. Of a stage that was killed: every file of its newest
checkpoint. A byte changed in place is what `ppo-vs-dpo verify` is for.
"""

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ppo_vs_dpo.artifacts.files import append_jsonl, read_jsonl
from ppo_vs_dpo.artifacts.guards.checkpoints import numbered
from ppo_vs_dpo.artifacts.guards.versions import source_hash
from tests.faults import small


def change_a_byte(path: Path) -> None:
    """One bit in the middle, the size as it was."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


WAYS: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00\x01" * 16),
    "a list": lambda path: path.write_text("[1, 2]\n"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a byte": change_a_byte,
}


@dataclass(frozen=True)
class Case:
    """A file and a way to spoil it.

    Attributes:
        name: the file, in the run; of a checkpoint, in it.
        way: one of `WAYS`.
        stage: whose newest checkpoint, where the stage was killed after it; empty for a finished run.
    """

    name: str
    way: str
    stage: str = ""

    def __str__(self) -> str:
        return f"{f'{self.stage}, newest checkpoint: ' if self.stage else ''}{self.name}, {self.way}"


def cases() -> list[Case]:
    """All 66 of them."""
    last = small.STAGES[-1]
    finished = [
        ("config.yaml", ("deleted", "binary", "a list", "a folder")),
        ("manifest.json", ("deleted", "cut", "a folder")),
        ("data/done.json", ("a list", "cut")),
        ("sft/done.json", ("binary",)),
        ("pairs/done.json", ("a folder",)),
        ("dpo/done.json", ("emptied",)),
        ("ppo/done.json", ("deleted",)),
        (f"{last}/done.json", ("cut", "a list", "binary")),
        ("data/started.json", ("binary",)),
        ("reward_model/started.json", ("a folder",)),
        (f"{last}/started.json", ("deleted", "cut", "a list")),
        ("data/prompts_heldout.parquet", ("cut", "a folder")),
        ("data/sft_train.parquet", ("deleted",)),
        ("pairs/train.parquet", ("deleted", "binary")),
        ("sft/model/model.safetensors", ("cut",)),
        ("sft/model/tokenizer.json", ("deleted",)),
        ("reward_model/model/model.safetensors", ("emptied",)),
        ("reward_model/metrics.jsonl", ("deleted",)),
        ("dpo/model/config.json", ("a list",)),
        ("ppo/model/model.safetensors", ("deleted", "binary", "a byte")),
        (f"{last}/report.html", ("deleted", "cut", "a folder")),
        (f"{last}/report.json", ("binary", "a byte")),
        (f"{last}/completions.parquet", ("cut", "a byte")),
        ("cache/judge_replies.jsonl", ("cut", "binary", "a folder")),
        ("cache/digests.json", ("cut", "a list")),
        ("cache/checked.json", ("binary", "a folder")),
    ]
    killed = {
        "sft": (("optimizer.pt", "cut"), ("scheduler.pt", "deleted"), ("rng_state.pth", "a byte"),
                ("trainer_state.json", "binary")),
        "reward_model": (("optimizer.pt", "deleted"), ("model.safetensors", "cut"), ("checkpoint.json", "a list")),
        "dpo": (("optimizer.pt", "binary"), ("rng_state.pth", "cut"), ("scheduler.pt", "a folder"),
                ("trainer_state.json", "cut"), ("checkpoint.json", "deleted")),
        "ppo": (("model.safetensors", "binary"), ("trainer_state.json", "a list"), ("checkpoint.json", "cut"),
                ("ppo_state.json", "emptied"), ("ppo_state.safetensors", "cut"), ("rng_0.safetensors", "deleted")),
    }  # fmt: skip
    found = [Case(name, way) for name, ways in finished for way in ways]
    found += [Case(name, way, stage) for stage, files in killed.items() for name, way in files]
    return found


def state_of(path: Path) -> bytes | str:
    """A file's bytes, or what stands in its place."""
    return path.read_bytes() if path.is_file() else "a folder" if path.is_dir() else "nothing"


def spoil(case: Case, calm: small.Calm, run: Path) -> None:
    """Make the run in which one file is spoilt."""
    if not case.stage:
        shutil.rmtree(run.parent, ignore_errors=True)
        shutil.copytree(calm.root, run, symlinks=True)
        WAYS[case.way](run / case.name)
        return
    calm.begin_at(case.stage, run)
    folder = run / case.stage
    shutil.copytree(calm.root / case.stage, folder, symlinks=True)
    (folder / "done.json").unlink()
    shutil.rmtree(folder / "model")
    newest = numbered(folder / "checkpoints")[0]
    WAYS[case.way](newest / case.name)


def look(case: Case, calm: small.Calm, run: Path, judge: small.Judge) -> dict[str, str]:
    """Spoil one file, give the same command again, and say what became of it.

    Returns:
        ``end``: ``mended`` (the same bits), ``named`` (refused in a sentence that names the file, or `verify` named
        it), ``traceback``, ``unseen`` (other bits, and not a word) or ``other``.
    """
    spoil(case, calm, run)
    spoilt = state_of(run / case.name)
    last = case.stage or small.STAGES[-1]
    stages = list(small.STAGES[: small.STAGES.index(last) + 1])
    more = [*calm.more, f"stages=[{','.join(stages)}]"]
    where = Path(case.name).name
    if case.way == "a byte" and not case.stage:
        program = [sys.executable, "-m", "ppo_vs_dpo.pipeline.cli", "verify", str(run)]
        ended = subprocess.run(
            program, env=small.environment("spoilt"), capture_output=True, text=True, check=False, timeout=600
        )
        named = ended.returncode == 1 and where in ended.stdout
        return {"end": "named" if named else "unseen", "words": (ended.stdout + ended.stderr)[-300:]}
    asked = len(judge.answers)
    code, words = small.whole(run.parent, judge.url, "spoilt", *more)
    again = len(judge.answers) - asked
    if "Traceback (most recent" in words:
        return {"end": "traceback", "words": words[-600:]}
    if code != 0:
        # The folder's own words and the sentence's both count, as long as the file is named.
        return {"end": "named" if where.split(".")[0] in words else "other", "words": words.strip()[-300:]}
    lost = small.different(calm.expected, small.bits(run), stages)
    if lost:
        return {"end": "other" if where in words else "unseen", "words": f"{lost[:4]} {words[:300]}"}
    if again and "judge_replies" not in case.name:
        return {"end": "other", "words": f"{again} replies were asked for again"}
    path = run / case.name
    if not case.stage and not case.name.startswith("cache/") and where not in words and spoilt == state_of(path):
        return {"end": "unseen", "words": f"{case.name} is as it was spoilt"}
    return {"end": "mended", "words": next((line for line in words.splitlines() if where in line), "")[:200]}


def campaign(
    folder: Path, minutes: float = 1e9, only: list[Case] | None = None, say: Callable[[str], object] = print
) -> dict[str, list[str]]:
    """Every case that ``spoilt.jsonl`` does not hold yet, until the time is over; what that file then holds.

    Args:
        folder: where runs are made and what was seen is kept.
        minutes: stop after so many.
        only: these cases; all of them where not given.
    """
    book, began, source = folder / "spoilt.jsonl", time.monotonic(), source_hash()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(small.judge_of(folder)) as judge:
        calm = small.calm(folder, judge, 1, say)
        known = {row["case"] for row in read_jsonl(book)} if book.is_file() else set()
        for case in only or cases():
            if str(case) in known or time.monotonic() - began > 60 * minutes:
                continue
            try:
                row = look(case, calm, calm.folder(folder), judge)
            except subprocess.TimeoutExpired:
                row = {"end": "other", "words": "it did not end"}
            append_jsonl(book, {"case": str(case), "source": source, **row})
            say(f"{case}: {row['end']}. {row['words'] if row['end'] != 'mended' else ''}")
    found: dict[str, list[str]] = {"mended": [], "named": [], "other": [], "unseen": [], "traceback": []}
    for row in read_jsonl(book):
        found[row["end"]].append(row["case"])
    return found
