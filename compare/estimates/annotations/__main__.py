"""Judgements made elsewhere, in AlpacaEval's format, put through the same statistics::

    python -m ppo_vs_dpo.compare.estimates.annotations FILE... [--json] [--difficulty] [--leaderboard FOLDER]

Each file is a list of ``{"instruction", "output_1", "generator_1", "output_2", "generator_2", "preference"}``;
``preference`` runs from 1 (the baseline, ``output_1``, wins) to 2 (the model, ``output_2``, wins), 1.5 or 0 is a tie.
A file may hold several models, told apart by ``generator_2``, and rows whose two sides stand the other way round.
A CSV file is read as the judgements that Huang et al. 2024 released (`from_judged_csv`).
"""

import argparse
import json
import sys
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError, say, warn
from ppo_vs_dpo.artifacts.files import finite
from ppo_vs_dpo.compare.estimates.annotations.figures import difficulties, statistics_of
from ppo_vs_dpo.compare.estimates.annotations.reading import load_annotations, models_in, numbers_of
from ppo_vs_dpo.compare.statistics.leaderboard import read_leaderboard


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
        warn(f"error: {error}\n")
        return 2
    text = json.dumps(finite(results), indent=2, ensure_ascii=False) if arguments.json else table(results)
    say(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
