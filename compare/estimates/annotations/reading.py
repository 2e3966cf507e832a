"""From files of annotations to the rows of each model: JSON, JSON lines, N+'s CSV, sides in either order."""

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ppo_vs_dpo.artifacts.errors import UserError


def load_annotations(path: str | Path) -> list[dict[str, Any]]:
    """Annotations of a JSON file (a list), a JSON-lines file or a CSV of N+'s judgements, each also gzipped.

    Raises:
        UserError: missing, not JSON, not a list of objects with the needed keys; names file and entry.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if ".csv" in path.suffixes[-2:]:
        return from_judged_csv(text, path)
    try:
        lines = [line for line in text.splitlines() if line.strip()]
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} holds no annotations: a list of objects is needed.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or "preference" not in row:
            raise UserError(f"{path}, entry {number}: no preference.")
    return rows


JUDGED_COLUMNS = ("query", "postprocessed_response", "reference_responses", "preferred", "shuffled_index")


def from_judged_csv(text: str, path: str | Path) -> list[dict[str, Any]]:
    """Judgements as vwxyzjn/summarize_from_feedback_details has them (``eval/oai1b.csv_judged.csv``).

    ``preferred`` is ``ours`` or ``reference``; with ``shuffled_index`` 0 ours was shown first. Any other verdict
    counts as none given.

    Raises:
        UserError: other columns; names those that are missing.
    """
    csv.field_size_limit(1 << 30)
    rows = list(csv.DictReader(io.StringIO(text)))
    missing = [name for name in JUDGED_COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise UserError(f"{path}: a CSV of judgements has columns {', '.join(JUDGED_COLUMNS)}; no {missing[0]} here.")
    name = Path(path).name.split(".csv")[0]
    return [
        {
            "instruction": row["query"],
            "output_1": row["reference_responses"],
            "generator_1": "reference",
            "output_2": row["postprocessed_response"],
            "generator_2": name,
            "preference": {"ours": 2.0, "reference": 1.0}.get(row["preferred"]),
            "shown_first": 2 if row["shuffled_index"] == "0" else 1,
        }
        for row in rows
    ]


def models_in(rows: list[dict[str, Any]], path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Annotations of every model of a file, the model's completion as ``output_2``.

    A file of one model is named after the file (or after the model, where all files are called ``annotations.json``);
    several models are told apart by ``generator_2``. A row in which the baseline stands second is turned round: its
    outputs change places and its preference p becomes 3 - p.
    """
    stem = Path(path).name.split(".json")[0]
    baseline = baseline_of(rows, stem)
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        first, second = (str(row.get(f"generator_{side}") or "") for side in (1, 2))
        if second == baseline and first != baseline:
            row, second = turned(row), first
        found.setdefault(second, []).append(row)
    if len(found) == 1:
        name = next(iter(found))
        return {name if name and stem in ("annotations", "") else stem: rows_of for rows_of in found.values()}
    return {name or stem: rows_of for name, rows_of in found.items()}


def baseline_of(rows: list[dict[str, Any]], stem: str) -> str | None:
    """The name that takes part in every row; of two such names not the file's own, then the one that stands first."""
    firsts = Counter(str(row["generator_1"]) for row in rows if row.get("generator_1"))
    sides = [{str(row.get("generator_1") or ""), str(row.get("generator_2") or "")} for row in rows]
    always = set.intersection(*sides) - {""}
    others = always - {stem} or always
    return max(others or set(firsts), key=lambda name: (firsts[name], name), default=None)


def turned(row: dict[str, Any]) -> dict[str, Any]:
    """The same judgement with the two sides in the other order."""
    swapped = {**row, "preference": row["preference"]}
    for key in ("output", "generator"):
        swapped[f"{key}_1"], swapped[f"{key}_2"] = row.get(f"{key}_2"), row.get(f"{key}_1")
    if row.get("shown_first") in (1, 2):
        swapped["shown_first"] = 3 - row["shown_first"]
    value = number_of(row["preference"])
    if value is not None and value != 0:
        swapped["preference"] = 3.0 - value
    return swapped


def number_of(value: Any) -> float | None:
    """A preference as a number, ``None`` for null or a text that is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def shares_of(rows: list[dict[str, Any]]) -> np.ndarray:
    """``(N,)`` preferences for the model in [0, 1]: p - 1, a tie (0) 1/2, NaN for what is neither 0 nor in [1, 2]."""
    values = np.array([number_of(row["preference"]) for row in rows], dtype=np.float64)
    values = np.where(values == 0, 1.5, values)
    return np.where((values >= 1) & (values <= 2), values, np.nan) - 1


def lengths_of(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Characters ``(K, 2)`` of both outputs of the rows that have them, and which of the ``N`` rows these are."""
    texts = [(row.get("output_1"), row.get("output_2")) for row in rows]
    known = np.array([all(isinstance(text, str) for text in pair) for pair in texts])
    return np.array([[len(text) for text in pair] for pair, use in zip(texts, known, strict=True) if use]), known


def numbers_of(models: dict[str, list[dict[str, Any]]], n: int) -> dict[str, int] | None:
    """Instruction -> its number in the evaluation set, from a model that has all ``n`` of them in order.

    Rows may say their number themselves (``index``). ``None`` where no model tells.
    """
    for rows in models.values():
        said = {str(row.get("instruction")): row.get("index") for row in rows}
        if len(said) == n and all(type(number) is int for number in said.values()):
            return said
    for rows in models.values():
        names = [str(row.get("instruction")) for row in rows]
        if len(names) == len(set(names)) == n:
            return {name: number for number, name in enumerate(names)}
    return None
