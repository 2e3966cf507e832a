"""The price of each method: time, memory, tokens, FLOPs. The part of a report that differs between equal runs."""

from typing import Any

import numpy as np

from ppo_vs_dpo.artifacts.resources import peak_memory
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.compare.config import METHODS
from ppo_vs_dpo.compare.frontier.selected import Candidate, Selection, best, spread_of_budget

TRAINED = ("sft", "reward_model", "ppo", "dpo")
# What a method needs trained after SFT: the price of "which is better" includes its prerequisites.
METHOD_STAGES = {"ppo": ("reward_model", "ppo"), "dpo": ("dpo",), "best_of_n": ("reward_model",)}
# Figures of a stage that say how much was done.
WORK = ("episodes", "steps", "updates")
REWARDS = ("gold_reward", "proxy_reward")
SUMMED, LARGEST = ("seconds", "tokens_generated", "flops"), ("peak_memory_mb", "gpu_peak_memory_mb")
CPU = "cpu_seconds"


def stage_cost(run: RunFolder, stage: str) -> dict[str, Any] | None:
    """What one stage took, from its ``done.json``; ``None`` where it has not finished.

    ``seconds`` of wall time of the stage's process from its start to its last word (start-up and interrupted
    attempts included), ``cpu_seconds`` of it and the processes it started, ``peak_memory_mb`` of the main process,
    ``gpu_peak_memory_mb`` where a GPU was used, ``tokens_generated`` while training, ``flops`` as the Trainer counts
    them (6 N a token trained, 2 N a token in a forward pass, N without embeddings).
    """
    done = run.done(stage)
    if done is None or "given" in (done.get("figures") or {}):
        return None
    figures, spent = done.get("figures") or {}, done.get("cost") or {}
    work = {key: figures[key] for key in WORK if isinstance(figures.get(key), int | float)}
    known = {key: spent[key] for key in (CPU, *SUMMED, *LARGEST) if key in spent}
    return {"seconds": done.get("seconds"), **known, **work}


