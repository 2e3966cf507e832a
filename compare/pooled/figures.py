"""The figures of several runs as those of one experiment: every interval is over prompts *and* seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ppo_vs_dpo.compare.config import CompareStage
from ppo_vs_dpo.compare.estimates.controls import null_control
from ppo_vs_dpo.compare.estimates.ranking import ranking
from ppo_vs_dpo.compare.estimates.reweighted import reweighted
from ppo_vs_dpo.compare.estimates.win_rates import PairTable, Settings, reverse
from ppo_vs_dpo.compare.judges.scores import preference_by_score
from ppo_vs_dpo.compare.report.decision import find
from ppo_vs_dpo.compare.sampling.completions import Draws
from ppo_vs_dpo.compare.sampling.contenders import PROXY, Contender, uniform
from ppo_vs_dpo.compare.sampling.kl import agreement_with_labels
from ppo_vs_dpo.compare.sampling.policies import REFERENCE, Prompts
from ppo_vs_dpo.compare.statistics.intervals import LEAST_SHARE, Interval, Spread, spread
from ppo_vs_dpo.compare.statistics.rates import rate_over
from ppo_vs_dpo.compare.statistics.significance import detectable_gap, holm, label_permutation_p
from ppo_vs_dpo.preferences.judging.llm import Judgement


@dataclass
class Run:
    """One finished comparison, read back.

    Attributes:
        root: the run folder.
        seed: its seed.
        report: its ``report.json``.
        prompts: what it was judged on.
        contenders: by name.
        checkpoints: points along training, by name.
        tables: judge -> preferences of all its pairs.
        read: judge that reads -> its judgements.
        scored: the judges among them that score every completion.
        pool: the reference's draws that best-of-n selects from, or ``None``.
        settings: how it was sampled.
    """

    root: Path
    seed: int
    report: dict[str, Any]
    prompts: Prompts
    contenders: dict[str, Contender]
    checkpoints: dict[str, Contender]
    tables: dict[str, PairTable]
    scored: list[str]
    pool: Draws | None
    settings: CompareStage
    read: dict[str, list[Judgement]] = field(default_factory=dict)

    def own_draws(self) -> list[Draws]:
        """All draws of the reference at the temperature of the comparison."""
        baseline = self.contenders[REFERENCE].draws
        return [baseline] if self.pool is None else [baseline, self.pool]


def shares_prompts(runs: list[Run]) -> bool:
    """Whether all runs were judged on the same prompts."""
    return len({tuple(run.prompts.ids) for run in runs}) == 1


def spread_over(runs: list[Run], groups: list[np.ndarray], by_skewness: bool = True) -> Spread:
    """The spread over seeds and prompts of ``(P_s, K)`` values a run: crossed where all runs share prompts, else
    nested.
    """
    labels = [run.prompts.clusters for run in runs]
    return spread(groups, shared=shares_prompts(runs), clusters=labels, by_skewness=by_skewness)


def over_runs(
    values: Sequence[float],
    intervals: Sequence[Sequence[float] | None],
    settings: Settings,
    shared: bool,
    bounds: tuple[float, float] | None = None,
) -> tuple[float, list[float]]:
    """Mean over runs of a figure of which each run kept its interval only, not its values by prompt.

    Runs that share prompts: half^2 = t_{S-1}^2 s^2 / S + (mean half-width)^2, because what the prompts do to the
    figure they do to all runs alike. Runs with prompts of their own: t over runs, never narrower than `LEAST_SHARE` of
    the prompts' part.
    """
    middle, runs = float(np.mean(values)), len(values)
    if runs == 1:
        return middle, list(intervals[0] or [middle, middle])
    of_seeds = stats.t.ppf(0.5 + settings.confidence / 2, runs - 1) * float(np.std(values, ddof=1)) / np.sqrt(runs)
    widths = [ci[1] - ci[0] for ci in intervals if ci is not None and None not in ci]
    own = float(np.mean(widths)) / 2 if widths else 0.0
    half = np.hypot(of_seeds, own) if shared else max(of_seeds, LEAST_SHARE * own / np.sqrt(runs))
    low, high = middle - half, middle + half
    if bounds is not None:
        low, high = max(bounds[0], low), min(bounds[1], high)
    return middle, [float(low), float(high)]


def pooled_win_rates(runs: list[Run], judge: str, names: list[str], settings: Settings) -> list[dict[str, Any]]:
    """Win rates of all pairs that every run has; interval and p-value from one variance, over seeds and prompts."""
    pairs = [
        pair
        for pair in runs[0].tables[judge].pairs
        if set(pair) <= set(names) and all(run.tables[judge].has(*pair) for run in runs)
    ]
    entries = []
    for policy, versus in pairs:
        groups = [run.tables[judge].of(policy, versus) for run in runs]
        interval, p, units = _pooled_rate(runs, groups, settings)
        inner, _, _ = _pooled_rate(runs, groups, replace(settings, confidence=settings.both_sided))
        per_seed = [float(np.nanmean(group)) for group in groups]
        known = np.isfinite(np.stack(groups)).any(axis=0).sum() if shares_prompts(runs) else None
        entry = {
            "policy": policy,
            "versus": versus,
            "judge": judge,
            # The same prompts judged in every run are as many prompts as there are, not as many as were judged.
            "n": int(known if known is not None else sum(np.isfinite(group).sum() for group in groups)),
            "units": units,
            "decided": max(
                replace(settings, clusters=run.prompts.clusters).units_of(np.abs(group - 0.5) > 1e-12)
                for run, group in zip(runs, groups, strict=True)
            ),
            "win_rate": float(interval.mean),
            "ci": interval.ci(),
            "length_controlled": pooled_length_control(runs, policy, versus, judge, settings),
            "ties": float(np.mean([_ties(run.tables[judge], policy, versus) for run in runs])),
            "test": "seeds and prompts",
            "within": float(max(0.5 - inner.low, inner.high - 0.5)),
            "p": p,
            "per_seed": per_seed,
        }
        entries.append(entry)
    corrected = holm([entry["p"] for entry in entries])
    both = []
    for entry, p_holm in zip(entries, corrected, strict=True):
        entry["p_holm"] = float(p_holm)
        both += [entry, reverse(entry)]
    return both


def _pooled_rate(runs: list[Run], groups: list[np.ndarray], settings: Settings) -> tuple[Interval, float, int]:
    """One pooled win rate, its p-value of 1/2, and the units of evidence behind it."""
    mean = float(np.mean([np.nanmean(group) for group in groups]))
    labels = [run.prompts.clusters for run in runs]
    shared = shares_prompts(runs)
    # A judge that reads left comparisons out: of shared prompts those count that it judged in every run.
    common = np.isfinite(np.stack(groups)).all(axis=0) if shared else None
    rows = [common if shared else np.isfinite(group) for group in groups]
    kept = [group[row][:, None] for group, row in zip(groups, rows, strict=True)]
    clusters = [None if label is None else label[row] for label, row in zip(labels, rows, strict=True)]
    if min(map(len, kept)) < 2:
        return Interval(mean, 0.0, 1.0), 1.0, min(map(len, kept))
    interval, p, units = rate_over(
        [one[:, 0] for one in kept], confidence=settings.confidence, shared=shared, clusters=clusters
    )
    moved = mean - interval.mean
    if abs(moved) > 1e-12:
        # What was left out by some run is in the mean: test and interval move with it.
        low, high = (float(np.clip(side + moved, 0.0, 1.0)) for side in (interval.low, interval.high))
        p = float(spread(kept, shared=shared, clusters=clusters).p_value(0.5 - moved)[0])
        interval = Interval(mean, low, high)
    return Interval(mean, interval.low, interval.high), p, units


def _ties(table: PairTable, policy: str, versus: str) -> float:
    pair = (policy, versus) if (policy, versus) in table.pairs else (versus, policy)
    return float(np.nanmean(table.ties[:, table.pairs.index(pair)]))


def pooled_length_control(
    runs: list[Run], policy: str, versus: str, judge: str, settings: Settings
) -> dict[str, Any] | None:
    """Each run's length-controlled win rate, brought together; ``None`` where a run has none."""
    fits = [(find(run.report, policy, versus, judge) or {}).get("length_controlled") for run in runs]
    if not all(fits):
        return None
    rates = [fit["win_rate"] for fit in fits]
    middle, ci = over_runs(rates, [fit["ci"] for fit in fits], settings, shares_prompts(runs), (0.0, 1.0))
    return {
        "model": fits[0]["model"],
        "win_rate": middle,
        "ci": ci,
    }


