"""The price of each method: time, tokens, FLOPs, memory. The part of a report that differs between equal runs."""

import resource
import time
from typing import Any

from artifacts.stage import StageContext

TRAINED = ("sft", "reward_model", "ppo", "dpo")
# What a method needs trained after SFT: the price of "which is better".
METHOD_STAGES = {"ppo": ("reward_model", "ppo"), "dpo": ("dpo",), "best_of_n": ("reward_model",)}
# Figures of a stage's done.json that are costs.
COST_FIGURES = (
    "episodes",
    "steps",
    "updates",
    "tokens_generated",
    "peak_memory_mb",
    "gpu_peak_memory_mb",
    "total_flos",
)


def cost(context: StageContext, learned: dict[str, dict[str, Any]], started: float) -> dict[str, Any]:
    """What each method took. The only part of the report that differs between two equal runs."""
    run, methods = context.run, {}
    seconds = {stage: (run.done(stage) or {}).get("seconds") for stage in TRAINED}
    for method, stages in METHOD_STAGES.items():
        known = [seconds[stage] for stage in stages if seconds[stage] is not None]
        if len(known) == len(stages):
            methods[method] = {"stages": list(stages), "seconds": round(sum(known), 3)}
    for stage in TRAINED:
        figures = (run.done(stage) or {}).get("figures") or {}
        kept = {key: figures[key] for key in COST_FIGURES if isinstance(figures.get(key), int | float)}
        methods.setdefault(stage, {}).update(kept)
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
    return {
        "stage_seconds": seconds,
        "methods": {name: figures for name, figures in methods.items() if figures},
        "generation": generation,
        "compare_seconds": round(time.monotonic() - started, 3),
        "compare_peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
