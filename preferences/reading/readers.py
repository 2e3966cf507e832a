"""Reading rows from files and from the Hub, one at a time, each with the place it came from.

What cannot be read (half a line of JSON, broken UTF-8, a cut-off archive) is yielded as a `Broken` with its place, so
that one pass over a file reports all of it.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ppo_vs_dpo.artifacts.errors import UserError, first_sentence
from ppo_vs_dpo.artifacts.guards.refusals import chain

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_PARQUET_BATCH = 1_000


@dataclass(frozen=True)
class Broken:
    """A row that could not be read: which kind of problem (a key of `reading.validation.PROBLEMS`) and why."""

    kind: str
    detail: str


# Where a row is ("pairs.jsonl, line 7"), and the row.
Placed = tuple[str, "dict[str, Any] | Broken"]


def suffix_of(path: Path) -> str:
    """``.jsonl`` for ``pairs.jsonl`` and ``pairs.jsonl.gz``."""
    name = path.name.removesuffix(".gz")
    return Path(name).suffix.lower()


def is_local(path: str) -> bool:
    """Whether a source is meant as a file or folder: it exists, or looks more like a path than like ``owner/name``."""
    return (
        Path(path).expanduser().exists()
        or path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or suffix_of(Path(path)) in SUFFIXES
    )


def local_files(path: str) -> list[Path]:
    """The data files that a path names: itself, or those in the folder, sorted.

    Raises:
        UserError: it does not exist, holds no data file, or is of a kind that is not read.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(
            f"{path} does not exist. Give a {', '.join(SUFFIXES)} file (.gz too), a folder, or a Hub name."
        )
    if root.is_file():
        if suffix_of(root) not in SUFFIXES:
            raise UserError(
                f"{path}: this kind of file is not read; it must be one of {', '.join(SUFFIXES)} (.gz too)."
            )
        return [root]
    files = sorted(item for item in root.iterdir() if item.is_file() and suffix_of(item) in SUFFIXES)
    if not files:
        raise UserError(f"{path} is a folder without a {', '.join(SUFFIXES)} file.")
    return files


def read_files(path: str) -> Iterator[Placed]:
    """Rows of a file, or of the files of a folder."""
    for file in local_files(path):
        yield from _READERS[suffix_of(file)](file)


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def _lines(file: Path) -> Iterator[tuple[str, str | Broken]]:
    """Lines as text, each decoded by itself: one broken line does not spoil the next."""
    number = 0
    with _open(file) as raw:
        try:
            for number, line in enumerate(raw, start=1):
                try:
                    yield f"{file}, line {number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    detail = f"byte {error.start + 1} of the line is not UTF-8 ({error.reason})"
                    yield f"{file}, line {number}", Broken("broken_utf8", detail)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield f"{file}, after line {number}", Broken("broken_file", f"the archive is cut off or damaged ({error})")


def _from_jsonl(file: Path) -> Iterator[Placed]:
    for place, line in _lines(file):
        if isinstance(line, Broken):
            yield place, line
        elif line.strip():
            yield place, _parse(line)


def _parse(line: str) -> dict[str, Any] | Broken:
    try:
        row = json.loads(line, object_pairs_hook=_once_each)
    except json.JSONDecodeError as error:
        return Broken("broken_json", f"column {error.colno}: {error.msg}")
    except _TwiceError as error:
        return Broken("twice", str(error))
    if not isinstance(row, dict):
        return Broken("wrong_type", f"a JSON object is needed, this is a {type(row).__name__}")
    return row


class _TwiceError(Exception):
    """A name that is there twice."""

    def __init__(self, names: Iterable[str]):
        seen: set[str] = set()
        twice = sorted({name for name in names if name in seen or seen.add(name)})
        super().__init__(f"{', '.join(twice)} is there twice")


