"""A log of finished steps: appended to and brought to the disk step by step, read back line by line after a crash."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import sha256_of
from ppo_vs_dpo.artifacts.run import RunFolder


class StepLog:
    """Lines of JSON that a killed run leaves whole, but for the last one, which is then done again.

    The ``identity``, what the steps depend on, is in the file's name: no second file can be lost or say otherwise, and
    take with it what was paid for.
    """

    def __init__(self, path: Path, identity: Any):
        self.path, self._file = path.with_name(f"{path.stem}-{sha256_of(identity)[:12]}{path.suffix}"), None

    @classmethod
    def of(cls, run: RunFolder, what: str, split: str, identity: Any) -> "StepLog":
        """A run's log of the steps of one split, kept beside the stages under a name made of what they depend on.

        Steps take hours, and where a model at an endpoint did them they were paid for: a setting on which they do not
        depend changes nothing here, and going back to earlier settings finds theirs.
        """
        return cls(run.cache("pairs", f"{what}_{split}.jsonl"), identity)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add finished steps. They outlive this process at once, and a power cut after `sync`."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab+")
            if self._file.tell() > 0:
                self._file.seek(-1, os.SEEK_END)
                if self._file.read(1) != b"\n":  # torn by a crash: the next step starts on a line of its own
                    self._file.write(b"\n")
        for row in rows:
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Bring what was appended to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Finished steps, one at a time: the log may be larger than the memory."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                except ValueError:
                    # Torn by a crash. Its step is done again.
                    continue
                if not isinstance(row, dict):
                    raise UserError(f"{self.path}, line {number}: not a step. Delete the file and start again.")
                yield row