def pooled_control(runs: list[Run], judge: str, settings: Settings, controls: int) -> dict[str, Any] | None:
    """SFT against SFT on independent draws, over all runs: every run's prompts by the exact law of the null."""
    if any(run.pool is None or judge not in run.pool.scores for run in runs):
        return None
    found, sides = [], []
    for run in runs:
        baseline = run.contenders[REFERENCE].draws
        sides.append((run.pool.scores[judge], baseline.scores[judge]))
        found.append(preference_by_score(*sides[-1], uniform(run.pool), uniform(baseline)))
    interval, _, _ = _pooled_rate(runs, [preference for preference, _ in found], settings)
    # Draws of different runs are independent under the null, whatever the prompts: one long run.
    exact = label_permutation_p(*(np.concatenate(side) for side in zip(*sides, strict=True)))
    n = len(found[0][0]) if shares_prompts(runs) else sum(len(preference) for preference, _ in found)
    mean_ties = float(np.mean([ties.mean() for _, ties in found]))
    entry = null_control(judge, n, float(interval.mean), interval.ci(), mean_ties, exact, controls)
    return {**entry, "per_seed": [float(preference.mean()) for preference, _ in found]}


def detectable_over(found: Spread, confidence: float, floor: bool = True) -> float:
    """The distance from 1/2 that is seen in four of five experiments with this spread over seeds and prompts.

    That of a noncentral t of the whole variance, or, where it is more, what the interval needs: it takes seeds and
    prompts at a t of their own.
    """
    # detectable_gap wants one unit's deviation.
    deviation = float(found.error[0]) * np.sqrt(found.units)
    freedom = float(found.freedom[0])
    gap = detectable_gap(found.units, deviation, alpha=1 - confidence, freedom=freedom, floor=floor)
    # Nine of ten at this half-width: it varies itself, which costs about one.
    return max(gap, float(found.half(confidence)[0] + stats.norm.ppf(0.9) * found.error[0]))


