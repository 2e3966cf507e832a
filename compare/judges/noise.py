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

from ppo_vs_dpo.compare.judges.llm import Judgement


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
        preference: ``(P,)`` mean preference over orders and repeats.
        squared: ``(P,)`` mean squared difference of two verdicts on the same question in the same order.
        differ: ``(P,)`` share of such pairs of verdicts that are not the same.
        ids: of the ``P`` prompts.
    """

    preference: np.ndarray
    squared: np.ndarray
    differ: np.ndarray
    ids: tuple[str, ...] = ()


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
    squared, differ = [], []
    for values in orders.values():
        verdicts = (1 + np.sign(np.asarray(values) - 0.5)) / 2
        first, second = np.triu_indices(len(verdicts), 1)
        if len(first):
            gap = np.abs(verdicts[first] - verdicts[second])
            squared.append(float((gap**2).mean()))
            differ.append(float((gap > 0).mean()))
    if not squared:
        return None
    preference = float(np.mean([np.mean(values) for values in orders.values()]))
    return preference, float(np.mean(squared)), float(np.mean(differ))


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
    one: Repeated, *, resamples: int, seed: int, confidence: float, clusters: np.ndarray | None = None
) -> dict[str, Any]:
    """The win rate of one pair without the judge's noise, with an interval that knows that e is an estimate, too.

    Units of evidence are resampled with all they carry, so that win rate and flip rate move together; percentiles. The
    flip rate is that of the pair itself.

    Args:
        one: from `repeated`.
        resamples: how many.
        seed: of them.
        confidence: of the interval.
        clusters: ``(P,)`` which prompts are one unit; each its own by default.

    Returns:
        ``win_rate`` and ``ci`` in [0, 1], ``flip_rate``, ``n`` prompts; or ``refused`` with the reason.
    """
    n = len(one.preference)
    e = float(flip_rate(one.squared.mean()))
    if not np.isfinite(e):
        return {"refused": "asked again, the judge answers like a coin", "n": n, "flip_rate": None}
    _, unit = np.unique(np.arange(n) if clusters is None else clusters, return_inverse=True)
    sums = np.stack([np.bincount(unit, values) for values in (one.preference, one.squared, np.ones(n))])
    units = sums.shape[1]
    rows = np.random.default_rng(seed).integers(0, units, size=(resamples, units))
    preference, squared, count = sums[:, rows].sum(axis=-1)
    errors = flip_rate(squared / count)
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = (preference / count - errors) / (1 - 2 * errors)
    # A resample in which the judge is a coin says nothing of theta: anything is possible there.
    lost = ~np.isfinite(draws)
    edge = (1 - confidence) / 2
    if lost.mean() > edge:
        return {"refused": "too noisy: within its interval the judge may be a coin", "n": n, "flip_rate": e}
    low, high = np.quantile(np.clip(draws[~lost], 0, 1), [edge, 1 - edge])
    theta = float(np.clip(rogan_gladen(one.preference.mean(), 1 - e, 1 - e), 0, 1))
    return {"win_rate": theta, "ci": [float(low), float(high)], "flip_rate": e, "n": n}


def add_corrections(
    entries: list[dict[str, Any]],
    judge: str,
    judgements: Sequence[Judgement],
    *,
    resamples: int,
    seed: int,
    confidence: float,
    unit_of: dict[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Put ``noise_corrected`` into the win rates of a judge that was asked again; both directions.

    Args:
        entries: ``report["win_rates"]``.
        judge: its name.
        judgements: all of its.
        resamples: see `corrected`.
        seed: see `corrected`.
        confidence: see `corrected`.
        unit_of: prompt id -> its unit of evidence.
    """
    for pair, one in repeated(judgements).items():
        clusters = None if unit_of is None else np.array([unit_of[identity] for identity in one.ids])
        found = corrected(one, resamples=resamples, seed=seed, confidence=confidence, clusters=clusters)
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
