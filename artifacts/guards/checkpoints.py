"""Which checkpoint a stage may go on from: one that is whole, and made with just these settings.

The last file of a checkpoint is ``checkpoint.json``: the stage's fingerprint, and size and hash of every other file.
One without it was being written when the process died; one whose files are gone, cut or changed is said by name, set
aside, and the one before it is taken. One that was never finished holds nothing that anybody could go on from, and as
many bytes as a whole one: it is deleted.
"""

import shutil
from pathlib import Path

from ppo_vs_dpo.artifacts.errors import warn
from ppo_vs_dpo.artifacts.files import read_marker, write_json
from ppo_vs_dpo.artifacts.guards.outputs import damage, listed

STAMP = "checkpoint.json"
# A checkpoint under this name is being deleted.
UNFINISHED = "unfinished-"
# Larger files are known by their size, and by whether they load: hashing them would double what a checkpoint costs.
HASHED = 64 << 20


def stamp(folder: Path, fingerprint: str | None, resumable: bool = True) -> None:
    """Say that a checkpoint is whole, and of which settings.

    A ``resumable`` one holds the optimizer's state, not the model alone.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != STAMP)
    made = {"fingerprint": fingerprint, "resumable": resumable, "files": listed(folder, files, HASHED)}
    write_json(folder / STAMP, made)


def why_not(folder: Path, fingerprint: str | None) -> str | None:
    """Why a stage cannot go on from a checkpoint, in a few words; ``None`` where it can."""
    written = read_marker(folder / STAMP, keys={"files": dict}, strict=True)
    if written is None:
        return f"its {STAMP} is gone or cannot be read"
    if written.get("fingerprint") != fingerprint:
        return "it was made with other settings"
    if not written.get("resumable", True):
        return "it holds the model alone (save_only_model)"
    return next(iter(damage(folder, written["files"], hashes=True)), None)


def numbered(root: Path) -> list[Path]:
    """The checkpoints of a stage, newest first, whole or not."""
    found = [path for path in root.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def newest_whole(root: Path, fingerprint: str | None) -> Path | None:
    """The newest checkpoint that a stage may go on from; newer ones that are not fit are said and set aside.

    A checkpoint whose *best* one (by the metric that the run is judged by) is not whole is not fit either: the run
    would end with other weights than it should.
    """
    for folder in root.glob(f"{UNFINISHED}*"):  # a kill came between renaming and deleting
        shutil.rmtree(folder, ignore_errors=True)
    for folder in numbered(root):
        if not (folder / STAMP).exists():
            discard(folder)
            continue
        reason = why_not(folder, fingerprint)
        best = (read_marker(folder / "trainer_state.json", strict=True) or {}).get("best_global_step")
        if reason is None and best and (root / f"checkpoint-{best}") != folder:
            bad = why_not(root / f"checkpoint-{best}", fingerprint)
            reason = f"the best one, checkpoint-{best}, is not whole: {bad}" if bad else None
        if reason is None:
            return folder
        set_aside(folder, reason)
    return None


def discard(folder: Path) -> None:
    """Delete a checkpoint that a kill left half-written: renamed first, so that it is never half there."""
    gone = folder.with_name(f"{UNFINISHED}{folder.name}")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    warn(f"{folder} was not written to its end; it is deleted.\n")


def set_aside(folder: Path, reason: str) -> None:
    """Take a checkpoint out of the way that cannot be gone on from, and say so."""
    number = 1
    while (target := folder.with_name(f"unfit-{number}-{folder.name}")).exists():
        number += 1
    folder.rename(target)
    warn(f"{folder} cannot be gone on from: {reason}. It is now {target.name}.\n")
