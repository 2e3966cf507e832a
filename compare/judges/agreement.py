"""How far judges can be trusted: agreement with each other, and with themselves when the order is swapped."""

from typing import Any

import numpy as np
from sklearn.metrics import cohen_kappa_score

VERDICTS = (-1, 0, 1)


def verdicts(preferences: np.ndarray) -> np.ndarray:
    """-1, 0, 1 for lost, tied, won."""
    return np.sign(np.asarray(preferences) - 0.5).astype(int)


def agreement(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Raw agreement and Cohen's kappa of two judges on the same comparisons; NaN entries are left out.

    Kappa is agreement beyond what two judges with these shares of wins, ties and losses reach by chance.
    """
    known = np.isfinite(first) & np.isfinite(second)
    a, b = verdicts(first[known]), verdicts(second[known])
    if not len(a):
        return {"n": 0, "agreement": None, "kappa": None}
    constant = len(set(a.tolist()) | set(b.tolist())) == 1
    kappa = None if constant else float(cohen_kappa_score(a, b, labels=VERDICTS))
    return {"n": len(a), "agreement": float((a == b).mean()), "kappa": kappa}


def position_bias(forward: np.ndarray, swapped: np.ndarray) -> dict[str, Any]:
    """How much a judge goes by position.

    Args:
        forward: ``(N,)`` preference for the policy, shown first.
        swapped: ``(N,)`` preference for the same policy, shown second.

    Returns:
        ``bias``: mean of (preference for the first position) rescaled to [-1, 1]: 1 always the first, -1 always the
        second, 0 none. ``consistent``: share of comparisons whose verdict survives the swap.
    """
    known = np.isfinite(forward) & np.isfinite(swapped)
    forward, swapped = np.asarray(forward)[known], np.asarray(swapped)[known]
    if not len(forward):
        return {"n": 0, "bias": None, "consistent": None}
    first_position = (forward + (1 - swapped)) / 2
    return {
        "n": len(forward),
        "bias": float((2 * first_position - 1).mean()),
        "consistent": float((verdicts(forward) == verdicts(swapped)).mean()),
    }
