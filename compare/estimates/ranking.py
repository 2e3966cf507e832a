"""One ranking of all policies from all pairs: Bradley-Terry strengths with bootstrap intervals."""

from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from ppo_vs_dpo.compare.estimates.statistics import resampling_weights

# Keeps a resample finite in which one policy lost everything; moves no strength that is shown by more than 1e-3.
RIDGE = 1e-4


def design(pairs: list[tuple[str, str]], names: list[str]) -> np.ndarray:
    """``(K, M)``: +1 in the column of the first of a pair, -1 in that of the second."""
    matrix = np.zeros((len(pairs), len(names)))
    for row, (first, second) in enumerate(pairs):
        matrix[row, names.index(first)], matrix[row, names.index(second)] = 1.0, -1.0
    return matrix


def strengths(matrix: np.ndarray, win_rates: np.ndarray, iterations: int = 60) -> np.ndarray:
    """Maximum-likelihood strengths in log-odds, mean 0, by Newton's method; pairs count equally.

    At the optimum wins_i = sum_j sigma(s_i - s_j) over the pairs of i (papers.md 3.6.2).

    Args:
        matrix: from `design`.
        win_rates: ``(..., K)`` of the first of each pair; leading axes are fitted at once.

    Returns:
        ``(..., M)``.
    """
    win_rates = np.asarray(win_rates, dtype=np.float64)
    size = matrix.shape[1]
    s = np.zeros((*win_rates.shape[:-1], size))
    # The likelihood knows differences only; this fixes the mean.
    anchor = np.full((size, size), 1.0 / size)
    for _ in range(iterations):
        p = expit(s @ matrix.T)
        gradient = (win_rates - p) @ matrix - RIDGE * s
        hessian = np.einsum("...k,ki,kj->...ij", p * (1 - p), matrix, matrix) + RIDGE * np.eye(size) + anchor
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        step *= np.minimum(1.0, 2.0 / np.maximum(np.abs(step).max(axis=-1, keepdims=True), 1e-12))
        s = s + step
        if np.abs(step).max() < 1e-11:
            break
    return s - s.mean(axis=-1, keepdims=True)


def is_connected(pairs: list[tuple[str, str]], win_rates: np.ndarray, names: list[str]) -> bool:
    """Whether finite strengths exist: everyone beats everyone along some chain of wins (Ford 1957)."""
    graph = np.zeros((len(names), len(names)))
    for (first, second), win_rate in zip(pairs, win_rates, strict=True):
        i, j = names.index(first), names.index(second)
        graph[i, j] += win_rate > 0
        graph[j, i] += win_rate < 1
    return connected_components(csr_array(graph), directed=True, connection="strong")[0] == 1


def ranking(
    pairs: list[tuple[str, str]],
    preferences: np.ndarray,
    names: list[str],
    *,
    reference: str = "sft",
    resamples: int = 500,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Strengths of all policies relative to the reference, best first.

    Args:
        pairs: ``K`` pairs of names.
        preferences: ``(P, K)`` for the first of each pair.
        names: ``M`` policies; those in no pair are left out.
        reference: has strength 0, where it is among them.

    Returns:
        ``{"entries": [{policy, strength, ci, rank, rank_ci}], "note"}``; strengths are log-odds of a win. Without
        finite strengths, ``entries`` is empty and ``note`` says why.
    """
    names = [name for name in names if any(name in pair for pair in pairs)]
    if len(preferences) < 2:
        return {"entries": [], "note": "fewer than two prompts have a verdict on every pair."}
    win_rates = preferences.mean(axis=0)
    if len(names) < 2 or not is_connected(pairs, win_rates, names):
        return {"entries": [], "note": "some policy wins or loses everything: its strength is not finite."}
    matrix = design(pairs, names)
    point = strengths(matrix, win_rates)
    resampled = strengths(matrix, resampling_weights(len(preferences), resamples, seed) @ preferences)
    if reference in names:
        column = names.index(reference)
        point, resampled = point - point[column], resampled - resampled[:, [column]]
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    ranks = 1 + (resampled[:, None, :] > resampled[:, :, None]).sum(-1)
    best, worst = np.quantile(ranks, [tail, 1 - tail], axis=0, method="nearest")
    entries = [
        {
            "policy": names[i],
            "rank": rank + 1,
            "rank_ci": [int(best[i]), int(worst[i])],
            "strength": float(point[i]),
            "ci": [float(low[i]), float(high[i])],
        }
        for rank, i in enumerate(np.argsort(-point, kind="stable"))
    ]
    return {"entries": entries, "note": ""}
