"""Judgements made elsewhere, in AlpacaEval's format, put through the same statistics::

    python -m ppo_vs_dpo.compare.estimates.annotations FILE... [--json] [--difficulty] [--leaderboard FOLDER]

Each file is a list of ``{"instruction", "output_1", "generator_1", "output_2", "generator_2", "preference"}``;
``preference`` runs from 1 (the baseline, ``output_1``, wins) to 2 (the model, ``output_2``, wins), 1.5 or 0 is a tie.
A file may hold several models, told apart by ``generator_2``, and rows whose two sides stand the other way round.
A CSV file is read as the judgements that Huang et al. 2024 released (`from_judged_csv`).
"""

import argparse
import csv
import gzip
import io
import json
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import finite
from ppo_vs_dpo.compare.estimates.length_control import length_controlled, support_of
from ppo_vs_dpo.compare.statistics.intervals import wilson
from ppo_vs_dpo.compare.statistics.leaderboard import GAMED_FILE, Leaderboard, fit_leaderboard, read_leaderboard
from ppo_vs_dpo.compare.statistics.significance import detectable_gap, sign_test, win_rates_with_p


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


def chosen_first(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the judge chose what was shown first, where the rows say what that was: 1/2 without a bias."""
    known = [row for row in rows if row.get("shown_first") in (1, 2) and row.get("preference") in (1.0, 2.0)]
    if not known:
        return {}
    wins = sum(row["preference"] == row["shown_first"] for row in known)
    low, high = wilson(wins, len(known))
    return {"chosen_first": 100 * wins / len(known), "chosen_first_wilson": [100 * low, 100 * high]}


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


def preferences_of(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Preferences ``(N,)`` as given and whether each is usable ``(N,)``: 0, or in [1, 2]; others are counted out."""
    numbers = [number_of(row["preference"]) for row in rows]
    values = np.array([np.nan if number is None else number for number in numbers], dtype=np.float64)
    return values, (values == 0) | ((values >= 1) & (values <= 2))


def statistics_of(
    rows: list[dict[str, Any]],
    where: str = "",
    difficulty: dict[str, float] | None = None,
    leaderboard: Leaderboard | None = None,
    numbers: dict[str, int] | None = None,
) -> dict[str, Any]:
    """AlpacaEval's figures under its names (percent), and what it does not give: intervals, tests, power.

    ``win_rate`` is the mean of preference - 1, ``standard_error`` its standard error, a win is a preference above
    1.5, a draw one of exactly 1.5 or 0, and ``discrete_win_rate`` rounds every preference to a win, a loss or a draw.
    ``length_controlled_minimal_win_rate`` is of the minimal model (intercept and length), which can be fitted to these
    rows alone; ``length_controlled_win_rate`` is the leaderboard's, of its full model. ``length_support`` is the
    share of rows on the thinner side of equal length.

    Args:
        rows: annotations of one model.
        where: for messages.
        difficulty: instruction -> how hard it is, from other models' files, for a third term in the minimal model.
        leaderboard: what the leaderboard's full model needs (`compare.statistics.leaderboard`).
        numbers: instruction -> its number in the evaluation set; by default rows stand in that order.
    """
    given, usable = preferences_of(rows)
    if not usable.any():
        raise UserError(f"{where}: none of {len(rows)} annotations has a preference.")
    values = given[usable]
    draws = (values == 1.5) | (values == 0)
    preference = np.where(values == 0, 1.5, values) - 1
    n = len(preference)
    discrete = np.where(draws, 0.5, np.round(values) - 1)
    interval, p = win_rates_with_p(preference[:, None])
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
        "p_permutation": float(p[0]),
        "p_sign": sign_test(preference),
        "detectable_gap": 100 * detectable_gap(n, float(preference.std(ddof=1)) if n > 1 else 0.5),
    }
    kept = [row for row, use in zip(rows, usable, strict=True) if use]
    result |= chosen_first(kept)
    texts = [(row.get("output_1"), row.get("output_2")) for row in kept]
    known = np.array([all(isinstance(text, str) for text in pair) for pair in texts])
    result["length_controlled_win_rate"] = None
    if not known.any():
        note = "no annotation has both outputs, so lengths are not known"
        return {**result, "length_controlled_minimal_win_rate": None, "length_controlled_note": note}
    lengths = np.array([[len(text) for text in pair] for pair, use in zip(texts, known, strict=True) if use])
    result["avg_length"], result["avg_length_base"] = float(lengths[:, 1].mean()), float(lengths[:, 0].mean())
    if not known.all():
        result["n_without_length"] = int((~known).sum())
    difference = lengths[:, 1] - lengths[:, 0]
    result |= length_figures(preference[known], difference)
    if difficulty is not None:
        hard = np.array([difficulty.get(str(row.get("instruction")), 0.0) for row in kept])[known]
        with_it = length_figures(preference[known], difference, hard)
        result["length_controlled_difficulty_win_rate"] = with_it["length_controlled_minimal_win_rate"]
    if leaderboard is not None:
        result |= leaderboard_figures(rows, where, leaderboard, numbers)
    return result


