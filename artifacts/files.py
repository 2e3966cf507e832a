"""Files that are either whole or not there: everything is written to a temporary name and renamed."""

import contextlib
import gzip
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError, not_the_file, warn

# Of this process; it can be read by setting it only.
UMASK = os.umask(0o022)
os.umask(UMASK)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut (not possible on every file system)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``; renamed to it when the block ends well, removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block ends well.

    An older folder of that name stays valid until the new one is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        as_the_umask_says(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def as_the_umask_says(folder: Path) -> None:
    """Give files the mode that any new file has here: safetensors writes 0600, which a group cannot read.

    What is linked from elsewhere keeps the mode that it has there.
    """
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
            path.chmod(path.stat().st_mode & 0o111 | 0o666 & ~UMASK)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def finite(value: Any) -> Any:
    """``value`` with every non-finite float replaced by ``None``: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy and torch scalars
        return finite(value.item())
    if hasattr(value, "tolist"):
        return finite(value.tolist())
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically, two spaces of indentation, non-finite numbers as ``null``."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        UserError: the file is missing or is not JSON; names the file and the line.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}).") from None


def read_marker(
    path: str | Path, set_aside: bool = False, keys: dict[str, Any] | None = None, strict: bool = False
) -> dict | None:
    """A marker file (``done.json`` and its like): a JSON object, or ``None`` where there is none that can be read.

    What a marker says is only whether something may be skipped, so an unreadable one costs work, never an error.

    Args:
        set_aside: rename an unreadable one to ``<name>.unreadable`` and say so.
        keys: what it must have, ``{key: type or types}``.
        strict: as with ``set_aside``, what is no fault of the file is raised.

    Raises:
        OSError: with ``set_aside`` or ``strict``, where the disk does not answer, or nobody may read it here: finished
            work is not to count as missing for that.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in (keys or {}).items()):
            return found
        why = "it is not what was written"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        if (set_aside or strict) and not_the_file(error):
            raise
        why = str(error)
    if set_aside:
        aside = path.with_name(f"{path.name}.unreadable")
        with contextlib.suppress(OSError):
            if aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside)
            path.rename(aside)
            warn(f"{path} cannot be read ({why}); it counts as missing, and is now {aside.name}.\n")
    return None


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(finite(row), ensure_ascii=False, default=str) + "\n")


def append_jsonl(path: str | Path, row: dict) -> None:
    """Append one line and bring it to the disk before returning.

    A line torn by a crash is cut off first: it was never finished, and whoever resumes writes it again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as out:
        end = out.seek(0, os.SEEK_END)
        if end > 0:
            out.seek(end - 1)
            if out.read(1) != b"\n":
                out.seek(0)
                out.truncate(out.read().rfind(b"\n") + 1)
        out.write(json.dumps(finite(row), ensure_ascii=False, default=str).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())


def read_jsonl(path: str | Path) -> list[dict]:
    """Read one JSON object a line (``.gz`` too). A torn *last* line, as a crash leaves it, is dropped.

    Raises:
        UserError: any other line is not a JSON object, or a ``.gz`` is not whole; names file and line.
    """
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    rows, torn = [], None
    try:
        # As bytes: a line may be torn inside a character.
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                if torn is not None:
                    raise UserError(f"{path}, line {torn}: not valid JSON.")
                try:
                    row = json.loads(line.decode("utf-8"))
                except ValueError:
                    torn = number
                    continue
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: not a JSON object.")
                rows.append(row)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}).") from None
    return rows


def write_parquet(path: str | Path, rows: Any) -> None:
    """Write rows (a ``datasets.Dataset``, a list of dicts or a dict of columns) as Parquet, atomically."""
    import pyarrow.parquet
    from datasets import Dataset

    if isinstance(rows, list):
        rows = Dataset.from_list(rows)
    elif isinstance(rows, dict):
        rows = Dataset.from_dict(rows)
    with atomic_path(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, rows.features.arrow_schema) as out:
        for batch in rows.with_format("arrow").iter(batch_size=10_000):
            out.write_table(batch.cast(rows.features.arrow_schema))


def read_parquet(path: str | Path, columns: list[str] | None = None):
    """Read Parquet into an in-memory ``datasets.Dataset`` (no copy is left in a cache folder).

    Raises:
        UserError: the file is missing, truncated, spoilt, or lacks one of ``columns``.
    """
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        table = pyarrow.parquet.read_table(str(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Run the stage that writes it first.") from None
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's; Arrow's own, of torn pages, have no number
            raise
        raise UserError(
            f"{path} is not a complete Parquet file ({error}). Delete it and run its stage again."
        ) from None
    missing = [column for column in columns or () if column not in table.column_names]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}.")
    return Dataset(table)


def sha256_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (keys sorted), as 64 hex digits."""
    canonical = json.dumps(finite(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def fingerprint_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, or of the sorted (name, content) list of a folder."""
    path = Path(path)
    digest = hashlib.sha256()
    members = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    for member in members:
        if member != path:
            digest.update(member.relative_to(path).as_posix().encode() + b"\0")
        with member.open("rb") as content:
            hashlib.file_digest(content, lambda: digest)
    return digest.hexdigest()
