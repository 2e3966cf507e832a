"""Files of a finished run spoilt in four ways: the same command names the fault or makes it again, the same bits."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.compare.server import Server
from tests.faults import small
from tests.faults.kills import verdict

FILES = (
    "config.yaml", "manifest.json",
    *(f"{stage}/{marker}" for stage in ("data", "sft", "pairs", "dpo", "ppo", "compare")
      for marker in ("done.json", "started.json")),
    "data/prompts_heldout.parquet", "data/sft_train.parquet", "pairs/train.parquet",
    "sft/model/model.safetensors", "ppo/model/model.safetensors", "dpo/model/config.json",
    "reward_model/model/model.safetensors", "compare/report.html", "compare/report.json",
    "compare/completions.parquet",
    "cache/digests.json", "cache/judge_replies.jsonl",
)  # fmt: skip
WAYS: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: max(1, path.stat().st_size // 2)]),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00\x01" * 16),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def campaign(folder: Path, some: int | None = None, say=print) -> dict[str, list[str]]:
    """Spoil one file at a time.

    Args:
        folder: where runs are made.
        some: only every so many-th case.

    Returns:
        ``tracebacks``, ``refused`` (named in a sentence, with the run as it was), ``other`` (another result) and
        ``mended`` (the same bits), each a list of cases.
    """
    found: dict[str, list[str]] = {"mended": [], "refused": [], "other": [], "tracebacks": []}
    with contextlib.closing(Server(verdict)) as judge:
        code, words = small.whole(folder / "whole", judge.url, "spoilt")
        assert code == 0, words
        expected = small.bits(folder / "whole" / "quickstart")
        cases = [(name, way) for name in FILES for way in WAYS][:: some or 1]
        for name, way in cases:
            out = folder / "spoilt"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(folder / "whole", out, symlinks=True)
            path = out / "quickstart" / name
            if not path.is_file():
                continue
            WAYS[way](path)
            code, words = small.whole(out, judge.url, "spoilt")
            case = f"{name}, {way}"
            if "Traceback (most recent" in words:
                found["tracebacks"].append(case)
            elif code != 0:
                found["refused"].append(f"{case}: {words.strip().splitlines()[-1][:120]}")
            else:
                same = small.bits(out / "quickstart") == expected
                found["mended" if same else "other"].append(case)
            say(f"{case}: exit {code}")
    return found
