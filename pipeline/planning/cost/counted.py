"""What there is to work on: examples and how long they are, from a run's tables, its file, or its configuration."""

import contextlib
import dataclasses
import functools
import gzip
import json
import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.planning.gpus import ranks_of
from ppo_vs_dpo.preferences.reading.mappings import (
    GATHERED,
    FilteredError,
    MappingOptions,
    UnmappableError,
    detect,
    map_row,
    mapping_named,
)
from ppo_vs_dpo.preferences.reading.readers import SUFFIXES, Broken, read_files, suffix_of

# Characters of a token, about; only for texts that nobody has tokenised yet.
CHARACTERS = 4
# Reviews of the testbed that are written to know how long one is: some 20 ms.
WRITTEN = 200
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
    number = examples(run, "dpo")[0]
    test, held = (float(run.config.data.get(key) or 0) for key in ("test_fraction", "heldout_fraction"))
    return None if number is None else int(number * test / max(1 - test - held, 1e-9))


def examples(run: RunFolder, stage: str, ratios: dict[str, float] | None = None) -> tuple[int | None, int]:
    """How many examples a stage trains on (``None``: not known yet), and tokens of one, about (ppo: of a prompt)."""
    return _examples(run, stage, ratios)[:2]


def at_their_longest(run: RunFolder, stage: str) -> bool:
    """Whether nobody knows yet how long a stage's texts are, and `examples` has the longest that may be."""
    return _examples(run, stage)[2]


def _examples(run: RunFolder, stage: str, ratios: dict[str, float] | None = None) -> tuple[int | None, int, bool]:
    data = run.config.data
    bound = int(data.get("max_prompt_tokens") or 128)
    if stage != "ppo":
        bound += int(data.get("max_response_tokens") or data.get("max_new_tokens") or 128)
    written = _written(run)
    template = (ratios or {}).get("template") or 0
    per_token = (ratios or {}).get("text") or (_characters_of_a_word() if written else CHARACTERS)
    name, columns = table_of(stage)
    if "given" in run.config:  # models and outputs of somebody else: there is nothing but the prompts
        name, columns = ("data", "prompts_heldout.parquet"), ["prompt"]
    table = run.path(*name)
    if table.is_file():
        lengths = [sum(characters(row[one]) for one in columns if one in row) for row in _first(table, columns)]
        typical = math.ceil(sum(lengths) / max(len(lengths), 1) / per_token + template) or bound
        return rows_of(table), min(typical, bound) if data.get("max_prompt_tokens") else typical, False
    configured = {"sft": data.get("sft_examples"), "ppo": data.get("train_prompts")}.get(stage, data.get("pairs"))
    if isinstance(configured, int) and written:
        lengths = [len(prompt) + (len(answer) if stage != "ppo" else 0) for prompt, answer in _reviews()]
        return configured, min(math.ceil(sum(lengths) / len(lengths) / per_token), bound), False
    if isinstance(configured, int):
        return configured, bound, True
    found = _file_of(run)
    if found is not None:
        total, pairs = found[0], [row for row in found[1] if _fits(row, data, per_token)]
        number = total * len(pairs) / max(len(found[1]), 1)
        number = min(number, float(data.get("max_pairs") or number))
        share = 1 - float(data.get("test_fraction") or 0) - float(data.get("heldout_fraction") or 0)
        lengths = [
            sum(map(characters, (row["prompt"], *(() if stage == "ppo" else (row["chosen"],))))) for row in pairs
        ]
        typical = math.ceil(sum(lengths) / max(len(lengths), 1) / per_token + template) if pairs else bound
        return int(number * share), min(typical, bound) if data.get("max_prompt_tokens") else typical, not pairs
    return None, bound, True


def _written(run: RunFolder) -> bool:
    """Whether a run's texts are the testbed's, which has its own tokenizer: a word is a token."""
    data, own = run.config.data, not run.config.model.get("path")
    return own and "testbed" in (data.get("source"), data.get("prompts_path"))


@functools.cache
def _reviews() -> list[tuple[str, str]]:
    from ppo_vs_dpo.preferences.testbed.grammar import reviews

    return list(reviews(0, WRITTEN))


@functools.cache
def _characters_of_a_word() -> float:
    from ppo_vs_dpo.preferences.testbed.gold import words_of

    texts = [prompt + answer for prompt, answer in _reviews()]
    return sum(map(len, texts)) / sum(len(words_of(text)) for text in texts)


def _fits(row: dict[str, Any], data: Any, per_token: float) -> bool:
    """Whether a pair is about as short as the data step lets it be."""
    if (data.get("on_problem") or {}).get("truncated") != "drop":
        return True
    limits = [(data.get("max_prompt_tokens"), "prompt")]
    limits += [(data.get("max_response_tokens"), side) for side in ("chosen", "rejected")]
    return all(limit is None or characters(row[name]) <= per_token * limit for limit, name in limits)


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
    found = _file_of(run)
    return [{key: row[key] for key in columns} for row in (found[1] if found else [])[:number]]


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


def _file_of(run: RunFolder) -> tuple[int, list[dict[str, Any]]] | None:
    """Rows of the file that the pairs are read from, and the pairs of its first ones, mapped as the data step does.

    ``None`` where it is no file, or cannot be read: the data step says what is wrong with it.
    """
    data = run.config.data
    path = Path(str(data.get("path")))
    if not path.is_file() or suffix_of(path) not in SUFFIXES:
        return None
    told = {field.name: data.get(field.name) for field in dataclasses.fields(MappingOptions) if field.name != "render"}
    told = {
        name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for name, value in told.items()
    }
    stat = path.stat()
    question = json.dumps([{name: value for name, value in told.items() if value is not None}, data.get("format")])
    return _look(str(path), question, (stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _look(path: str, question: str, state: tuple[int, int]) -> tuple[int, list[dict[str, Any]]] | None:
    told, format = json.loads(question)
    options, pairs = MappingOptions(**told), []
    try:
        for _, row in islice(read_files(path), LOOKED_AT):
            if isinstance(row, Broken):
                continue
            format = detect(row, options) if format in (None, "auto") else format
            if format in GATHERED:
                return None  # several rows make a pair
            with contextlib.suppress(UnmappableError, FilteredError):
                pairs.append(map_row(row, mapping_named(format), options))
        return (_rows_in(Path(path)), pairs) if pairs else None
    except (UserError, OSError, EOFError, ValueError):
        return None


def _rows_in(path: Path) -> int:
    """Without parsing them: rows of a Parquet file, lines of one with a row a line, else all are read."""
    if suffix_of(path) == ".parquet":
        return rows_of(path)
    if suffix_of(path).removesuffix(".gz") in (".jsonl", ".csv"):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            return sum(bool(line.strip()) for line in lines)
    return sum(1 for _ in read_files(str(path)))
