"""From a source's rows to a staged table of valid pairs: mapped, checked, measured, in one pass of bounded memory."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.text.prompts import completion_text, render_prompt
from ppo_vs_dpo.models.text.prompts import is_conversational as is_chat
from ppo_vs_dpo.models.text.turns import encode_turns
from ppo_vs_dpo.preferences.reading.as_read import AsRead
from ppo_vs_dpo.preferences.reading.mappings import (
    GATHERED,
    FilteredError,
    MappingOptions,
    UnmappableError,
    detect,
    map_row,
    mapping_named,
)
from ppo_vs_dpo.preferences.reading.mappings.columns import propose
from ppo_vs_dpo.preferences.reading.parquet import TableWriter, pair_schema
from ppo_vs_dpo.preferences.reading.readers import Broken, Placed
from ppo_vs_dpo.preferences.reading.validation import Checker, Report

_CHUNK = 1_000
SIDES = ("chosen", "rejected")
# The formats whose columns may have other names.
RENAMED = ("pairs", "ultrafeedback")
PLACE = ("place", pa.string())
Item = TypeVar("Item")


@dataclass
class TokenLimits:
    """Longest prompt and response in tokens; longer ones are the problem ``truncated``."""

    tokenizer: PreTrainedTokenizerBase | None = None
    prompt: int | None = None
    response: int | None = None

    def exceeded(self, rows: list[dict[str, Any]]) -> Iterator[str | None]:
        """What is too long in each row, or ``None``."""
        texts: list[str] = []
        for row in rows:
            texts.append(render_prompt(self.tokenizer, row["prompt"]))
            texts += [completion_text(row[side][-1:]) if is_chat(row[side]) else row[side] for side in SIDES]
        lengths = [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        for start, row in zip(range(0, len(lengths), 3), rows, strict=True):
            found = dict(zip(("prompt", *SIDES), lengths[start : start + 3], strict=True))
            for side in SIDES:
                if is_chat(row[side]) and len(row[side]) > 1:  # all that follows the prompt
                    found[side] = len(encode_turns(self.tokenizer, row["prompt"], row[side], finished=False)[0])
            limits = {"prompt": self.prompt, "chosen": self.response, "rejected": self.response}
            long = [
                f"{name} has {length} tokens of {limits[name]}"
                for name, length in found.items()
                if limits[name] is not None and length > limits[name]
            ]
            yield "; ".join(long) or None


def mapped(
    rows: Iterable[Placed], report: Report, checker: Checker, options: MappingOptions, format: str = "auto"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Valid pairs with their places; everything else is counted in the report."""
    if format != "auto":
        mapping_named(format)
    if options.columns and format not in ("auto", *RENAMED):
        raise UserError(f"data.columns is read for data.format={RENAMED[0]}, and data.format is {format}.")
    rows, first = _first_of(_counted(rows, report))
    if first is not None:
        fits = detect(first, options)
        if format not in ("auto", fits) and (fits != "pairs" or {*SIDES} <= {*first}):
            report.fits = fits
        report.format = format = fits if format == "auto" else format
        report.columns = [str(name) for name in first]
    mapping = mapping_named("pairs" if format == "auto" else format)
    for place, row in GATHERED[format](rows) if format in GATHERED else rows:
        if isinstance(row, Broken):
            checker.drops(row.kind, place, row.detail)
            continue
        try:
            if isinstance(row, FilteredError):
                raise row
            pair = map_row(row, mapping, options)
        except FilteredError as reason:
            report.filtered[str(reason)] = report.filtered.get(str(reason), 0) + 1
            continue
        except UnmappableError as problem:
            if problem.kind == "missing_field" and not report.proposal and format == "pairs":
                report.proposal = propose(row)
            checker.drops(problem.kind, place, problem.detail)
            continue
        checked = checker.check(place, pair)
        if checked is not None:
            yield place, checked


def _counted(rows: Iterable[Placed], report: Report) -> Iterator[Placed]:
    for item in rows:
        report.rows += 1
        yield item


def _first_of(rows: Iterator[Placed]) -> tuple[Iterator[Placed], dict[str, Any] | None]:
    """All rows again, and the first that could be read."""
    before: list[Placed] = []
    for item in rows:
        before.append(item)
        if not isinstance(item[1], Broken):
            return itertools.chain(before, rows), item[1]
    return iter(before), None


def within_limits(
    valid: Iterable[tuple[str, dict[str, Any]]], limits: TokenLimits, checker: Checker
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pairs that are not too long, or that are kept although they are; tokenised a chunk at a time."""
    if limits.tokenizer is None or (limits.prompt is None and limits.response is None):
        yield from valid
        return
    for chunk in batched(valid, _CHUNK):
        for (place, row), long in zip(chunk, limits.exceeded([row for _, row in chunk]), strict=True):
            if long is None or not checker.drops("truncated", place, long):
                yield place, row


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of up to ``size`` items (``itertools.batched`` of Python 3.12)."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def stage_pairs(
    rows: Iterable[Placed],
    out: Path,
    report: Report,
    checker: Checker,
    options: MappingOptions,
    format: str = "auto",
    limits: TokenLimits | None = None,
    max_pairs: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write the valid pairs of ``rows`` to ``out`` with a column ``place``.

    What ``checker`` has seen before counts as seen; ``progress`` is called with the number of rows read.

    Returns:
        The number of pairs written.

    Raises:
        UserError: conversations for a tokenizer without a chat template. Problems with the policy ``error`` are only
            counted here; `Report.raise_errors` stops for all of them at once.
    """
    limits = limits or TokenLimits()
    valid = mapped(rows, report, checker, options, format)
    first = next(valid, None)
    conversational = first is not None and isinstance(first[1]["prompt"], list)
    as_read = AsRead(limits.tokenizer, checker, options.conversational)
    everything = (
        (place, row)
        for place, row in itertools.chain([first] if first is not None else [], valid)
        if as_read.keeps(place, row)
    )
    kept = itertools.islice(within_limits(everything, limits, checker), max_pairs)
    written = 0
    with TableWriter(out, pair_schema(conversational, PLACE)) as table:
        for place, row in kept:
            checker.statistics.add(row)
            table.write({**row, "place": place})
            written += 1
            if progress is not None and written % _CHUNK == 0:
                progress(report.rows)
    report.said += as_read.said
    return written