def leaderboard_figures(
    rows: list[dict[str, Any]], where: str, leaderboard: Leaderboard, numbers: dict[str, int] | None
) -> dict[str, Any]:
    """The leaderboard's own length-controlled win rate in percent (`compare.statistics.leaderboard.fit_leaderboard`).

    Raises:
        UserError: an instruction whose difficulty is not known.
    """
    given, usable = preferences_of(rows)
    texts = [(row.get("output_1"), row.get("output_2")) for row in rows]
    known = np.array([all(isinstance(text, str) for text in pair) for pair in texts])
    n = len(leaderboard.difficulty)
    if numbers is None and len(rows) != n:
        raise UserError(
            f"{where}: {len(rows)} annotations, and the leaderboard's difficulties are of {n} instructions: which row "
            f"is which is not known. Give a file with all {n} of them beside it (any model's)."
        )
    found = range(len(rows)) if numbers is None else [numbers.get(str(row.get("instruction")), -1) for row in rows]
    unknown = [row for row, number in enumerate(found) if number not in leaderboard.difficulty]
    if unknown:
        raise UserError(
            f"{where}, entry {unknown[0]}: no difficulty is known of its instruction ({len(unknown)} such entries). "
            f"The leaderboard's model is for AlpacaEval's own instructions."
        )
    shares = np.where(usable, np.where(given == 0, 1.5, given) - 1, np.nan)[known]
    lengths = np.array([[len(text) for text in pair] for pair, use in zip(texts, known, strict=True) if use])
    hard = np.array([leaderboard.difficulty[number] for number in found])[known]
    try:
        fit = fit_leaderboard(shares, lengths[:, 0] - lengths[:, 1], hard, leaderboard.gamed)
    except ValueError as error:
        return {"length_controlled_note": str(error)}
    note = (
        None
        if leaderboard.gamed is not None
        else f"without {GAMED_FILE}, which regularises the leaderboard's fit: not its figure"
    )
    return {
        "length_controlled_win_rate": 100 * fit.win_rate if leaderboard.gamed is not None else None,
        "length_controlled_unregularised_win_rate": 100 * fit.win_rate if leaderboard.gamed is None else None,
        "length_controlled_standard_error": 100 * fit.standard_error,
        "length_controlled_model": {"theta": fit.theta, "phi": fit.phi, "psi": fit.psi, "C": fit.strength},
        **({"length_controlled_note": note} if note else {}),
    }


def length_figures(
    preference: np.ndarray, difference: np.ndarray, difficulty: np.ndarray | None = None
) -> dict[str, Any]:
    """The minimal model's length-controlled win rate in percent, or why there is none; and how far it extrapolates."""
    support = {"length_support": support_of(difference)}
    how = {"regularised": len(preference) >= 50, "extrapolate": True}
    try:
        fit = length_controlled(preference, difference, difficulty, **how)
    except ValueError as error:
        return {**support, "length_controlled_minimal_win_rate": None, "length_controlled_minimal_note": str(error)}
    note = {"length_controlled_minimal_note": f"extrapolation: {fit.extrapolates}"} if fit.extrapolates else {}
    return {
        **support,
        "length_controlled_minimal_win_rate": 100 * fit.win_rate,
        "length_controlled_minimal_ci": [100 * x for x in fit.ci],
        "length_controlled_minimal_extrapolates": fit.extrapolates is not None,
        "length_bias": fit.phi,
        **note,
    }


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


