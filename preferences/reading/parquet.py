"""Parquet tables of pairs, prompts and examples, written as the rows come: memory does not grow with the data set."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ppo_vs_dpo.artifacts.files import atomic_path
from ppo_vs_dpo.preferences.schema import OPTIONAL_NUMBERS, OPTIONAL_TEXTS

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_CHUNK = 2_000


def text_type(conversational: bool) -> pa.DataType:
    """Arrow type of a prompt or response."""
    return MESSAGES if conversational else pa.string()


def pair_schema(conversational: bool, *extra: tuple[str, pa.DataType]) -> pa.Schema:
    """Columns of a pair set."""
    text = text_type(conversational)
    return pa.schema(
        [
            *((name, text) for name in ("prompt", "chosen", "rejected")),
            ("prompt_id", pa.string()),
            ("pair_id", pa.string()),
            *((name, pa.float64()) for name in OPTIONAL_NUMBERS),
            *((name, pa.string()) for name in OPTIONAL_TEXTS),
            *extra,
        ]
    )


def prompt_schema(conversational: bool, *extra: tuple[str, pa.DataType]) -> pa.Schema:
    """Columns of a prompts file."""
    return pa.schema([("prompt", text_type(conversational)), ("prompt_id", pa.string()), *extra])


def example_schema(conversational: bool) -> pa.Schema:
    """Columns of SFT examples."""
    text = text_type(conversational)
    return pa.schema([("prompt", text), ("completion", text)])


class TableWriter:
    """Writes rows to a Parquet file that is there only once it is whole.

    Args:
        path: the file.
        schema: its columns; a row may lack some of them (null) and have others (ignored).
    """

    def __init__(self, path: Path, schema: pa.Schema):
        self.path, self.schema, self.rows, self._buffer = path, schema, 0, []
        self._atomic = atomic_path(path)

    def __enter__(self) -> "TableWriter":
        self._writer = pq.ParquetWriter(self._atomic.__enter__(), self.schema, compression="zstd")
        return self

    def write(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self._buffer.append(row)
        self.rows += 1
        if len(self._buffer) >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        if self._buffer:
            self._writer.write_table(pa.Table.from_pylist(self._buffer, schema=self.schema))
            self._buffer = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._writer.close()
            self._atomic.__exit__(kind, error, trace)


def read_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, a chunk at a time."""
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=_CHUNK, columns=columns):
            yield from batch.to_pylist()


def without_empty_columns(path: Path, columns: Iterable[str]) -> None:
    """Take the columns out of a file that hold nothing in any row (a ``margin`` that no source gave)."""
    with pq.ParquetFile(path) as table:
        names, rows = table.schema_arrow.names, table.metadata.num_rows
        empty = [name for name in columns if name in names and table.read([name])[name].null_count == rows]
        if not empty or not rows:
            return
        kept = [name for name in names if name not in empty]
        schema = pa.schema([table.schema_arrow.field(name) for name in kept])
        with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as out:
            for batch in table.iter_batches(batch_size=_CHUNK, columns=kept):
                out.write_batch(batch)
