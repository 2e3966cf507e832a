"""Over-optimisation in the open: gold falls while the reward that was optimised still rises (Gao et al. 2022)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppo_vs_dpo.compare.statistics.intervals import Spread, spread


def halves(prompts: int, clusters: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint sets of rows, every other cluster of prompts each."""
    group = np.arange(prompts) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    return np.flatnonzero(group % 2 == 0), np.flatnonzero(group % 2 == 1)


def over_optimised(
    gold: Sequence[np.ndarray],
    proxy: Sequence[np.ndarray],
    *,
    tests: int,
    shared: bool = False,
    clusters: Sequence[np.ndarray | None] = (),
    confidence: float = 0.95,
) -> list[dict[str, Any]]:
    """For each point of a line: does an earlier one (of lower KL, of an earlier step) have more gold and less proxy?

    The best earlier point is chosen on one half of the prompts and gold is tested on the other half: chosen and tested
    on the same ones, half of all flat lines would be marked. Marked is where gold falls *and* proxy rises, both
    one-sided at (1 - confidence) / ``tests``: a proxy that is not seen to fall is not one that rises.

    Args:
        gold: ``(P_s, K)`` gold rewards, one array a run.
        proxy: rewards of the model that was optimised, likewise.
        tests: how many points are tested in the whole report.
        confidence: 1 less the chance that a report with nothing to mark marks something.
    """
    labels = list(clusters) or [None] * len(gold)
    split = [halves(len(values), of) for values, of in zip(gold, labels, strict=True)]
    level = (1 - confidence) / max(tests, 1)

    def change(rows: list[np.ndarray], values: Sequence[np.ndarray], column: int, best: int) -> Spread | None:
        groups = [(v[r, column] - v[r, best])[:, None] for v, r in zip(values, rows, strict=True)]
        kept = [None if of is None else of[r] for of, r in zip(labels, rows, strict=True)]
        if min(len(np.unique(r if of is None else of)) for r, of in zip(rows, kept, strict=True)) < 3:
            return None
        return spread(groups, shared=shared, clusters=kept, by_skewness=False)

    found: list[dict[str, Any]] = []
    for column in range(gold[0].shape[1]):
        mark: dict[str, Any] = {"over_optimised": False}
        if column:
            choosing = [one for one, _ in split]
            means = np.mean([v[r, :column].mean(0) for v, r in zip(gold, choosing, strict=True)], axis=0)
            best = int(np.argmax(means))
            of_gold = change([other for _, other in split], gold, column, best)
            of_proxy = change([np.arange(len(v)) for v in proxy], proxy, column, best)
            if of_gold is not None and of_proxy is not None:
                falls, rises = _one_sided(of_gold, -1) <= level, _one_sided(of_proxy, 1) <= level
                ci, proxy_ci = (one.interval(confidence).ci(0) for one in (of_gold, of_proxy))
                mark = {
                    "over_optimised": bool(falls and rises),
                    "gold_fell": bool(falls),
                    "against": best,
                    "gold_change": float(of_gold.mean[0]),
                    "gold_change_ci": ci,
                    "proxy_change": float(of_proxy.mean[0]),
                    "proxy_change_ci": proxy_ci,
                }
        found.append(mark)
    return found


def _one_sided(found: Spread, sign: int) -> float:
    """p of "the change is not of this sign"."""
    if sign * found.mean[0] <= 0:
        return 1.0
    return float(found.p_value(0.0)[0]) / 2
