"""The figures of several runs as those of one experiment: every interval is over prompts *and* seeds."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ppo_vs_dpo.compare.estimates.ranking import design, is_connected, strengths
from ppo_vs_dpo.compare.estimates.statistics import (
    Interval,
    crossed_interval,
    holm,
    nested_interval,
    resampling_weights,
)
from ppo_vs_dpo.compare.estimates.win_rates import PairTable, Settings, reverse
from ppo_vs_dpo.compare.judges.scores import preference_by_score
from ppo_vs_dpo.compare.sampling.completions import Draws
from ppo_vs_dpo.compare.sampling.contenders import PROXY, Contender, uniform
from ppo_vs_dpo.compare.sampling.policies import REFERENCE, Prompts


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
        scored: the judges among them that score every completion.
        pool: the reference's draws that best-of-n selects from, or ``None``.
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


Pooling = Callable[[list[np.ndarray]], Interval]


def shares_prompts(runs: list[Run]) -> bool:
    """Whether all runs were judged on the same prompts."""
    return len({tuple(run.prompts.ids) for run in runs}) == 1


def pooling(runs: list[Run], settings: Settings, bounds: tuple[float, float] | None = None) -> Pooling:
    """The interval over seeds and prompts: crossed where all runs share prompts, nested where each has its own."""
    if shares_prompts(runs):
        return lambda groups: crossed_interval(np.stack(groups), bounds=bounds, **settings.kwargs())
    return lambda groups: nested(groups, settings, bounds)


def nested(groups: list[np.ndarray], settings: Settings, bounds: tuple[float, float] | None = None) -> Interval:
    """`nested_interval`, never narrower than the prompts' share: a few seeds may agree by luck.

    With two seeds a t interval covers as it should on average, and is absurdly narrow whenever the two happen to
    agree; what their prompts leave open is known from each seed alone.
    """
    interval = nested_interval(groups, **settings.kwargs())
    z = stats.norm.ppf(0.5 + settings.confidence / 2)
    shares = [group.var(axis=0, ddof=1) / len(group) for group in groups if len(group) > 1]
    half = z * np.sqrt(np.sum(shares, axis=0)) / len(groups) if shares else 0.0
    low, high = np.minimum(interval.low, interval.mean - half), np.maximum(interval.high, interval.mean + half)
    return (
        Interval(interval.mean, low, high)
        if bounds is None
        else Interval(interval.mean, np.clip(low, *bounds), np.clip(high, *bounds))
    )


def over_runs(
    values: Sequence[float],
    intervals: Sequence[Sequence[float] | None],
    settings: Settings,
    bounds: tuple[float, float] | None = None,
) -> tuple[float, list[float]]:
    """Mean of one figure a run with a t interval over runs, never narrower than the prompts' share of it.

    Runs may agree by luck; each run's own interval then says how far prompts alone could move the mean.
    """
    middle = float(np.mean(values))
    if len(values) == 1:
        return middle, list(intervals[0] or [middle, middle])
    spread = nested_interval([np.array([[value]]) for value in values], **settings.kwargs())
    low, high = spread.ci(0)
    widths = [ci[1] - ci[0] for ci in intervals if ci is not None and None not in ci]
    half = float(np.mean(widths)) / np.sqrt(len(values)) / 2 if widths else 0.0
    low, high = min(low, middle - half), max(high, middle + half)
    if bounds is not None:
        low, high = max(bounds[0], low), min(bounds[1], high)
    return middle, [float(low), float(high)]


def pooled_win_rates(runs: list[Run], judge: str, names: list[str], settings: Settings) -> list[dict[str, Any]]:
    """Win rates of all pairs that every run has; p-values by a t-test on the runs' win rates."""
    pairs = [
        pair
        for pair in runs[0].tables[judge].pairs
        if set(pair) <= set(names) and all(run.tables[judge].has(*pair) for run in runs)
    ]
    groups = [np.stack([run.tables[judge].of(*pair) for pair in pairs], axis=1) for run in runs]
    complete = all(np.isfinite(group).all() for group in groups)
    if complete:
        whole = pooling(runs, settings, (0.0, 1.0))(groups)
        intervals = [whole.ci(column) for column in range(len(pairs))]
    else:
        # A judge that reads left comparisons out: each run counts those that it has.
        intervals = [
            nested([_known(group[:, [k]]) for group in groups], settings, (0.0, 1.0)).ci(0) for k in range(len(pairs))
        ]
    of_seed = np.stack([np.nanmean(group, axis=0) for group in groups])
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        # Runs that agree in every digit have no spread to test against: p is then 1.
        warnings.simplefilter("ignore", RuntimeWarning)
        p_values = np.nan_to_num(stats.ttest_1samp(of_seed, 0.5, axis=0).pvalue, nan=1.0)
    corrected = holm(p_values)
    entries = []
    for column, (policy, versus) in enumerate(pairs):
        entry = {
            "policy": policy,
            "versus": versus,
            "judge": judge,
            "n": int(sum(np.isfinite(group[:, column]).sum() for group in groups)),
            "win_rate": float(of_seed[:, column].mean()),
            "ci": intervals[column],
            "wilson": intervals[column],
            "length_controlled": pooled_length_control(runs, policy, versus, judge, settings),
            "ties": float(np.mean([_ties(run.tables[judge], policy, versus) for run in runs])),
            "p": float(p_values[column]),
            "p_holm": float(corrected[column]),
            "per_seed": of_seed[:, column].tolist(),
        }
        backwards = {**reverse(entry), "per_seed": (1.0 - of_seed[:, column]).tolist()}
        entries += [entry, backwards]
    for entry in entries:
        entry.pop("wilson")  # of one run's prompts; there is none over seeds
    return entries


