"""Hashes of files and folders, remembered as long as size, time and inode stay what they were."""

import contextlib
from pathlib import Path

from ppo_vs_dpo.artifacts.files import fingerprint_file, read_marker, sha256_of, write_json


class Digests:
    """SHA-256 of files; those of a 100-GB model are taken once and not at every start of a command.

    Args:
        path: where they are remembered; ``None`` remembers nothing.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.known = (read_marker(path) or {}) if path is not None else {}
        self.used: dict[str, list] = {}

    def of(self, path: Path) -> str:
        """Hash of a file's bytes, or of names and bytes of everything in a folder."""
        if path.is_dir():
            members = sorted(item for item in path.rglob("*") if item.is_file())
            return sha256_of([[item.relative_to(path).as_posix(), self._file(item)] for item in members])
        return self._file(path)

    def _file(self, path: Path) -> str:
        state = path.stat()
        stamp = [state.st_size, state.st_mtime_ns, state.st_ino]
        name = str(path.resolve())
        kept = self.known.get(name)
        if not (isinstance(kept, list) and len(kept) == 4 and kept[:3] == stamp):
            kept = [*stamp, fingerprint_file(path)]
        self.used[name] = kept
        return kept[3]

    def save(self) -> None:
        """Remember what was used; without a place to write, nothing is lost but time."""
        if self.path is not None and self.used and self.used != self.known:
            with contextlib.suppress(OSError):
                write_json(self.path, self.used)
