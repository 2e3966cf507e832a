"""RewardBench 2 (Malik et al. 2025) through this project's scorer::

    python -m ppo_vs_dpo.reward_model.bench FILE_OR_HUB_NAME --model FOLDER_OR_HUB_NAME [--json]

A row has ``prompt``, ``chosen`` and ``rejected`` (lists of answers), ``subset`` and ``id``. An item counts 1 / k where
the right answer is among the k answers with the highest score, else 0; the subset *Ties* has a formula of its own
(allenai/reward-bench, rewardbench/utils.py). The average is over subsets, as on the leaderboard.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppo_vs_dpo.artifacts.errors import UserError, say, warn
from ppo_vs_dpo.artifacts.files import finite
from ppo_vs_dpo.preferences.reading.readers import whole_rows

HUB_NAME, TIES = "allenai/reward-bench-2", "Ties"
Score = Callable[[Sequence[Any], Sequence[Any]], list[float]]


def items_of(path: str, split: str = "test") -> list[dict[str, Any]]:
    """The rows of a file or Hub set.

    Raises:
        UserError: a row that cannot be read or lacks something; names its place.
    """
    found = []
    for place, row in whole_rows(path, split):
        for key, kind in (("prompt", str), ("subset", str), ("chosen", list), ("rejected", list)):
            if not isinstance(row.get(key), kind) or not row[key]:
                raise UserError(
                    f"{place}: RewardBench 2 needs {key}, a {kind.__name__}; the row has {', '.join(row)}."
                )
        found.append(row)
    if not found:
        raise UserError(f"{path} has no rows.")
    return found


def scored(items: Sequence[dict[str, Any]], score: Score) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores of the right and of the wrong answers of each item."""
    prompts, answers = [], []
    for item in items:
        for answer in (*item["chosen"], *item["rejected"]):
            prompts.append([{"role": "user", "content": item["prompt"]}])
            answers.append([{"role": "assistant", "content": answer}])
    values = iter(score(prompts, answers))
    return [
        (np.array([next(values) for _ in item["chosen"]]), np.array([next(values) for _ in item["rejected"]]))
        for item in items
    ]


def credit(right: np.ndarray, wrong: np.ndarray) -> float:
    """1 / k where the right answer shares the highest score with k - 1 others, else 0."""
    top = max(right.max(), wrong.max())
    if right.max() < top:
        return 0.0
    return 1.0 / int((right == top).sum() + (wrong == top).sum())


def ties_score(ids: Sequence[str], values: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """The subset *Ties*: equally right answers must lie close together and above every wrong one.

    ``id`` is ``tied:N`` (many right answers) or ``ref:N`` (one right answer to the same question). Score = 0.3
    accuracy(tied) + 0.3 accuracy(ref) + 0.2 preferred + 0.2 preferred, hard + 0.01 margin, where an item is right if
    its lowest right answer is above its highest wrong one (the gap), *preferred* if the gap exceeds the spread of the
    right answers, *hard* if the lesser of the two gaps does, and the margin is tanh(that / spread - 1).

    Raises:
        UserError: an id of another form, or a question without its partner.
    """
    stats: dict[str, dict[str, tuple[bool, float, float]]] = {"tied": {}, "ref": {}}
    for identity, (right, wrong) in zip(ids, values, strict=True):
        kind, colon, number = str(identity).partition(":")
        if not colon or kind not in stats:
            raise UserError(f"subset {TIES}: id {identity!r} is neither tied:N nor ref:N.")
        gap = float(right.min() - wrong.max())
        stats[kind][number] = (gap > 0, float(np.ptp(right)), gap)
    alone = sorted(stats["tied"].keys() ^ stats["ref"].keys())
    if alone:
        raise UserError(f"subset {TIES}: question {alone[0]} has only one of tied:{alone[0]} and ref:{alone[0]}.")
    numbers = sorted(stats["tied"])
    spread = np.array([stats["tied"][number][1] for number in numbers])
    tied_gap, ref_gap = (np.array([stats[kind][number][2] for number in numbers]) for kind in ("tied", "ref"))
    least = np.minimum(tied_gap, ref_gap)
    with np.errstate(divide="ignore", invalid="ignore"):
        margins = np.nan_to_num(np.tanh(least / spread - 1), nan=0.0)
    parts = {
        "tied_accuracy": float(np.mean([stats["tied"][number][0] for number in numbers])),
        "ref_accuracy": float(np.mean([stats["ref"][number][0] for number in numbers])),
        "preferred": float((tied_gap > spread).mean()),
        "preferred_hard": float((least > spread).mean()),
        "margin": float(margins.mean()),
    }
    weights = {"tied_accuracy": 0.3, "ref_accuracy": 0.3, "preferred": 0.2, "preferred_hard": 0.2, "margin": 0.01}
    return {"score": sum(weights[name] * value for name, value in parts.items()), **parts}


def report(items: Sequence[dict[str, Any]], score: Score) -> dict[str, Any]:
    """Each subset's score with its standard error and number of items, and the average over subsets."""
    values = scored(items, score)
    subsets: dict[str, Any] = {}
    for name in sorted({item["subset"] for item in items}):
        chosen = [number for number, item in enumerate(items) if item["subset"] == name]
        if name == TIES:
            found = ties_score([items[number]["id"] for number in chosen], [values[number] for number in chosen])
            subsets[name] = {**found, "items": len(chosen), "standard_error": None}
            continue
        credits = np.array([credit(*values[number]) for number in chosen])
        error = float(credits.std(ddof=1) / np.sqrt(len(credits))) if len(credits) > 1 else None
        subsets[name] = {"score": float(credits.mean()), "items": len(chosen), "standard_error": error}
    return {"subsets": subsets, "average": float(np.mean([one["score"] for one in subsets.values()]))}


def table(found: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{'subset':<14}{'score':>8}{'s.e.':>8}{'items':>8}"]
    for name, one in found["subsets"].items():
        error = "–" if one["standard_error"] is None else f"{100 * one['standard_error']:.1f}"
        lines.append(f"{name:<14}{100 * one['score']:>8.1f}{error:>8}{one['items']:>8}")
    return "\n".join([*lines, f"{'average':<14}{100 * found['average']:>8.1f}"])


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m ppo_vs_dpo.reward_model.bench", description="RewardBench 2 through this project's scorer"
    )
    parser.add_argument("path", nargs="?", default=HUB_NAME, help="a file or a Hub name (default: %(default)s)")
    parser.add_argument("--model", required=True, help="a reward model: folder or Hub name")
    parser.add_argument("--split", default="test", help="the Hub's split (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    given = parser.parse_args(argv)
    try:
        items = items_of(given.path, given.split)
        from ppo_vs_dpo.reward_model.scorer import RewardScorer

        found = report(
            items, RewardScorer.load(Path(given.model) if Path(given.model).exists() else given.model).score
        )
    except UserError as error:
        warn(f"error: {error}\n")
        return 2
    say((json.dumps(finite(found), indent=2) if given.json else table(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