def together(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Several stages one after the other: sums of time, tokens and FLOPs, the largest memory."""
    found: dict[str, Any] = {}
    for key in SUMMED:
        known = [one[key] for one in stages if one.get(key) is not None]
        if known:
            found[key] = round(sum(known), 3)
    cpus = [one.get(CPU) for one in stages]
    if cpus and None not in cpus:  # a part of them would look like little
        found[CPU] = round(sum(cpus), 2)
    for key in LARGEST:
        known = [one[key] for one in stages if one.get(key) is not None]
        if known:
            found[key] = max(known)
    return found


def cost(
    context: StageContext,
    learned: dict[str, dict[str, Any]],
    selection: Selection | None = None,
    policies: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """What each stage and each method took. The only part of the report that differs between two equal runs.

    Args:
        context: of the comparison.
        learned: policy -> what was learned while its completions were drawn.
        selection: how each method's point was chosen; then ``tuned`` says what all settings took.
        policies: entries of the report, and of the points of its frontier: their rewards are those of ``curves``.
    """
    stages = {stage: found for stage in TRAINED if (found := stage_cost(context.run, stage)) is not None}
    methods = {}
    for method, needed in METHOD_STAGES.items():
        if all(stage in stages for stage in needed):
            methods[method] = {"stages": list(needed), **together([stages[stage] for stage in needed])}
    generation = {
        name: {
            "tokens": extra["tokens_generated"],
            "seconds": extra["seconds"],
            # A forward pass costs about 2 FLOPs a parameter and token (Kaplan et al. 2020, section 2.1).
            "flops": 2 * extra["parameters"] * extra["tokens_generated"],
        }
        for name, extra in learned.items()
        if extra.get("tokens_generated")
    }
    memory = {f"compare_{name}": value for name, value in peak_memory().items()}
    of_tuning = {}
    if selection is not None:
        of_tuning = {"tuned": {m: tuned_cost(context.run, ones, stages) for m, ones in selection.candidates.items()}}
    return {
        "stages": stages,
        "methods": methods,
        **of_tuning,
        "curves": compute_curves(context.run, policies or {}, stages, selection),
        "generation": generation,
        # Up to here: the pages are still to be written.
        "compare_seconds": round(context.seconds, 3),
        "compare_cpu_seconds": round(context.cpu_seconds, 2),
        **memory,
    }


def needed_by(method: str, stages: dict[str, Any]) -> list[dict[str, Any]]:
    """What stands before a method's own training, after SFT and the pairs: the reward model, but for DPO."""
    return [stages["reward_model"]] if method != "dpo" and "reward_model" in stages else []


def tuned_cost(run: RunFolder, candidates: list[Candidate], stages: dict[str, Any]) -> dict[str, Any]:
    """A method with all its settings, and the drawing of their validation completions.

    Checkpoints of one training cost it once.
    """
    method = candidates[0].name.partition(",")[0]
    jobs = [found for job in dict.fromkeys(c.job for c in candidates) if (found := stage_cost(run, job)) is not None]
    return {"settings": len(candidates), **together([*needed_by(method, stages), *jobs, *map(choosing, candidates)])}


def choosing(candidate: Candidate) -> dict[str, Any]:
    """What it took to see how good one setting is."""
    return {"seconds": candidate.seconds, "tokens_generated": candidate.tokens, "flops": candidate.flops}


def compute_curves(
    run: RunFolder, policies: dict[str, dict[str, Any]], stages: dict[str, Any], selection: Selection | None
) -> list[dict[str, Any]]:
    """Reward against what was spent, all that the method needs after SFT and the pairs included.

    With a selection: the expected held-out reward of the best on validation among 1, 2, ... settings tried in any
    order (`spread_of_budget`), against what so many take. Without one each trained policy is a point of its own.
    """
    found = []

    def row(method: str, settings: int, spent: dict[str, Any], rewards: dict[str, float | None]) -> None:
        found.append({"method": method, "settings": settings, **{key: spent.get(key) for key in SUMMED}, **rewards})

    if selection is None:
        for name, entry in policies.items():
            own = stage_cost(run, name) if entry["method"] in METHODS and "step" not in entry["point"] else None
            if own is not None:
                spent = together([*needed_by(entry["method"], stages), own])
                row(entry["method"], 1, spent, {key: entry[key] for key in REWARDS})
        return found
    for method, candidates in selection.candidates.items():
        jobs = list(dict.fromkeys(one.job for one in candidates))
        tried = [best([one for one in candidates if one.job == job]) for job in jobs]
        costs = [stage_cost(run, job) for job in jobs]
        if None in costs or any(one.name not in policies for one in tried):
            continue
        each = together([*costs, *map(choosing, candidates)])
        before, scores = together(needed_by(method, stages)), np.array([one.score for one in tried])
        for j in range(1, len(jobs) + 1):
            spent = {key: before.get(key, 0) + each[key] * j / len(jobs) for key in SUMMED if key in each}
            rewards = {}
            for key in REWARDS:
                values = [policies[one.name][key] for one in tried]
                known = None not in values
                rewards[key] = float(spread_of_budget(scores, np.array(values))[j - 1]) if known else None
            row(method, j, spent, rewards)
    return found


def pooled_cost(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs: means over runs of what every run knows; what judges were asked is summed."""

    def mean(entries: list[dict[str, Any]]) -> dict[str, Any]:
        shared = [key for key in entries[0] if all(key in entry for entry in entries)]
        numbers = {key: [entry[key] for entry in entries] for key in shared}
        return {
            key: sum(values) / len(values) if all(isinstance(v, int | float) for v in values) else values[0]
            for key, values in numbers.items()
        }

    found: dict[str, Any] = {"runs": len(costs)}
    for part in ("stages", "methods", *(["tuned"] if all(one.get("tuned") for one in costs) else [])):
        named = [one.get(part) or {} for one in costs]
        found[part] = {name: mean([one[name] for one in named]) for name in named[0] if all(name in n for n in named)}
    rows = [one.get("curves") or [] for one in costs]
    if len({tuple((row["method"], row["settings"]) for row in of_run) for of_run in rows}) == 1:
        found["curves"] = [mean(list(same)) for same in zip(*rows, strict=True)]
    judges: dict[str, dict[str, float]] = {}
    for one in costs:
        for name, counted in (one.get("judges") or {}).items():
            into = judges.setdefault(name, {})
            for key, value in counted.items():
                into[key] = into.get(key, 0) + value
    return {**found, "judges": judges}
