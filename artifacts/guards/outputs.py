"""What a finished stage vouches for: its files, their sizes and their hashes.

``done.json`` lists them. Sizes are looked at whenever somebody asks whether the stage is done; hashes by
``ppo-vs-dpo verify``. A stage whose outputs are gone or cut is not done, whatever its marker says.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.files import fingerprint_file

# Beside the outputs: what a stage keeps for itself, what others keep beside it, and what it says while it works.
NOT_OUTPUTS = frozenset({"started.json", "done.json", "progress.json", "spent.json", "log.txt", "pushed.json"})
NOT_OUTPUT_FOLDERS = frozenset(
    {"checkpoints", "tensorboard", "tokens", "reference_logprobs", "completions", "pulse", "staging", "wandb", "runs"}
)


def output_files(folder: Path) -> Iterator[Path]:
    """The files of a stage's folder that are its result, sorted."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        if not path.is_file() or path.name.startswith(".") or NOT_OUTPUT_FOLDERS.intersection(inside[:-1]):
            continue
        if len(inside) > 1 or not (path.name in NOT_OUTPUTS or path.name.endswith((".unreadable", ".failed.txt"))):
            yield path


def list_outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """`listed` of a stage's result."""
    return listed(folder, output_files(folder))


def listed(folder: Path, paths: Iterable[Path], hashed: float = math.inf) -> dict[str, dict[str, Any]]:
    """``{name: {bytes, sha256}}`` of files in a folder; of those with more bytes than ``hashed`` no hash."""
    found = {}
    for path in paths:
        size = path.stat().st_size
        digest = fingerprint_file(path) if size <= hashed else None
        found[path.relative_to(folder).as_posix()] = {"bytes": size, "sha256": digest}
    return found


def damage(folder: Path, outputs: Any, hashes: bool = False) -> list[str]:
    """What is wrong with files that `listed` listed, a few words each; empty where all is as it was written.

    With ``hashes`` every byte is read, too.
    """
    if not isinstance(outputs, dict) or not all(_is_entry(written) for written in outputs.values()):
        return ["its list of files cannot be read"]
    found = []
    for name, written in outputs.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is gone")
        elif path.stat().st_size != written["bytes"]:
            found.append(f"{name} has {path.stat().st_size} bytes and was written with {written['bytes']}")
        elif hashes and written["sha256"] and fingerprint_file(path) != written["sha256"]:
            found.append(f"{name} was changed after it was written")
    return found


def _is_entry(written: Any) -> bool:
    return isinstance(written, dict) and isinstance(written.get("bytes"), int) and "sha256" in written


def content_id(done: dict[str, Any], within: str = "") -> str:
    """Hash of a finished stage's result, or of the part of it ``within`` a folder (``"model/"``).

    Two stages that wrote the same bytes have the same: what was made from one can be used with the other.
    """
    listed = sorted(
        (name, written["sha256"]) for name, written in (done.get("outputs") or {}).items() if name.startswith(within)
    )
    # A marker without a list (written by hand, or by a test) is known by what it says.
    return hashlib.sha256(repr(listed or [done.get("fingerprint"), done.get("finished")]).encode()).hexdigest()