def difficulties(models: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Model -> instruction -> how well the baseline does there against the *other* models, standardised.

    AlpacaEval 2 fits one difficulty an instruction to all models of its leaderboard; here it is taken from the files
    that were given, without the model itself, so that no verdict explains itself.

    Raises:
        UserError: no two models were judged on one instruction.
    """
    of_model: dict[str, dict[str, float]] = {}
    for name, rows in models.items():
        values, usable = preferences_of(rows)
        shares = np.where(values == 0, 1.5, values) - 1
        of_model[name] = {
            str(row.get("instruction")): 1 - float(share)
            for row, share, use in zip(rows, shares, usable, strict=True)
            if use
        }
    found = {}
    for name in of_model:
        sums: dict[str, list[float]] = {}
        for other, values in of_model.items():
            if other != name:
                for instruction, value in values.items():
                    sums.setdefault(instruction, []).append(value)
        shared = {i: float(np.mean(sums[i])) for i in of_model[name] if i in sums}
        if not shared:
            raise UserError(f"--difficulty: no other model was judged on the instructions of {name}.")
        middle, spread = np.mean(list(shared.values())), np.std(list(shared.values()))
        found[name] = {i: float((value - middle) / spread) if spread > 0 else 0.0 for i, value in shared.items()}
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """One line a model, for reading; a star behind a figure that is extrapolation."""
    width = max(map(len, results))
    lines = [
        f"{'model':<{width}}  win rate  [95 % interval]   length-controlled: full  minimal  support      n   ties  p"
    ]
    for name, r in sorted(results.items(), key=lambda item: -item[1]["win_rate"]):
        full, minimal = (
            "–" if r.get(key) is None else format(r[key], ".2f")
            for key in ("length_controlled_win_rate", "length_controlled_minimal_win_rate")
        )
        minimal += "*" if r.get("length_controlled_minimal_extrapolates") else " "
        support = "–" if r.get("length_support") is None else f"{100 * r['length_support']:.1f} %"
        lines.append(
            f"{name:<{width}}  {r['win_rate']:7.2f}  [{r['win_rate_ci'][0]:6.2f}, {r['win_rate_ci'][1]:6.2f}]  "
            f"{full:>24} {minimal:>9} {support:>8}  {r['n_total']:5d}  {r['n_draws']:5d}  {r['p_permutation']:.4f}"
        )
    if any(r.get("length_controlled_minimal_extrapolates") for r in results.values()):
        lines.append(
            "* extrapolation: hardly a prompt lies on the other side of equal length (support). Not to quote."
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m ppo_vs_dpo.compare.estimates.annotations", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="annotations, JSON or JSON lines, may be gzipped")
    parser.add_argument(
        "--difficulty", action="store_true", help="also with instruction difficulty, taken from the other models given"
    )
    parser.add_argument(
        "--leaderboard",
        nargs="+",
        metavar="WHERE",
        help="fit the leaderboard's full model: the folder of instruction_difficulty.csv and df_gamed.csv, the files, "
        "or hub",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON, keyed by model")
    arguments = parser.parse_args(argv)
    try:
        models: dict[str, list[dict[str, Any]]] = {}
        source: dict[str, str] = {}
        for path in arguments.files:
            for name, rows in models_in(load_annotations(path), path).items():
                if name in models:
                    raise UserError(f"{path}: {name} was read already from another file.")
                models[name], source[name] = rows, f"{path}, model {name}"
        hard = difficulties(models) if arguments.difficulty else {}
        board = read_leaderboard(arguments.leaderboard) if arguments.leaderboard else None
        numbers = numbers_of(models, len(board.difficulty)) if board else None
        results = {
            name: statistics_of(rows, source[name], hard.get(name), board, numbers) for name, rows in models.items()
        }
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    text = json.dumps(finite(results), indent=2, ensure_ascii=False) if arguments.json else table(results)
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