def _known(column: np.ndarray) -> np.ndarray:
    return column[np.isfinite(column[:, 0])]


def _ties(table: PairTable, policy: str, versus: str) -> float:
    pair = (policy, versus) if (policy, versus) in table.pairs else (versus, policy)
    return float(np.nanmean(table.ties[:, table.pairs.index(pair)]))


def entry_of(run: Run, policy: str, versus: str, judge: str) -> dict[str, Any] | None:
    """A win rate of one run's own report."""
    wanted = (policy, versus, judge)
    entries = run.report["win_rates"]
    return next((e for e in entries if (e["policy"], e["versus"], e["judge"]) == wanted), None)


def pooled_length_control(
    runs: list[Run], policy: str, versus: str, judge: str, settings: Settings
) -> dict[str, Any] | None:
    """Each run's length-controlled win rate, brought together; ``None`` where a run has none."""
    fits = [(entry_of(run, policy, versus, judge) or {}).get("length_controlled") for run in runs]
    if not all(fits):
        return None
    rates = [fit["win_rate"] for fit in fits]
    middle, ci = over_runs(rates, [fit["ci"] for fit in fits], settings, (0.0, 1.0))
    return {"win_rate": middle, "ci": ci}


def pooled_control(runs: list[Run], judge: str, settings: Settings) -> dict[str, Any] | None:
    """SFT against SFT on independent draws, over all runs."""
    if any(run.pool is None or judge not in run.pool.scores for run in runs):
        return None
    found = []
    for run in runs:
        baseline = run.contenders[REFERENCE].draws
        sides = (run.pool.scores[judge], baseline.scores[judge], uniform(run.pool), uniform(baseline))
        found.append(preference_by_score(*sides))
    interval = pooling(runs, settings, (0.0, 1.0))([preference[:, None] for preference, _ in found])
    low, high = interval.ci(0)
    return {
        "policy": REFERENCE,
        "versus": REFERENCE,
        "judge": judge,
        "n": sum(len(preference) for preference, _ in found),
        "win_rate": float(interval.mean[0]),
        "ci": [low, high],
        "ties": float(np.mean([ties.mean() for _, ties in found])),
        "contains_half": bool(low <= 0.5 <= high),
        "per_seed": [float(preference.mean()) for preference, _ in found],
    }


