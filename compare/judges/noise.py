"""How often a judge disagrees with itself when it is asked again, and what its win rates are without that noise.

A judge that flips its verdict with probability e, whichever way it leans, pulls every win rate towards one half:

    p = theta (1 - e) + (1 - theta) e,      so      theta = (p - e) / (1 - 2 e).

That is Rogan and Gladen's estimator (1978; for LLM judges arXiv 2511.21140) with sensitivity and specificity 1 - e,
and e can be seen without any labels: two verdicts v, v' in {0, 1/2, 1} on the same question differ by
E (v - v')^2 = 2 e (1 - e). What the judge is wrong about *every* time cannot be seen in this way, and is not
corrected. Where close questions are flipped more often than clear ones, this e is below the mean flip rate (Jensen),
and the correction too small rather than too large.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppo_vs_dpo.compare.statistics.intervals import mean_interval
from ppo_vs_dpo.compare.statistics.rates import rate_over
from ppo_vs_dpo.preferences.judging.llm import Judgement


def rogan_gladen(p: np.ndarray | float, sensitivity: float, specificity: float) -> np.ndarray | float:
    """True wins behind a share ``p`` of judged wins: (p + specificity - 1) / (sensitivity + specificity - 1).

    Raises:
        ValueError: the judge is no better than a coin.
    """
    if sensitivity + specificity <= 1:
        raise ValueError("sensitivity + specificity must be above 1: such verdicts say nothing")
    return (p + specificity - 1) / (sensitivity + specificity - 1)


def flip_rate(squared_difference: np.ndarray | float) -> np.ndarray | float:
    """e from the mean squared difference D = 2 e (1 - e) of two verdicts; NaN from D = 1/2 on, where it is a coin."""
    difference = np.asarray(squared_difference, dtype=np.float64)
    return np.where(difference < 0.5, (1 - np.sqrt(np.clip(1 - 2 * difference, 0, None))) / 2, np.nan)


@dataclass(frozen=True)
class Repeated:
    """What the repeats of one pair of policies say, prompt by prompt.

    Attributes:
        preference: ``(P,)`` mean verdict over orders and repeats: 1, 1/2 or 0 each, whatever its probability, because
            it is verdicts that are flipped.
        squared: ``(P,)`` mean squared difference of two verdicts on the same question in the same order.
        differ: ``(P,)`` share of such pairs of verdicts that are not the same.
        ids: of the ``P`` prompts.
    """

    preference: np.ndarray
    squared: np.ndarray
    differ: np.ndarray
    ids: tuple[str, ...] = ()

    def of(self, ids: Sequence[str]) -> "Repeated":
        """The same for some of its prompts, in their order."""
        row_of = {identity: row for row, identity in enumerate(self.ids)}
        rows = [row_of[identity] for identity in ids]
        return Repeated(self.preference[rows], self.squared[rows], self.differ[rows], tuple(ids))


def repeated(judgements: Sequence[Judgement]) -> dict[tuple[str, str], Repeated]:
    """Pair of policies -> its repeats; prompts on which nothing was answered twice in one order are left out."""
    by_question: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}
    for one in judgements:
        if one.preference is not None:
            orders = by_question.setdefault((one.policy, one.versus), {}).setdefault(one.prompt_id, {})
            orders.setdefault(one.order, []).append(one.preference)
    found = {}
    for pair, prompts in by_question.items():
        rows = {i: row for i, o in prompts.items() if len(o) == 2 and (row := _of_prompt(o)) is not None}
        if rows:
            found[pair] = Repeated(*np.array(list(rows.values())).T, tuple(rows))
    return found


def _of_prompt(orders: dict[str, list[float]]) -> tuple[float, float, float] | None:
    squared, differ, means = [], [], []
    for values in orders.values():
        verdicts = (1 + np.sign(np.asarray(values) - 0.5)) / 2
        means.append(float(verdicts.mean()))
        first, second = np.triu_indices(len(verdicts), 1)
        if len(first):
            gap = np.abs(verdicts[first] - verdicts[second])
            squared.append(float((gap**2).mean()))
            differ.append(float((gap > 0).mean()))
    if not squared:
        return None
    return float(np.mean(means)), float(np.mean(squared)), float(np.mean(differ))


def self_disagreement(judgements: Sequence[Judgement], repeats: int) -> dict[str, Any] | None:
    """How often a judge contradicts itself, over all pairs; ``None`` where it was not asked again.

    Returns:
        ``repeats``, ``n`` prompts and pairs, ``rate`` (share of two verdicts on the same question in the same order
        that differ, ties counted as verdicts) and ``flip_rate`` e.
    """
    if repeats < 2:
        return None
    found = list(repeated(judgements).values())
    n = sum(len(one.preference) for one in found)
    if not n:
        return {"repeats": repeats, "n": 0, "rate": None, "flip_rate": None}
    squared = float(np.concatenate([one.squared for one in found]).mean())
    e = float(flip_rate(squared))
    return {
        "repeats": repeats,
        "n": n,
        "rate": float(np.concatenate([one.differ for one in found]).mean()),
        "flip_rate": e if np.isfinite(e) else None,
    }


def corrected(
    runs: Sequence[Repeated],
    *,
    confidence: float,
    shared: bool = False,
    clusters: Sequence[np.ndarray | None] = (),
) -> dict[str, Any]:
    """The win rate of one pair without the judge's noise, with an interval that knows that e is an estimate, too.

    Each prompt has one value, by the delta method:

        theta + (x - p) / (1 - 2 e) + (2 theta - 1) (d - D) / (2 (1 - 2 e)^2)

    with its preference x and its squared difference d. Their mean is theta and their spread theta's, so the interval
    is that of any win rate. The flip rate is that of the pair itself, and of each run.

    Args:
        runs: from `repeated`, one a run.

    Returns:
        ``win_rate`` and ``ci`` in [0, 1], ``flip_rate``, ``n`` prompts; or ``refused`` with the reason.
    """
    labels, values, rates = list(clusters) or [None] * len(runs), [], []
    n = len(runs[0].preference) if shared else sum(len(one.preference) for one in runs)
    for one, of in zip(runs, labels, strict=True):
        e = float(flip_rate(one.squared.mean()))
        if not np.isfinite(e):
            return {"refused": "asked again, the judge answers like a coin", "n": n, "flip_rate": None}
        rates.append(e)
        if len(np.unique(np.arange(len(one.squared)) if of is None else of)) < 2:
            return {"refused": "fewer than two prompts were asked again", "n": n, "flip_rate": float(np.mean(rates))}
        if mean_interval(one.squared, confidence=confidence, clusters=of).high >= 0.5:
            why = "too noisy: within its interval the judge may be a coin"
            return {"refused": why, "n": n, "flip_rate": float(np.mean(rates))}
        p, left = float(one.preference.mean()), 1 - 2 * e
        theta = float(rogan_gladen(p, 1 - e, 1 - e))
        of_rate = (2 * theta - 1) * (one.squared - one.squared.mean()) / (2 * left**2)
        values.append(theta + (one.preference - p) / left + of_rate)
    interval, _, _ = rate_over(values, confidence=confidence, shared=shared, clusters=labels)
    return {"win_rate": interval.mean, "ci": interval.ci(), "flip_rate": float(np.mean(rates)), "n": n}


def add_corrections(
    entries: list[dict[str, Any]],
    judge: str,
    runs: Sequence[Sequence[Judgement]],
    *,
    confidence: float,
    shared: bool = False,
    unit_of: Sequence[dict[str, int] | None] = (),
) -> list[dict[str, Any]]:
    """Put ``noise_corrected`` into the win rates of a judge that was asked again; both directions.

    ``runs`` has all of the judge's judgements, run by run. With ``shared`` those prompts count that it was asked
    about again in every run; ``unit_of``: of each run, prompt id -> its unit of evidence.
    """
    units = list(unit_of) or [None] * len(runs)
    found_of = [repeated(judgements) for judgements in runs]
    for pair in found_of[0]:
        own = [found[pair] for found in found_of if pair in found]
        if len(own) < len(runs):
            continue
        if shared and len(own) > 1:
            common = [i for i in own[0].ids if all(i in set(one.ids) for one in own[1:])]
            if not common:
                continue
            own = [one.of(common) for one in own]
        clusters = [
            None if of is None else np.array([of[i] for i in one.ids]) for one, of in zip(own, units, strict=True)
        ]
        found = corrected(own, confidence=confidence, shared=shared and len(own) > 1, clusters=clusters)
        for entry in entries:
            if entry["judge"] != judge:
                continue
            if (entry["policy"], entry["versus"]) == pair:
                entry["noise_corrected"] = found
            elif (entry["versus"], entry["policy"]) == pair:
                entry["noise_corrected"] = _turned(found)
    return entries


def _turned(found: dict[str, Any]) -> dict[str, Any]:
    if "refused" in found:
        return dict(found)
    low, high = found["ci"]
    return {**found, "win_rate": 1.0 - found["win_rate"], "ci": [1.0 - high, 1.0 - low]}
