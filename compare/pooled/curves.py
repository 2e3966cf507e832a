"""The frontier of several runs: points, matched KL and the optimum, every interval over prompts and seeds."""

from typing import Any

import numpy as np

from ppo_vs_dpo.compare.estimates.win_rates import Settings
from ppo_vs_dpo.compare.frontier.points import matched_kl
from ppo_vs_dpo.compare.pooled.figures import Run, mean_of, over_runs, pooled_point


def pooled_matched_kl(runs: list[Run], judge: str, settings: Settings) -> dict[str, Any]:
    """Matched KL in every run, then the mean over runs with a t interval."""
    found = [matched_kl(list(run.contenders.values()), run.tables[judge], "ppo", "dpo", settings) for run in runs]
    refused = [one for one in found if "refused" in one]
    if refused:
        return refused[0]
    rates = [one["win_rate"] for one in found]
    middle, ci = over_runs(rates, [one["ci"] for one in found], settings, (0.0, 1.0))
    return {
        "policy": "ppo",
        "versus": "dpo",
        "kl": float(np.mean([one["kl"] for one in found])),
        "win_rate": middle,
        "ci": ci,
        "per_seed": rates,
        "points": found[0]["points"],
    }


def pooled_frontier(policies: dict[str, dict[str, Any]], runs: list[Run], settings: Settings) -> list[dict[str, Any]]:
    """Points of all methods; over-optimised where every run marks the point so."""
    marks = [{p["policy"]: p for p in run.report["frontier"]} for run in runs]
    points = []
    for first in runs[0].report["frontier"]:
        name = first["policy"]
        marked = [mark[name] for mark in marks if name in mark]
        if len(marked) < len(runs):
            continue
        if name in policies:
            entry = policies[name]
        elif all(name in run.checkpoints for run in runs):
            own = [run.checkpoints[name] for run in runs]
            entry = pooled_point(runs, own, [mark["kl"] for mark in marked], settings)
        else:
            continue
        keys = ("method", "point", "kl", "eos_rate")
        keys += ("gold_reward", "gold_reward_ci", "proxy_reward", "proxy_reward_ci")
        point = {"policy": name, **{key: entry[key] for key in keys}, "along": first.get("along", "sweep")}
        if point["kl"]["mean"] is not None:
            point["sqrt_kl"] = float(np.sqrt(max(point["kl"]["mean"], 0.0)))
        point["over_optimised"] = all(mark.get("over_optimised") for mark in marked)
        if point["over_optimised"]:
            point["against"] = marked[0]["against"]
            point["gold_change"] = float(np.mean([mark["gold_change"] for mark in marked]))
            point["proxy_change"] = float(np.mean([mark["proxy_change"] for mark in marked]))
        points.append(point)
    return points


def pooled_optimum(runs: list[Run], settings: Settings) -> dict[str, Any] | None:
    """The optimal frontier at every beta that all runs could estimate, and J* - J where all have it."""
    found = [run.report.get("optimum") for run in runs]
    if not all(found) or len({one["kind"] for one in found}) > 1:
        return None

    def figures(entries: list[dict[str, Any]], keys: tuple[str, ...]) -> dict[str, Any]:
        made = {}
        for key in keys:
            values = [entry[key] for entry in entries]
            made[key], made[f"{key}_ci"] = over_runs(values, [entry[f"{key}_ci"] for entry in entries], settings)
        return {**made, "ess": mean_of([entry["ess"] for entry in entries])}

    curves = {}
    for judge in found[0]["curves"]:
        by_beta = [{point["beta"]: point for point in one["curves"].get(judge, [])} for one in found]
        betas = [beta for beta in by_beta[0] if all(beta in points for points in by_beta)]
        of_beta = [[points[beta] for points in by_beta] for beta in betas]
        curves[judge] = [
            {"beta": beta, **figures(entries, ("kl", "reward"))} for beta, entries in zip(betas, of_beta, strict=True)
        ]
    gaps = []
    by_policy = [{(gap["policy"], gap["judge"]): gap for gap in one["gaps"]} for one in found]
    for key, first in by_policy[0].items():
        entries = [one[key] for one in by_policy if key in one]
        if len(entries) < len(runs):
            continue
        about = {name: first[name] for name in ("policy", "judge", "beta")}
        refused = next((entry for entry in entries if "refused" in entry), None)
        if refused is not None:
            gaps.append({**about, "ess": refused["ess"], "refused": refused["refused"]})
        else:
            gaps.append({**about, **figures(entries, ("objective", "optimum", "gap"))})
    kept = {key: found[0][key] for key in ("kind", "draws", "completions") if key in found[0]}
    return {**kept, "curves": curves, "gaps": gaps, "policies": None}
