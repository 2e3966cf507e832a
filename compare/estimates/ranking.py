"""One ranking of all policies from all pairs: Bradley-Terry strengths, and which ranks the data leave open."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from ppo_vs_dpo.compare.statistics.intervals import jackknife, spread, without_each

# Keeps a fit finite in which one policy lost everything; moves no strength that is shown by more than 1e-3.
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
    groups: list[np.ndarray],
    names: list[str],
    *,
    reference: str = "sft",
    shared: bool = False,
    clusters: Sequence[np.ndarray | None] = (),
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Strengths of all policies relative to the reference, best first, of one run or several.

    Every strength has one pseudo-value a prompt (jackknife), and from these its interval over prompts, or over seeds
    and prompts. A policy's rank may be any that the differences of strengths leave open, each at confidence 1 - alpha
    / (M
    - 1) (Bonferroni): the rank is inside as often as the confidence says, for each policy, not for all at once.

    Args:
        pairs: ``K`` pairs of names.
        groups: ``(P_s, K)`` preferences for the first of each pair, one array a run.
        names: ``M`` policies; those in no pair are left out.
        reference: has strength 0, where it is among them.

    Returns:
        ``{"entries": [{policy, strength, ci, rank, rank_ci}], "note"}``; strengths are log-odds of a win. Without
        finite strengths, ``entries`` is empty and ``note`` says why. Of several runs, entries have ``per_seed``.
    """
    names = [name for name in names if any(name in pair for pair in pairs)]
    if len(names) < 2 or not all(is_connected(pairs, group.mean(axis=0), names) for group in groups if len(group)):
        return {"entries": [], "note": "some policy wins or loses everything: its strength is not finite."}
    if any(len(group) < 3 for group in groups):
        return {"entries": [], "note": "fewer than three prompts have a verdict on every pair."}
    matrix, values = design(pairs, names), []
    column = names.index(reference) if reference in names else 0
    for group in groups:
        whole = strengths(matrix, group.mean(axis=0))
        left_out = strengths(matrix, without_each(group))
        values.append(jackknife(left_out - left_out[:, [column]], whole - whole[column]))
    options = {"shared": shared, "clusters": clusters, "by_skewness": False}
    interval = spread(values, **options).interval(confidence)
    per_seed = np.stack([value.mean(axis=0) for value in values])
    size = len(names)
    differences = [(value[:, :, None] - value[:, None, :]).reshape(len(value), -1) for value in values]
    apart = spread(differences, **options).interval(1 - (1 - confidence) / max(size - 1, 1))
    above = apart.low.reshape(size, size) > 1e-12
    best, worst = 1 + above.sum(axis=0), size - above.sum(axis=1)
    entries = []
    for rank, i in enumerate(np.argsort(-interval.mean, kind="stable")):
        entry = {
            "policy": names[i],
            "rank": rank + 1,
            "rank_ci": [int(best[i]), int(worst[i])],
            "strength": float(interval.mean[i]),
            "ci": interval.ci(i),
        }
        entries.append(entry if len(groups) == 1 else {**entry, "per_seed": per_seed[:, i].tolist()})
    return {"entries": entries, "note": ""}
