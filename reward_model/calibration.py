"""How good a pairwise scorer is: accuracy, calibration, and what its scores go along with. Pure functions on arrays.

``delta`` is score(chosen) - score(rejected), ``(N,)``. A Bradley-Terry model claims P(chosen wins) = sigma(delta).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.special import expit, log_expit
from scipy.stats import binomtest, pearsonr, spearmanr


@dataclass
class Accuracy:
    """Share of pairs ordered as labelled (ties count one half), with a 95 % Wilson interval."""

    accuracy: float
    low: float
    high: float
    n: int


def pair_accuracy(delta: np.ndarray) -> Accuracy:
    """Accuracy of the sign of ``delta``."""
    wins = (delta > 0).sum() + 0.5 * (delta == 0).sum()
    # The interval is that of a whole number of wins; a tie is worth one half and rounds down.
    interval = binomtest(int(wins), len(delta)).proportion_ci(method="wilson")
    return Accuracy(float(wins / len(delta)), float(interval.low), float(interval.high), len(delta))


def by_group(delta: np.ndarray, groups: Sequence[str | None]) -> dict[str, Accuracy]:
    """Accuracy of the pairs of each group, in order of their names; pairs of no group are left out."""
    names = np.array([group or "" for group in groups])
    return {str(name): pair_accuracy(delta[names == name]) for name in np.unique(names) if name}


def reliability(delta: np.ndarray, bins: int = 10) -> list[dict]:
    """Confidence against accuracy, in equal bins of the confidence max(p, 1 - p) in [0.5, 1] (Guo et al. 2017).

    Returns:
        For each non-empty bin ``low``, ``high``, ``n``, mean ``confidence`` and ``accuracy``.
    """
    confidence = expit(np.abs(delta))
    correct = np.where(delta == 0, 0.5, delta > 0)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    table = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            table.append(
                {
                    "low": 0.5 + number / (2 * bins),
                    "high": 0.5 + (number + 1) / (2 * bins),
                    "n": int(inside.sum()),
                    "confidence": float(confidence[inside].mean()),
                    "accuracy": float(correct[inside].mean()),
                }
            )
    return table


def expected_calibration_error(table: list[dict]) -> float:
    """Mean |confidence - accuracy| over the pairs, bin by bin (Guo et al. 2017, eq. 3)."""
    total = sum(row["n"] for row in table)
    return float(sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in table) / total)


def overconfidence(table: list[dict]) -> float:
    """Mean confidence minus accuracy: above 0 it claims to know more than it does."""
    total = sum(row["n"] for row in table)
    return float(sum(row["n"] * (row["confidence"] - row["accuracy"]) for row in table) / total)


def brier(delta: np.ndarray) -> float:
    """Mean (1 - sigma(delta))^2: the chosen side is the one that won. 0.25 for a model that knows nothing."""
    return float(((1 - expit(delta)) ** 2).mean())


def log_loss(delta: np.ndarray) -> float:
    """Mean -log sigma(delta), the training loss; its population minimum is the mean label entropy."""
    return float(-log_expit(delta).mean())


def by_margin(delta: np.ndarray, margin: np.ndarray, ceiling: np.ndarray | None = None, bins: int = 5) -> list[dict]:
    """Accuracy in bins of equal size by ``margin``, smallest first."""
    order = np.argsort(margin, kind="stable")
    table = []
    for members in np.array_split(order, bins):
        if len(members) == 0:
            continue
        row = {"margin": [float(margin[members].min()), float(margin[members].max())]}
        row |= asdict(pair_accuracy(delta[members]))
        if ceiling is not None:
            row["ceiling"] = float(ceiling[members].mean())
        table.append(row)
    return table


def correlation(first: np.ndarray, second: np.ndarray) -> dict | None:
    """Pearson's and Spearman's correlation, ``None`` where one side is constant."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return {"pearson": float(pearsonr(first, second)[0]), "spearman": float(spearmanr(first, second)[0])}
