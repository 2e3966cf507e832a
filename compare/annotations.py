"""Judgements made elsewhere, in AlpacaEval's format, put through the same statistics::

    python -m compare.annotations FILE... [--json]

Each file is a list of ``{"instruction", "output_1", "generator_1", "output_2", "generator_2", "preference"}``;
``preference`` runs from 1 (the baseline, ``output_1``, wins) to 2 (the model, ``output_2``, wins), 1.5 or 0 is a tie.
"""

import argparse
import contextlib
import gzip
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from artifacts.errors import UserError
from artifacts.files import finite
from compare.length_control import length_controlled
from compare.statistics import (
    detectable_gap,
    permutation_test,
    prompts_needed,
    sign_test,
    wilson,
    win_rate_interval,
)

NEEDED = ("output_1", "output_2", "preference")


def load_annotations(path: str | Path) -> list[dict[str, Any]]:
    """Annotations of a JSON file (a list), a JSON-lines file, or either one gzipped.

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
    try:
        lines = [line for line in text.splitlines() if line.strip()]
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} holds no annotations: a list of objects is needed.")
    for number, row in enumerate(rows):
        missing = [
            key for key in ("output_1", "output_2", "preference") if not isinstance(row, dict) or key not in row
        ]
        if missing:
            raise UserError(f"{path}, entry {number}: no {', '.join(missing)}.")
    return rows


def preferences_of(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Preferences ``(N,)`` as given and whether each is usable ``(N,)``: 0, or in [1, 2]; others are counted out."""
    values = np.full(len(rows), np.nan)
    for number, row in enumerate(rows):
        with contextlib.suppress(TypeError, ValueError):  # null, or a text that is no number
            values[number] = float(row["preference"])
    return values, (values == 0) | ((values >= 1) & (values <= 2))


def statistics_of(rows: list[dict[str, Any]], where: str = "") -> dict[str, Any]:
    """AlpacaEval's figures under its names (percent), and what it does not give: intervals, tests, power.

    ``win_rate`` is the mean of preference - 1, ``standard_error`` its standard error, a win is a preference above
    1.5, a draw one of exactly 1.5 or 0, and ``discrete_win_rate`` rounds every preference to a win, a loss or a draw.
    """
    given, usable = preferences_of(rows)
    if not usable.any():
        raise UserError(f"{where}: none of {len(rows)} annotations has a preference.")
    values = given[usable]
    draws = (values == 1.5) | (values == 0)
    preference = np.where(values == 0, 1.5, values) - 1
    n = len(preference)
    discrete = np.where(draws, 0.5, np.round(values) - 1)
    interval = win_rate_interval(preference[:, None])
    low, high = wilson(discrete.sum(), n)
    result: dict[str, Any] = {
        "win_rate": float(preference.mean() * 100),
        "standard_error": float(preference.std(ddof=1) / np.sqrt(n) * 100) if n > 1 else None,
        "n_wins": int((preference > 0.5).sum()),
        "n_wins_base": int((preference < 0.5).sum()),
        "n_draws": int(draws.sum()),
        "n_total": n,
        "discrete_win_rate": float(discrete.mean() * 100),
        "n_without_preference": int((~usable).sum()),
        "win_rate_ci": [100 * x for x in interval.ci(0)],
        "discrete_win_rate_wilson": [100 * low, 100 * high],
        "p_permutation": float(permutation_test(preference[:, None], resamples=9999)[0]),
        "p_sign": sign_test(preference),
        "detectable_gap": 100 * detectable_gap(n, float(preference.std(ddof=1)) if n > 1 else 0.5),
        "prompts_needed": prompts_needed(
            float(preference.mean() - 0.5), float(preference.std(ddof=1)) if n > 1 else 0.5
        ),
    }
    lengths = np.array([[len(str(row[key] or "")) for key in ("output_1", "output_2")] for row in rows])[usable]
    result["avg_length"], result["avg_length_base"] = float(lengths[:, 1].mean()), float(lengths[:, 0].mean())
    result |= length_figures(preference, lengths[:, 1] - lengths[:, 0])
    return result


def length_figures(preference: np.ndarray, difference: np.ndarray) -> dict[str, Any]:
    """The length-controlled win rate in percent, or why there is none."""
    try:
        fit = length_controlled(preference, difference, regularised=len(preference) >= 50)
    except ValueError as error:
        return {"length_controlled_win_rate": None, "length_controlled_note": str(error)}
    return {
        "length_controlled_win_rate": 100 * fit.win_rate,
        "length_controlled_ci": [100 * x for x in fit.ci],
        "length_bias": fit.phi,
    }


def model_of(rows: list[dict[str, Any]], path: str | Path) -> str:
    """The judged model's name: that of the file, or ``generator_2`` where all files are called ``annotations.json``.

    Raises:
        UserError: the file holds judgements of several models.
    """
    names = sorted({str(row["generator_2"]) for row in rows if row.get("generator_2")})
    if len(names) > 1:
        raise UserError(f"{path} holds judgements of {len(names)} models ({', '.join(names[:4])}): one a file.")
    stem = Path(path).name.split(".json")[0]
    return names[0] if names and stem in ("annotations", "") else stem


def table(results: dict[str, dict[str, Any]]) -> str:
    """One line a model, for reading."""
    width = max(map(len, results))
    lines = [f"{'model':<{width}}  win rate  [95 % interval]   length-controlled      n   ties  p"]
    for name, r in sorted(results.items(), key=lambda item: -item[1]["win_rate"]):
        controlled = r["length_controlled_win_rate"]
        lines.append(
            f"{name:<{width}}  {r['win_rate']:7.2f}  [{r['win_rate_ci'][0]:6.2f}, {r['win_rate_ci'][1]:6.2f}]  "
            f"{'–' if controlled is None else format(controlled, '17.2f'):>17}  {r['n_total']:5d}  {r['n_draws']:5d}  "
            f"{r['p_permutation']:.4f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m compare.annotations", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="annotations, JSON or JSON lines, may be gzipped")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON, keyed by model")
    arguments = parser.parse_args(argv)
    try:
        results: dict[str, dict[str, Any]] = {}
        for path in arguments.files:
            rows = load_annotations(path)
            name = model_of(rows, path)
            if name in results:
                raise UserError(f"{path}: {name} was read already from another file.")
            results[name] = statistics_of(rows, str(path))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    text = json.dumps(finite(results), indent=2, ensure_ascii=False) if arguments.json else table(results)
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