def pooled_power(
    runs: list[Run], entry: dict[str, Any] | None, judge: str, settings: Settings, delta: float
) -> dict[str, Any] | None:
    """What so many runs can show of one pair: from the variance of the interval, by the noncentral t.

    It holds seeds and prompts: more runs narrow both, more prompts only one of them.
    """
    if entry is None:
        return None
    pair = entry["policy"], entry["versus"]
    groups = [run.tables[judge].of(*pair)[:, None] for run in runs]
    fresh = entry.get("test") != "reweighted"
    if not fresh:
        sides = [[run.contenders[name] for name in pair] for run in runs]
        groups = [reweighted(*s, run.own_draws(), judge)[:, None] for run, s in zip(runs, sides, strict=True)]
    complete = all(np.isfinite(group).all() for group in groups)
    gap = None
    if complete and min(map(len, groups)) > 1:
        found = spread_over(runs, groups)
        gap = detectable_over(found, settings.confidence, fresh)
    return {
        "policy": entry["policy"],
        "versus": entry["versus"],
        "n": entry["n"],
        "units": entry["units"],
        "runs": len(runs),
        "deviation": float(np.std(entry["per_seed"], ddof=1)) if len(runs) > 1 else None,
        "detectable_gap": None if gap is None else min(0.5, gap),
        "detectable_gap_single_draws": None,
        "delta": delta,
        "prompts_for_equality": None,
        "power": 0.8,
        "alpha": round(1 - settings.confidence, 12),
    }


def pooled_ranking(runs: list[Run], judge: str, names: list[str], settings: Settings) -> dict[str, Any]:
    """Bradley-Terry strengths and ranks over seeds and prompts."""
    tables = [run.tables[judge] for run in runs]
    pairs = [pair for pair in tables[0].pairs if set(pair) <= set(names) and all(t.has(*pair) for t in tables)]
    if not pairs:
        return {"entries": [], "note": "no pair was judged in every run."}
    groups = [np.stack([table.of(*pair) for pair in pairs], axis=1) for table in tables]
    shared = shares_prompts(runs)
    whole = [np.isfinite(group).all(axis=1) for group in groups]
    if shared:
        whole = [np.all(whole, axis=0)] * len(runs)
    labels = [run.prompts.clusters for run in runs]
    return ranking(
        pairs,
        [group[rows] for group, rows in zip(groups, whole, strict=True)],
        names,
        shared=shared,
        clusters=[None if label is None else label[rows] for label, rows in zip(labels, whole, strict=True)],
        confidence=settings.confidence,
    )


def pooled_policy(runs: list[Run], name: str, settings: Settings) -> dict[str, Any]:
    """The entry of one policy under ``policies``, pooled."""
    own = [run.contenders[name] for run in runs]
    reports = [run.report["policies"][name] for run in runs]
    entry = pooled_point(runs, own, [report["kl"] for report in reports], settings)
    for key in ("length", "eos_rate", "tokens_per_answer"):
        entry[key] = mean_of([report.get(key) for report in reports])
    entry["quality"] = {key: mean_of([r["quality"][key] for r in reports]) for key in reports[0]["quality"]}
    moved = [report.get("displacement") for report in reports]
    entry["displacement"] = pooled_displacement(moved) if all(moved) else None
    return entry


