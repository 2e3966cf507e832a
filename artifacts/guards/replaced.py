"""Results that another configuration took the place of: moved aside in one step, kept, and found again.

A stage that runs again under other settings never works in the old one's folder, and never deletes what was finished:
the folder is renamed to ``.replaced/<stage>-<number>``, which either has happened or has not. The earlier settings
bring it back without work.
"""

import glob
import shutil
from pathlib import Path

from ppo_vs_dpo.artifacts.files import read_marker

FOLDER = ".replaced"
# A folder under this name is being deleted.
GOING = ".going"


def worth_keeping(folder: Path) -> bool:
    """Whether something in a stage's folder took work: its end, or a checkpoint."""
    return (folder / "done.json").exists() or any(folder.glob("checkpoints/checkpoint-*"))


def move_aside(root: Path, name: str, folder: Path) -> Path | None:
    """Take a stage's folder out of the way by renaming it.

    Returns:
        Where it is kept; ``None`` where there was none, or nothing in it took work (it is then deleted).
    """
    if not folder.exists():
        return None
    kept = worth_keeping(folder)
    place = root / FOLDER
    place.mkdir(exist_ok=True)
    number = 1
    while (target := place / f"{name}-{number}" if kept else place / f"{GOING}-{number}").exists():
        number += 1
    folder.rename(target)
    if not kept:
        shutil.rmtree(target, ignore_errors=True)
        remove_if_empty(place)
    return target if kept else None


def find(root: Path, name: str, fingerprint: str) -> Path | None:
    """An earlier result of a stage that was made from just this, whether it had finished or not; the newest."""
    candidates = []
    for folder in (root / FOLDER).glob(f"{glob.escape(name)}-*"):
        number = folder.name[len(name) + 1 :]
        marker = read_marker(folder / "done.json") or read_marker(folder / "started.json") or {}
        if number.isdigit() and marker.get("fingerprint") == fingerprint:
            candidates.append(((folder / "done.json").is_file(), int(number), folder))
    return max(candidates)[2] if candidates else None


def unfinished(root: Path, name: str, fingerprint: str | None) -> Path | None:
    """An attempt at just this that was moved aside before it had finished."""
    kept = find(root, name, fingerprint) if fingerprint is not None else None
    return kept if kept is not None and not (kept / "done.json").is_file() else None


def displaced(root: Path, name: object) -> Path | None:
    """The finished result under this name in ``.replaced``, if there is one."""
    place = root / FOLDER / name if isinstance(name, str) and name else None
    return place if place is not None and (place / "done.json").is_file() else None


def bring_back(root: Path, name: str, kept: Path, folder: Path) -> Path | None:
    """Put an earlier result in its place again; what stands there is moved aside. Returns where that is now."""
    aside = move_aside(root, name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    kept.rename(folder)
    remove_if_empty(root / FOLDER)
    return aside


def sweep_up(root: Path) -> None:
    """Finish what a killed command had begun to delete, and remove what it was writing (`files.atomic_path`).

    Whoever calls holds the run: nobody works in it.
    """
    for path in list(root.rglob(".*.tmp")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for folder in (root / FOLDER).glob(f"{GOING}-*"):
        shutil.rmtree(folder, ignore_errors=True)
    remove_if_empty(root / FOLDER)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
