"""From contenders and judges to the figures of the report: policies, win rates, control, frontier, matched KL."""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from compare.best_of_n import kl_bound
from compare.completions import Draws
from compare.contenders import PROXY, Contender, best_of_n_kl, pair_preference, uniform
from compare.frontier import curve, matched_win_rate, over_optimised
from compare.judges.scores import preference_by_score
from compare.length_control import length_controlled
from compare.policies import REFERENCE
from compare.statistics import (
    detectable_gap,
    holm,
    mean_interval,
    permutation_test,
    prompts_needed,
    sign_test,
    wilson,
    win_rate_interval,
)


@dataclass(frozen=True)
class Settings:
    """How figures get their intervals."""

    resamples: int = 2000
    seed: int = 0
    confidence: float = 0.95

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the interval functions."""
        return {"resamples": self.resamples, "seed": self.seed, "confidence": self.confidence}


def describe(contender: Contender, judges: list[str], settings: Settings, bon_logprob: np.ndarray | None) -> dict:
    """The entry of one policy under ``policies``."""
    scores = {judge: contender.score(judge) for judge in judges}
    columns = [contender.length(), contender.eos_rate(), *(s for s in scores.values() if s is not None)]
    interval = mean_interval(np.stack(columns, axis=1), **settings.kwargs())
    entry: dict[str, Any] = {
        "method": contender.method,
        "point": contender.point,
        "n_prompts": len(contender.weights),
        "draws": contender.draws.shape[1],
        "gold_reward": None,
        "gold_reward_ci": None,
        "proxy_reward": None,
        "proxy_reward_ci": None,
    }
    position = 2
    for judge, values in scores.items():
        if values is None:
            continue
        prefix = {"gold": "gold_reward", PROXY: "proxy_reward"}.get(judge)
        if prefix:
            entry[prefix], entry[f"{prefix}_ci"] = float(interval.mean[position]), interval.ci(position)
        else:
            other = entry.setdefault("other_scores", {})
            other[judge] = {"mean": float(interval.mean[position]), "ci": interval.ci(position)}
        position += 1
    entry["kl"] = describe_kl(contender, settings, bon_logprob)
    entry["length"], entry["length_ci"] = float(interval.mean[0]), interval.ci(0)
    entry["eos_rate"] = float(interval.mean[1])
    return entry


def describe_kl(contender: Contender, settings: Settings, bon_logprob: np.ndarray | None) -> dict[str, Any]:
    """KL to the reference with its interval and how it was estimated."""
    if contender.method == "best_of_n":
        if bon_logprob is None:
            return {"mean": kl_bound(contender.n), "ci": None, "kind": "bound", "bound": kl_bound(contender.n)}
        found = best_of_n_kl(contender, bon_logprob)
        interval = mean_interval(found["estimate"], **settings.kwargs())
        return {"mean": interval.mean, "ci": interval.ci(), "kind": "beirami", "bound": found["bound"]}
    if contender.kl() is None:
        return {"mean": None, "ci": None, "kind": "not measured"}
    measures = np.stack([contender.kl(name) for name in ("kl", "k1", "k3")], axis=1)
    interval = mean_interval(measures, **settings.kwargs())
    error = measures.std(axis=0, ddof=1) / np.sqrt(len(measures)) if len(measures) > 1 else np.full(3, np.nan)
    return {
        "mean": float(interval.mean[0]),
        "ci": interval.ci(0),
        "kind": "exact per token",
        "standard_error": float(error[0]),
        "k1": {"mean": float(interval.mean[1]), "ci": interval.ci(1), "standard_error": float(error[1])},
        "k3": {"mean": float(interval.mean[2]), "ci": interval.ci(2), "standard_error": float(error[2])},
    }


@dataclass
class PairTable:
    """Preferences of all unordered pairs by one judge.

    Attributes:
        pairs: names ``(policy, versus)``.
        preferences: ``(P, K)``.
        ties: ``(P, K)``.

    A judge that reads may leave comparisons out: these are NaN.
    """

    pairs: list[tuple[str, str]]
    preferences: np.ndarray
    ties: np.ndarray

    def of(self, policy: str, versus: str) -> np.ndarray:
        """``(P,)`` preference for ``policy`` over ``versus``, whichever way the pair is stored."""
        if (policy, versus) in self.pairs:
            return self.preferences[:, self.pairs.index((policy, versus))]
        return 1.0 - self.preferences[:, self.pairs.index((versus, policy))]

    def has(self, policy: str, versus: str) -> bool:
        """Whether the pair was judged."""
        return (policy, versus) in self.pairs or (versus, policy) in self.pairs

    def complete(self) -> np.ndarray:
        """Preferences ``(P', K)`` of the prompts on which every pair was judged."""
        return self.preferences[np.isfinite(self.preferences).all(axis=1)]


def judge_pairs(contenders: list[Contender], judge: str) -> PairTable:
    """All unordered pairs by a scoring judge; pairs that share draws and cannot be made independent are left out."""
    pairs, preferences, ties = [], [], []
    for i, ours in enumerate(contenders):
        for theirs in contenders[:i]:
            found = pair_preference(ours, theirs, judge)
            if found is not None:
                pairs.append((ours.name, theirs.name))
                preferences.append(found[0])
                ties.append(found[1])
    return PairTable(pairs, np.stack(preferences, axis=1), np.stack(ties, axis=1))


def win_rates(
    table: PairTable, judge: str, settings: Settings, lengths: dict[str, np.ndarray] | None = None
) -> list[dict[str, Any]]:
    """Both directions of every pair: they add up to 1 exactly.

    Args:
        table: preferences of the unordered pairs.
        judge: who judged.
        settings: of the intervals.
        lengths: policy -> mean length ``(P,)``; with it, length-controlled win rates are added.
    """
    known = np.isfinite(table.preferences)
    if not known.all():
        return _partial_win_rates(table, judge, settings, lengths)
    interval = win_rate_interval(table.preferences, **settings.kwargs())
    p_values = permutation_test(table.preferences, resamples=settings.resamples * 5 - 1, seed=settings.seed)
    corrected = holm(p_values)
    n = len(table.preferences)
    entries = []
    for column, (policy, versus) in enumerate(table.pairs):
        preference = table.preferences[:, column]
        win_rate, (low, high) = float(interval.mean[column]), interval.ci(column)
        wilson_low, wilson_high = wilson(preference.sum(), n, settings.confidence)
        shared = {
            "judge": judge,
            "n": n,
            "ties": float(table.ties[:, column].mean()),
            "p": float(p_values[column]),
            "p_holm": float(corrected[column]),
            "p_sign": sign_test(preference),
        }
        entry = {
            "policy": policy,
            "versus": versus,
            "win_rate": win_rate,
            "ci": [low, high],
            "wilson": [wilson_low, wilson_high],
            "length_controlled": None,
            **shared,
        }
        if lengths is not None:
            entry["length_controlled"] = _controlled(preference, lengths[policy] - lengths[versus], settings)
        entries += [entry, reverse(entry)]
    return entries


def _partial_win_rates(
    table: PairTable, judge: str, settings: Settings, lengths: dict[str, np.ndarray] | None
) -> list[dict[str, Any]]:
    """Pair by pair, each on the prompts that have a verdict; corrected for all pairs together."""
    entries = []
    for column, pair in enumerate(table.pairs):
        rows = np.isfinite(table.preferences[:, column])
        alone = PairTable([pair], table.preferences[rows][:, [column]], table.ties[rows][:, [column]])
        of_rows = None if lengths is None else {name: lengths[name][rows] for name in pair}
        entries += win_rates(alone, judge, settings, of_rows)
    corrected = holm([entry["p"] for entry in entries[::2]])
    for number, entry in enumerate(entries):
        entry["p_holm"] = float(corrected[number // 2])
    return entries


def reverse(entry: dict[str, Any]) -> dict[str, Any]:
    """The same comparison seen from the other side."""

    def swap(interval: list[float]) -> list[float]:
        return [1.0 - interval[1], 1.0 - interval[0]]

    controlled = entry["length_controlled"]
    if controlled is not None:
        controlled = {"win_rate": 1.0 - controlled["win_rate"], "ci": swap(controlled["ci"])}
    return {
        **entry,
        "policy": entry["versus"],
        "versus": entry["policy"],
        "win_rate": 1.0 - entry["win_rate"],
        "ci": swap(entry["ci"]),
        "wilson": swap(entry["wilson"]),
        "length_controlled": controlled,
    }


def _controlled(preference: np.ndarray, difference: np.ndarray, settings: Settings) -> dict[str, Any] | None:
    """The length-controlled win rate, or ``None`` where it cannot be fitted."""
    try:
        fit = length_controlled(preference, difference, confidence=settings.confidence)
    except ValueError:
        return None
    return {"win_rate": fit.win_rate, "ci": list(fit.ci)}


def control(baseline: Draws, pool: Draws | None, judge: str, settings: Settings) -> dict[str, Any] | None:
    """SFT against SFT on independent draws: the yardstick must say "no difference"."""
    if pool is None or judge not in pool.scores:
        return None
    preference, ties = preference_by_score(
        pool.scores[judge], baseline.scores[judge], uniform(pool), uniform(baseline)
    )
    interval = win_rate_interval(preference[:, None], **settings.kwargs())
    low, high = interval.ci(0)
    return {
        "policy": REFERENCE,
        "versus": REFERENCE,
        "judge": judge,
        "n": len(preference),
        "win_rate": float(interval.mean[0]),
        "ci": [low, high],
        "ties": float(ties.mean()),
        "contains_half": bool(low <= 0.5 <= high),
    }


def power_line(table: PairTable, policy: str, versus: str, settings: Settings) -> dict[str, Any]:
    """What this many prompts can show, and how many the observed gap would need."""
    preference = table.of(policy, versus)
    preference = preference[np.isfinite(preference)]
    n, gap = len(preference), float(preference.mean() - 0.5)
    deviation = float(preference.std(ddof=1)) if n > 1 else 0.5
    return {
        "policy": policy,
        "versus": versus,
        "n": n,
        "observed_gap": gap,
        "deviation": deviation,
        "detectable_gap": detectable_gap(n, deviation),
        "detectable_gap_single_draws": detectable_gap(n),
        "prompts_needed": prompts_needed(gap, deviation),
        "power": 0.8,
        "alpha": 0.05,
    }


def matched_kl(contenders: list[Contender], table: PairTable, a: str, b: str, settings: Settings) -> dict[str, Any]:
    """Two methods at the KL of the closer of their main policies, along their sweeps from the reference on.

    Returns:
        The figures, or ``{"refused": reason}``: nothing is extrapolated.
    """
    by_name = {c.name: c for c in contenders}
    if a not in by_name or b not in by_name or by_name[a].kl() is None or by_name[b].kl() is None:
        return {"policy": a, "versus": b, "refused": "the KL of one of them was not measured"}
    swept = [name for name in by_name if by_name[name].method in (REFERENCE, "ppo", "dpo")]
    judged = all(table.has(one, two) for one, two in combinations(swept, 2))
    if not judged or not np.isfinite(table.preferences).all():
        return {"policy": a, "versus": b, "refused": "the judge did not judge every point of both sweeps"}
    start = [by_name[REFERENCE]]
    sides = [start + curve(contenders, by_name[name].method) for name in (a, b)]
    n = len(by_name[a].weights)
    preferences = np.full((n, len(sides[0]), len(sides[1])), 0.5)
    for i, ours in enumerate(sides[0]):
        for j, theirs in enumerate(sides[1]):
            if ours.name != theirs.name:
                preferences[:, i, j] = table.of(ours.name, theirs.name)
    kl = [np.stack([c.kl() for c in side], axis=1) for side in sides]
    main = [[c.name for c in side].index(name) for side, name in zip(sides, (a, b), strict=True)]
    try:
        found = matched_win_rate(*kl, preferences, *main, **settings.kwargs())
    except ValueError as error:
        return {"policy": a, "versus": b, "refused": f"{error}; nothing is extrapolated"}
    weights = found.pop("weights")
    found["points"] = {
        name: {c.name: w for c, w in zip(side, weight, strict=True) if w > 0}
        for name, side, weight in zip((a, b), sides, weights, strict=True)
    }
    return {"policy": a, "versus": b, **found}


def frontier(contenders: list[Contender], policies: dict[str, dict], settings: Settings) -> list[dict[str, Any]]:
    """Points of every method by rising KL; over-optimisation marked where gold is known."""
    points = []
    for method in ("ppo", "dpo"):
        line = curve(contenders, method)
        if not line:
            continue
        marks: list[dict[str, Any]] = [{} for _ in line]
        if all("gold" in c.draws.scores and PROXY in c.draws.scores for c in line):
            gold = np.stack([c.score("gold") for c in line], axis=1)
            proxy = np.stack([c.score(PROXY) for c in line], axis=1)
            marks = over_optimised([c.kl().mean() for c in line], gold, proxy, **settings.kwargs())
        for contender, mark in zip(line, marks, strict=True):
            if mark.get("over_optimised"):
                mark["against"] = line[mark["against"]].name
            else:
                mark.pop("against", None)
            points.append(_point(contender.name, policies[contender.name], mark))
    for contender in contenders:
        if contender.method == "best_of_n":
            points.append(_point(contender.name, policies[contender.name], {}))
    return points


def _point(name: str, entry: dict[str, Any], mark: dict[str, Any]) -> dict[str, Any]:
    keys = ("method", "point", "kl", "gold_reward", "gold_reward_ci", "proxy_reward", "proxy_reward_ci", "eos_rate")
    point = {"policy": name, **{key: entry[key] for key in keys}}
    if point["kl"]["mean"] is not None:
        point["sqrt_kl"] = float(np.sqrt(max(point["kl"]["mean"], 0.0)))
    return {**point, **mark}