def pooled_displacement(moved: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over runs. Runs share their held-out pairs: the interval is that of one run's number of pairs."""
    implicit = [one["implicit_reward"] for one in moved]
    found: dict[str, Any] = {key: mean_of([m[key] for m in moved]) for key in moved[0] if key != "implicit_reward"}
    found["implicit_reward"] = (
        agreement_with_labels(*(float(np.mean([one[key] for one in implicit])) for key in ("right", "n")))
        if all(implicit)
        else None
    )
    return found


def pooled_point(
    runs: list[Run], own: list[Contender], kls: list[dict[str, Any]], settings: Settings
) -> dict[str, Any]:
    """Rewards and KL of one policy, or of one checkpoint, over runs."""
    entry: dict[str, Any] = {
        "method": own[0].method,
        "point": own[0].point,
        "n_prompts": len(own[0].weights) if shares_prompts(runs) else sum(len(c.weights) for c in own),
        "draws": own[0].draws.shape[1],
    }
    for key, judge in (("gold_reward", "gold"), ("proxy_reward", PROXY)):
        entry[key], entry[f"{key}_ci"], entry[f"{key}_per_seed"] = None, None, None
        if all(judge in c.draws.scores for c in own):
            groups = [c.score(judge)[:, None] for c in own]
            interval = spread_over(runs, groups).interval(settings.confidence)
            entry[key], entry[f"{key}_ci"] = float(interval.mean[0]), interval.ci(0)
            entry[f"{key}_per_seed"] = [float(group.mean()) for group in groups]
    entry["eos_rate"] = float(np.mean([c.eos_rate().mean() for c in own]))
    if any(kl["mean"] is None for kl in kls):
        return {**entry, "kl": {"mean": None, "ci": None, "kind": "not measured"}}
    per_seed = [kl["mean"] for kl in kls]
    if own[0].method == "best_of_n":
        middle, ci = over_runs(per_seed, [kl["ci"] for kl in kls], settings, shares_prompts(runs))
        ci = ci if any(kl["ci"] for kl in kls) else None
        bound = float(np.mean([kl["bound"] for kl in kls]))
        kl = {"mean": middle, "ci": ci, "kind": kls[0]["kind"], "bound": bound, "per_seed": per_seed}
    else:
        interval = spread_over(runs, [c.kl()[:, None] for c in own]).interval(settings.confidence, (0.0, np.inf))
        kl = {"mean": float(interval.mean[0]), "ci": interval.ci(0), "kind": kls[0]["kind"], "per_seed": per_seed}
    return {**entry, "kl": kl}


def mean_of(values: list[float | None]) -> float | None:
    """The mean, or ``None`` where a value is missing."""
    return None if any(value is None for value in values) else float(np.mean(values))


def pooled_temperatures(runs: list[Run], settings: Settings) -> list[dict[str, Any]]:
    """Policies at the further temperatures that every run has."""
    by_key = [{(e["policy"], e["temperature"]): e for e in run.report["temperatures"]} for run in runs]
    shared = shares_prompts(runs)
    pooled = []
    for key, first in by_key[0].items():
        entries = [one[key] for one in by_key if key in one]
        if len(entries) < len(runs):
            continue
        entry = {name: first[name] for name in ("policy", "temperature")}
        entry |= {name: mean_of([e[name] for e in entries]) for name in ("length", "eos_rate")}
        kls = [e["kl"] for e in entries]
        entry["kl"] = {"mean": None, "ci": None, "kind": kls[0]["kind"]}
        if all(kl["mean"] is not None for kl in kls):
            middle, ci = over_runs([kl["mean"] for kl in kls], [kl["ci"] for kl in kls], settings, shared)
            entry["kl"] |= {"mean": middle, "ci": ci}
        entry["scores"], entry["win_rates"] = {}, []
        for judge in first["scores"]:
            scores = [e["scores"][judge] for e in entries]
            middle, ci = over_runs([s["mean"] for s in scores], [s["ci"] for s in scores], settings, shared)
            entry["scores"][judge] = {"mean": middle, "ci": ci}
        for number, rate in enumerate(first["win_rates"]):
            rates = [e["win_rates"][number] for e in entries]
            middle, ci = over_runs(
                [r["win_rate"] for r in rates], [r["ci"] for r in rates], settings, shared, (0.0, 1.0)
            )
            about = {
                "n": rates[0]["n"] if shared else sum(r["n"] for r in rates),
                "ties": mean_of([r["ties"] for r in rates]),
            }
            entry["win_rates"].append({**rate, **about, "win_rate": middle, "ci": ci})
        pooled.append(entry)
    return pooled
