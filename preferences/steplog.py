"""A log of finished steps: appended to and brought to the disk step by step, read back line by line after a crash."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from artifacts.errors import UserError
from artifacts.files import append_jsonl, read_json, sha256_of, write_json


class StepLog:
    """Lines of JSON that a killed run leaves whole, but for the last one, which is then done again.

    Args:
        path: the file.
        identity: what the steps depend on. A log made from something else is started anew.
    """

    def __init__(self, path: Path, identity: Any):
        self.path = path
        mark = path.with_suffix(".identity.json")
        wanted = {"made_from": sha256_of(identity)}
        if not mark.is_file() or read_json(mark) != wanted:
            path.unlink(missing_ok=True)
            write_json(mark, wanted)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add finished steps."""
        for row in rows:
            append_jsonl(self.path, row)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Finished steps, one at a time: the log may be larger than the memory."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                except ValueError:
                    # Torn by a crash; append_jsonl closed it before it went on. Its step was done again.
                    continue
                if not isinstance(row, dict):
                    raise UserError(f"{self.path}, line {number}: not a step. Delete the file and start again.")
                yield row