def pooled_power(entry: dict[str, Any] | None, settings: Settings) -> dict[str, Any] | None:
    """What so many runs can show of one pair, and how many the observed gap would need.

    From the interval itself, which holds seeds and prompts: more runs narrow both, more prompts only one of them.
    """
    if entry is None:
        return None
    z = stats.norm.ppf(0.5 + settings.confidence / 2)
    error = (entry["ci"][1] - entry["ci"][0]) / (2 * z)
    detectable = float((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * error)
    gap, runs = entry["win_rate"] - 0.5, len(entry["per_seed"])
    return {
        "policy": entry["policy"],
        "versus": entry["versus"],
        "n": entry["n"],
        "runs": runs,
        "observed_gap": gap,
        "deviation": float(np.std(entry["per_seed"], ddof=1)) if runs > 1 else None,
        "detectable_gap": detectable,
        "detectable_gap_single_draws": None,
        "prompts_needed": None,
        "runs_needed": int(np.ceil(runs * (detectable / gap) ** 2)) if abs(gap) > 1e-9 else None,
        "power": 0.8,
        "alpha": 0.05,
    }


def pooled_ranking(runs: list[Run], judge: str, names: list[str], settings: Settings) -> dict[str, Any]:
    """Bradley-Terry strengths: each run's own, a t interval over runs; ranks by resampling runs and prompts."""
    pairs = [p for p in runs[0].tables[judge].pairs if all(run.tables[judge].has(*p) for run in runs)]
    pairs = [pair for pair in pairs if set(pair) <= set(names)]
    names = [name for name in names if any(name in pair for pair in pairs)]
    groups = [np.stack([run.tables[judge].of(*pair) for pair in pairs], axis=1) for run in runs] if pairs else []
    groups = [group[np.isfinite(group).all(axis=1)] for group in groups]
    if len(names) < 2 or any(len(group) < 2 for group in groups):
        return {"entries": [], "note": "fewer than two prompts of some run have a verdict on every pair."}
    if not all(is_connected(pairs, group.mean(axis=0), names) for group in groups):
        return {"entries": [], "note": "some policy wins or loses everything in some run: its strength is not finite."}
    matrix = design(pairs, names)
    column = names.index(REFERENCE) if REFERENCE in names else 0
    own = strengths(matrix, np.stack([group.mean(axis=0) for group in groups]))
    own = own - own[:, [column]]
    resamples = min(settings.resamples, 500)
    drawn = [resampling_weights(len(group), resamples, settings.seed) @ group for group in groups]
    counts = np.random.default_rng([settings.seed, len(runs), 7]).multinomial(
        len(runs), np.full(len(runs), 1 / len(runs)), size=resamples
    )
    mixed = sum(counts[:, [number]] / len(runs) * rates for number, rates in enumerate(drawn))
    ranks = 1 + (lambda s: (s[:, None, :] > s[:, :, None]).sum(-1))(strengths(matrix, mixed))
    tail = (1 - settings.confidence) / 2
    best, worst = np.quantile(ranks, [tail, 1 - tail], axis=0, method="nearest")
    single = {}
    for run in runs:
        for one in run.report["ranking"].get(judge, {}).get("entries", []):
            single.setdefault(one["policy"], []).append(one["ci"])
    entries = []
    for rank, i in enumerate(np.argsort(-own.mean(axis=0), kind="stable")):
        name = names[i]
        middle, ci = over_runs(own[:, i].tolist(), single.get(name, [None]), settings)
        ci = [0.0, 0.0] if i == column else ci
        about = {"policy": name, "rank": rank + 1, "rank_ci": [int(best[i]), int(worst[i])], "strength": middle}
        entries.append({**about, "ci": ci, "per_seed": own[:, i].tolist()})
    return {"entries": entries, "note": ""}


def pooled_policy(runs: list[Run], name: str, settings: Settings) -> dict[str, Any]:
    """The entry of one policy under ``policies``, pooled."""
    own = [run.contenders[name] for run in runs]
    reports = [run.report["policies"][name] for run in runs]
    entry = pooled_point(runs, own, [report["kl"] for report in reports], settings)
    for key in ("length", "eos_rate", "tokens_per_answer"):
        entry[key] = mean_of([report.get(key) for report in reports])
    entry["quality"] = {key: mean_of([r["quality"][key] for r in reports]) for key in reports[0]["quality"]}
    moved = [report.get("displacement") for report in reports]
    entry["displacement"] = {key: mean_of([m[key] for m in moved]) for key in moved[0]} if all(moved) else None
    return entry


def pooled_point(
    runs: list[Run], own: list[Contender], kls: list[dict[str, Any]], settings: Settings
) -> dict[str, Any]:
    """Rewards and KL of one policy, or of one checkpoint, over runs."""
    pool = pooling(runs, settings)
    entry: dict[str, Any] = {
        "method": own[0].method,
        "point": own[0].point,
        "n_prompts": sum(len(c.weights) for c in own),
        "draws": own[0].draws.shape[1],
    }
    for key, judge in (("gold_reward", "gold"), ("proxy_reward", PROXY)):
        entry[key], entry[f"{key}_ci"], entry[f"{key}_per_seed"] = None, None, None
        if all(judge in c.draws.scores for c in own):
            groups = [c.score(judge)[:, None] for c in own]
            interval = pool(groups)
            entry[key], entry[f"{key}_ci"] = float(interval.mean[0]), interval.ci(0)
            entry[f"{key}_per_seed"] = [float(group.mean()) for group in groups]
    entry["eos_rate"] = float(np.mean([c.eos_rate().mean() for c in own]))
    if any(kl["mean"] is None for kl in kls):
        return {**entry, "kl": {"mean": None, "ci": None, "kind": "not measured"}}
    per_seed = [kl["mean"] for kl in kls]
    if own[0].method == "best_of_n":
        middle, ci = over_runs(per_seed, [kl["ci"] for kl in kls], settings)
        bound = float(np.mean([kl["bound"] for kl in kls]))
        kl = {"mean": middle, "ci": ci, "kind": kls[0]["kind"], "bound": bound, "per_seed": per_seed}
    else:
        interval = pool([c.kl()[:, None] for c in own])
        kl = {"mean": float(interval.mean[0]), "ci": interval.ci(0), "kind": kls[0]["kind"], "per_seed": per_seed}
    return {**entry, "kl": kl}


def mean_of(values: list[float | None]) -> float | None:
    """The mean, or ``None`` where a value is missing."""
    return None if any(value is None for value in values) else float(np.mean(values))


def pooled_temperatures(runs: list[Run], settings: Settings) -> list[dict[str, Any]]:
    """Policies at the further temperatures that every run has."""
    by_key = [{(e["policy"], e["temperature"]): e for e in run.report["temperatures"]} for run in runs]
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
            middle, ci = over_runs([kl["mean"] for kl in kls], [kl["ci"] for kl in kls], settings)
            entry["kl"] |= {"mean": middle, "ci": ci}
        entry["scores"], entry["win_rates"] = {}, []
        for judge in first["scores"]:
            scores = [e["scores"][judge] for e in entries]
            middle, ci = over_runs([s["mean"] for s in scores], [s["ci"] for s in scores], settings)
            entry["scores"][judge] = {"mean": middle, "ci": ci}
        for number, rate in enumerate(first["win_rates"]):
            rates = [e["win_rates"][number] for e in entries]
            middle, ci = over_runs([r["win_rate"] for r in rates], [r["ci"] for r in rates], settings, (0.0, 1.0))
            about = {"n": sum(r["n"] for r in rates), "ties": mean_of([r["ties"] for r in rates])}
            entry["win_rates"].append({**rate, **about, "win_rate": middle, "ci": ci})
        pooled.append(entry)
    return pooled