def _once_each(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; Python's own reader keeps the last of two equal names without a word."""
    found = dict(items)
    if len(found) < len(items):
        raise _TwiceError(name for name, _ in items)
    return found


def _from_json(file: Path) -> Iterator[Placed]:
    """A list of objects, one object of columns, or (as many ``.json`` files are) one object a line."""
    with _open(file) as raw:
        try:
            text = raw.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield f"{file}, byte {error.start + 1}", Broken("broken_utf8", error.reason)
            return
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield str(file), Broken("broken_file", f"the archive is cut off or damaged ({error})")
            return
    try:
        content = json.loads(text, object_pairs_hook=_once_each)
    except _TwiceError as error:
        yield str(file), Broken("twice", str(error))
        return
    except json.JSONDecodeError as error:
        first = text.lstrip()[:1]
        if first == "{" and "\n" in text.strip():
            yield from _from_jsonl(file)
        else:
            yield f"{file}, line {error.lineno}", Broken("broken_json", f"column {error.colno}: {error.msg}")
        return
    if isinstance(content, dict) and any(not isinstance(value, list) for value in content.values()):
        content = [content]
    if isinstance(content, dict):
        yield from from_columns(content, str(file))
    elif isinstance(content, list):
        for number, row in enumerate(content, start=1):
            is_row = isinstance(row, dict)
            yield (
                f"{file}, item {number}",
                row if is_row else Broken("wrong_type", f"an object is needed, this is a {type(row).__name__}"),
            )
    else:
        yield str(file), Broken("wrong_type", f"a list of objects is needed, this is a {type(content).__name__}")


def from_columns(columns: dict[str, list], where: str) -> Iterator[Placed]:
    """Rows of ``{"prompt": [...], "chosen": [...], ...}``.

    Raises:
        UserError: the columns differ in length.
    """
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UserError(f"{where}: the columns differ in length ({found}). Each pair needs an entry in every column.")
    for number, values in enumerate(zip(*columns.values(), strict=True), start=1):
        yield f"{where}, item {number}", dict(zip(columns, values, strict=True))


def _from_csv(file: Path) -> Iterator[Placed]:
    def decoded() -> Iterator[str]:
        for place, line in _lines(file):
            if isinstance(line, Broken):
                raise _BrokenLineError(place, line)
            yield line

    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(decoded(), strict=True)
    try:
        names = list(reader.fieldnames or ())
        if len(set(names)) < len(names):
            yield f"{file}, line 1", Broken("twice", str(_TwiceError(names)))
            return
        for row in reader:
            place = f"{file}, line {reader.line_num}"
            if None in row:
                yield place, Broken("wrong_type", f"{len(row[None])} more fields than the header has")
            elif None in row.values():
                missing = ", ".join(name for name, value in row.items() if value is None)
                yield place, Broken("missing_field", f"fewer fields than the header has; no {missing}")
            else:
                yield place, row
    except _BrokenLineError as error:
        # Where a quoted field goes over several lines, no later line can be trusted.
        yield error.place, error.broken
    except csv.Error as error:
        yield f"{file}, line {reader.line_num}", Broken("broken_file", f"not CSV from here on ({error})")


class _BrokenLineError(Exception):
    def __init__(self, place: str, broken: Broken):
        self.place, self.broken = place, broken


def _from_parquet(file: Path) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # Parquet is read from its end: an archive of it is unpacked in memory.
        content = io.BytesIO(gzip.decompress(file.read_bytes())) if file.suffix == ".gz" else file
        with pyarrow.parquet.ParquetFile(content) as table:
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                yield str(file), Broken("twice", str(_TwiceError(names)))
                return
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield str(file), Broken("broken_file", f"the archive is cut off or damaged ({error})")
    except (pyarrow.ArrowInvalid, OSError) as error:
        first = first_sentence(error)
        yield f"{file}, after row {number}", Broken("broken_file", f"not a complete Parquet file ({first})")


_READERS = {".jsonl": _from_jsonl, ".json": _from_json, ".csv": _from_csv, ".parquet": _from_parquet}


def read_hub(
    name: str, split: str, subset: str | None = None, revision: str | None = None, streaming: bool = False
) -> Iterator[Placed]:
    """Rows of a data set on the Hub.

    Args:
        streaming: read while downloading, keep nothing on disk; for sets larger than the disk or the patience.

    Raises:
        UserError: gated, not found, unreachable, or no such split; says what to do.
    """
    from datasets import load_dataset

    try:
        rows: Iterable = load_dataset(name, subset, split=split, revision=revision, streaming=streaming)
        for number, row in enumerate(rows, start=1):
            yield f"{name}, {split} row {number}", row
    except UserError:
        raise
    except Exception as error:
        explained = explain_hub_error(error, name)
        if explained is None:
            raise
        raise UserError(explained) from error


def read_any(path: str, split: str = "train", **hub: Any) -> Iterator[Placed]:
    """Rows of a file, a folder or a data set on the Hub; ``split`` and ``hub`` are for `read_hub`."""
    return read_files(path) if is_local(path) else read_hub(path, split, **hub)


def whole_rows(path: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows as `read_any` has them, none of them broken.

    Raises:
        UserError: the first that cannot be read; names its place.
    """
    for place, row in read_any(path, split):
        if isinstance(row, Broken):
            raise UserError(f"{place}: {row.detail}.")
        yield place, row


def explain_hub_error(error: BaseException, name: str) -> str | None:
    """One sentence for what went wrong at the Hub, or ``None`` for a defect of this program."""
    causes = list(chain(error))
    # By name: the HTTP client below huggingface_hub has changed more than once, the names of its errors have not.
    kinds = {cls.__name__ for item in causes for cls in type(item).__mro__}
    first = first_sentence(error)
    local = "Or give a local copy: data.path=FILE."
    if "GatedRepoError" in kinds or "gated" in first.lower():
        return (
            f"{name} is gated: accept its terms on its page, log in with `hf auth login` (or set HF_TOKEN), and start "
            f"the same command again. {local}"
        )
    if "OfflineModeIsEnabled" in kinds or "offline" in first.lower():
        return f"{name} is not in the cache and the Hub is switched off (HF_HUB_OFFLINE). Switch it on. {local}"
    statuses = [getattr(getattr(item, "response", None), "status_code", None) for item in causes]
    if busy := [status for status in statuses if status in (408, 429, 500, 502, 503, 504)]:
        return f"the Hub answered {busy[0]} for {name}. Start the same command again later. {local}"
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"} and "ConnectError" not in kinds:
        return f"{name} is not a data set on the Hub, or it is private ({first}). Check the name in data.path. {local}"
    if kinds & {"ConnectionError", "TimeoutError", "TransportError"}:
        return f"{name} could not be reached ({first}). Check the network and start the same command again. {local}"
    if isinstance(error, ValueError):  # an unknown split or subset: datasets lists the valid ones
        return f"{name}: {first} Check data.split and data.subset."
    return None
