"""The frontier of several runs: points, matched KL and the optimum, every interval over prompts and seeds."""

from dataclasses import replace
from typing import Any

from ppo_vs_dpo.compare.estimates.win_rates import Settings, judge_pairs
from ppo_vs_dpo.compare.frontier.points import Compared, frontier, matched_kl
from ppo_vs_dpo.compare.pooled.figures import Run, mean_of, over_runs, pooled_point, shares_prompts


def compared(run: Run, judge: str | None = None) -> Compared:
    """A run as the frontier reads it."""
    table = run.tables[judge] if judge is not None else None
    found = Compared(list(run.contenders.values()), list(run.checkpoints.values()), table, run.prompts.clusters)
    if judge in run.scored and len(found.settings) > len(found.contenders):
        found = replace(found, table=judge_pairs(found.settings, judge))
    return found


def pooled_matched_kl(
    runs: list[Run], judge: str, settings: Settings, entry: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Matched KL in every run, and its mean over runs and prompts; ``entry``: the win rate as they are."""
    return matched_kl([compared(run, judge) for run in runs], "ppo", "dpo", settings, shares_prompts(runs), entry)


def pooled_frontier(policies: dict[str, dict[str, Any]], runs: list[Run], settings: Settings) -> list[dict[str, Any]]:
    """Points of all methods and of the checkpoints that every run has."""
    entries = dict(policies)
    for name in runs[0].checkpoints:
        if all(name in run.checkpoints for run in runs):
            marked = [{p["policy"]: p for p in run.report["frontier"]}[name] for run in runs]
            own = [run.checkpoints[name] for run in runs]
            entries[name] = pooled_point(runs, own, [mark["kl"] for mark in marked], settings)
    return frontier([compared(run) for run in runs], entries, settings, shares_prompts(runs))


def pooled_optimum(runs: list[Run], settings: Settings) -> dict[str, Any] | None:
    """The optimal frontier at every beta that all runs could estimate, and J* - J where all have it."""
    found = [run.report.get("optimum") for run in runs]
    if not all(found) or len({one["kind"] for one in found}) > 1:
        return None
    shared = shares_prompts(runs)

    def figures(entries: list[dict[str, Any]], keys: tuple[str, ...]) -> dict[str, Any]:
        made = {}
        for key in keys:
            values, intervals = [entry[key] for entry in entries], [entry[f"{key}_ci"] for entry in entries]
            made[key], made[f"{key}_ci"] = over_runs(values, intervals, settings, shared)
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
        if len(entries) < len(runs) or len({entry["beta"] for entry in entries}) > 1:
            continue  # a method's point may have been chosen at another beta in each run
        about = {name: first[name] for name in ("policy", "judge", "beta")}
        refused = next((entry for entry in entries if "refused" in entry), None)
        if refused is not None:
            gaps.append({**about, "ess": refused["ess"], "refused": refused["refused"]})
        else:
            bound = {"at_least": True} if any(entry.get("at_least") for entry in entries) else {}
            gaps.append({**about, **figures(entries, ("objective", "optimum", "gap")), **bound})
    kept = {key: found[0][key] for key in ("kind", "draws", "completions") if key in found[0]}
    return {**kept, "curves": curves, "gaps": gaps, "policies": None}
