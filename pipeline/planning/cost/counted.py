"""What there is to work on: examples and how long they are, from a run's tables, its file, or its configuration."""

import gzip
import json
import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.planning.gpus import ranks_of

# Characters of a token, about; only for texts that nobody has tokenised yet.
CHARACTERS = 4
# Rows of a file that are looked at to know how long a text is.
LOOKED_AT = 200


def ranks(run: RunFolder) -> int:
    """Processes of a training stage."""
    return ranks_of(run.config.get("launch"))


def test_pairs(run: RunFolder) -> int | None:
    """How many pairs are held out; ``None``: not known yet."""
    table = run.path("pairs", "test.parquet")
    if table.is_file():
        return rows_of(table)
    configured = run.config.data.get("test_pairs")
    if isinstance(configured, int):
        return configured
    found, share = _lines(run), float(run.config.data.get("test_fraction") or 0)
    return None if found is None else int(found[0] * share)


def examples(run: RunFolder, stage: str, ratios: dict[str, float] | None = None) -> tuple[int | None, int]:
    """How many examples a stage trains on (``None``: not known yet), and tokens of one, about (ppo: of a prompt)."""
    data = run.config.data
    bound = int(data.get("max_prompt_tokens") or 128)
    if stage != "ppo":
        bound += int(data.get("max_response_tokens") or data.get("max_new_tokens") or 128)
    per_token, template = (ratios or {}).get("text") or CHARACTERS, (ratios or {}).get("template") or 0
    name, columns = table_of(stage)
    table = run.path(*name)
    if table.is_file():
        lengths = [sum(characters(row[one]) for one in columns if one in row) for row in _first(table, columns)]
        typical = math.ceil(sum(lengths) / max(len(lengths), 1) / per_token + template) or bound
        return rows_of(table), min(typical, bound) if data.get("max_prompt_tokens") else typical
    configured = {"sft": data.get("sft_examples"), "ppo": data.get("train_prompts")}.get(stage, data.get("pairs"))
    if isinstance(configured, int):
        return configured, bound
    found = _lines(run)
    if found is not None:
        total, size = found
        share = 1 - float(data.get("test_fraction") or 0) - float(data.get("heldout_fraction") or 0)
        # A line holds a prompt and two answers.
        typical = math.ceil(size / per_token * (1 / 3 if stage == "ppo" else 2 / 3) + template)
        return int(total * share), min(typical, bound) if data.get("max_prompt_tokens") else typical
    return None, bound


def table_of(stage: str) -> tuple[tuple[str, str], list[str]]:
    """Where a stage's examples are, and the columns of one (of a pair: one side)."""
    found = {"sft": ("data", "sft_train.parquet"), "ppo": ("data", "prompts_train.parquet")}
    return found.get(stage, ("pairs", "train.parquet")), [
        "prompt",
        *({"ppo": [], "sft": ["completion"]}.get(stage, ["chosen"])),
    ]


def some_texts(run: RunFolder, number: int = 16) -> list[dict[str, Any]]:
    """Prompts with an answer, a few, as they are in the run's pairs or its file; for a tokenizer to say how long."""
    (folder, file), columns = table_of("dpo")
    table = run.path(folder, file)
    if table.is_file():
        return list(islice(_first(table, columns), number))
    path = Path(str(run.config.data.get("path")))
    if ".jsonl" not in path.suffixes or not path.is_file():
        return []
    try:
        with _opened(path) as lines:
            rows = [json.loads(line) for line in islice(lines, number) if line.strip()]
    except (OSError, EOFError, ValueError):
        return []  # the data stage says what is wrong with it
    found = [{key: row[key] for key in columns} for row in rows if isinstance(row, dict) and {*columns} <= {*row}]
    if run.config.data.get("conversational"):  # text becomes a user's turn
        ask = lambda text: [{"role": "user", "content": text}] if isinstance(text, str) else text  # noqa: E731
        found = [{**row, "prompt": ask(row["prompt"])} for row in found]
    return found


def characters(value: Any) -> int:
    """Of a text, or of a list of messages."""
    return len(value) if isinstance(value, str) else sum(len(one.get("content") or "") for one in value or [])


def _first(table: Path, columns: Iterable[str]) -> list[dict[str, Any]]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(table)
    there = [one for one in columns if one in file.schema_arrow.names]
    first = next(file.iter_batches(batch_size=LOOKED_AT, columns=there), None)
    return first.to_pylist() if first is not None else []


def rows_of(table: Path) -> int:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(table).metadata.num_rows


def _lines(run: RunFolder) -> tuple[int, int] | None:
    """Rows of the file that the pairs are read from, at most as many as are taken, and bytes of one (not compressed),
    where a look tells."""
    path = Path(str(run.config.data.get("path")))
    suffixes = [one for one in path.suffixes if one in (".jsonl", ".csv", ".parquet", ".gz")]
    if not path.is_file() or not suffixes or suffixes[0] == ".gz":
        return None
    try:
        if suffixes == [".parquet"]:
            import pyarrow.parquet

            known = pyarrow.parquet.ParquetFile(path).metadata
            total = known.num_rows
            size = sum(known.row_group(group).total_byte_size for group in range(known.num_row_groups))
        else:
            total = size = 0
            with _opened(path) as lines:
                for line in lines:
                    total, size = total + bool(line.strip()), size + len(line)
    except (OSError, EOFError, ValueError):
        return None  # the data stage says what is wrong with it
    return min(total, int(run.config.data.get("max_pairs") or total)), math.ceil(size / max(total, 1))


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")
