"""The price of each method: time, memory, tokens, FLOPs. The part of a report that differs between equal runs."""

import time
from typing import Any

from ppo_vs_dpo.artifacts.resources import peak_memory
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.artifacts.stage import StageContext

TRAINED = ("sft", "reward_model", "ppo", "dpo")
# What a method needs trained after SFT: the price of "which is better" includes its prerequisites.
METHOD_STAGES = {"ppo": ("reward_model", "ppo"), "dpo": ("dpo",), "best_of_n": ("reward_model",)}
# Figures of a stage that say how much was done.
WORK = ("episodes", "steps", "updates")
SUMMED, LARGEST = ("seconds", "tokens_generated", "flops"), ("peak_memory_mb", "gpu_peak_memory_mb")


def stage_cost(run: RunFolder, stage: str) -> dict[str, Any] | None:
    """What one stage took, from its ``done.json``; ``None`` where it has not finished.

    ``seconds`` of wall time (interrupted attempts included), ``peak_memory_mb`` of the main process,
    ``gpu_peak_memory_mb`` where a GPU was used, ``tokens_generated`` while training, ``flops`` as the Trainer counts
    them (6 N a token trained, 2 N a token in a forward pass, N without embeddings).
    """
    done = run.done(stage)
    if done is None or "given" in (done.get("figures") or {}):
        return None
    figures, spent = done.get("figures") or {}, done.get("cost") or {}
    work = {key: figures[key] for key in WORK if isinstance(figures.get(key), int | float)}
    return {"seconds": done.get("seconds"), **{key: spent[key] for key in (*SUMMED, *LARGEST) if key in spent}, **work}


def together(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Several stages one after the other: sums of time, tokens and FLOPs, the largest memory."""
    found: dict[str, Any] = {}
    for key in SUMMED:
        known = [one[key] for one in stages if one.get(key) is not None]
        if known:
            found[key] = round(sum(known), 3)
    for key in LARGEST:
        known = [one[key] for one in stages if one.get(key) is not None]
        if known:
            found[key] = max(known)
    return found


def cost(context: StageContext, learned: dict[str, dict[str, Any]], started: float) -> dict[str, Any]:
    """What each stage and each method took. The only part of the report that differs between two equal runs."""
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
    return {
        "stages": stages,
        "methods": methods,
        "generation": generation,
        "compare_seconds": round(time.monotonic() - started, 3),
        **memory,
    }


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
    for part in ("stages", "methods"):
        named = [one.get(part) or {} for one in costs]
        found[part] = {name: mean([one[name] for one in named]) for name in named[0] if all(name in n for n in named)}
    judges: dict[str, dict[str, float]] = {}
    for one in costs:
        for name, counted in (one.get("judges") or {}).items():
            into = judges.setdefault(name, {})
            for key, value in counted.items():
                into[key] = into.get(key, 0) + value
    return {**found, "judges": judges}
