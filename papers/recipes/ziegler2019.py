"""Ziegler et al. 2019: fine-tuning from human preferences, and the controller of the KL coefficient."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppo_vs_dpo.papers.claims import Report, Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.worlds.bits import bradley_terry, pairs, world
from ppo_vs_dpo.ppo.updates.kl_controllers import AdaptiveKL

PLACE = "Ziegler et al. 2019 (1909.08593)"


def simulate(seed: int, settings: dict[str, Any]) -> Report:
    """Exact policy gradients of E r - beta KL under this project's own controller, at several targets."""
    rng = np.random.default_rng(seed)
    bits = world(rng, settings["length"])
    winners, losers = pairs(bits, settings["pairs"], rng)
    seen = bits.features("large")
    proxy = seen @ bradley_terry(seen[winners] - seen[losers])
    figures: dict[str, float] = {}
    curves: dict[str, Any] = {}
    for target in settings["targets"]:
        for start in settings["starts"]:
            kl, coefficient = _follow(bits, proxy, target, start, settings)
            label = f"{target:g} from {start:g}"
            curves[label] = {"kl": kl, "coefficient": coefficient}
            late = kl[-len(kl) // 5 :]
            figures[f"{label} miss"] = float(abs(np.mean(late) / target - 1))
    figures["miss"] = max(value for name, value in figures.items() if name.endswith(" miss"))
    controller = AdaptiveKL(1.0, 6.0, 10_000)
    controller.update(12.0, 512)
    figures["step"] = abs(controller.coef - 1.01024)
    return {"seed": seed, "figures": figures, "curves": curves}


def _follow(
    bits: Any, proxy: np.ndarray, target: float, start: float, settings: dict[str, Any]
) -> tuple[list[float], list[float]]:
    """KL and coefficient after each update."""
    controller = AdaptiveKL(start, target, settings["horizon"])
    logits = np.log(bits.reference)
    kls, coefficients = [], []
    for _ in range(settings["updates"]):
        policy = np.exp(logits - logits.max())
        policy /= policy.sum()
        ratio = np.log(np.maximum(policy, 1e-300)) - np.log(bits.reference)
        # Natural gradient of the objective: towards the tilt of this coefficient, a step at a time.
        logits = logits + settings["step"] * (proxy - controller.coef * ratio)
        kls.append(float(policy @ ratio))
        coefficients.append(float(controller.coef))
        controller.update(kls[-1], settings["episodes"])
    return kls, coefficients


def draw(axes: Any, reports: Sequence[Report]) -> None:
    """KL over the updates, each target and start a line, the first seed."""
    for label, curve in reports[0]["curves"].items():
        axes.plot(curve["kl"], label=f"target {label}")
    axes.set(xlabel="updates", ylabel="KL(policy, reference), nats")


PAPER = Paper(
    name="ziegler2019",
    title="Ziegler et al. 2019: Fine-tuning language models from human preferences (1909.08593)",
    question="Does PPO with a learnt reward and a controlled KL please people?",
    takes="8 x V100 then (released code: 8 processes); one GPU of 24 GB now",
    world="4,096 bit strings, exact policy gradients under this project's own adaptive controller",
    simulate=simulate,
    draw=draw,
    published=(
        ("sentiment, people's wins against zero-shot", "86 % (another note: 88 %)", f"{PLACE} [S]"),
        ("sentiment, people's wins against supervised fine-tuning", "77 %", f"{PLACE} [S]"),
        ("sentences copied: TL;DR, CNN/DailyMail", "71 %, 98 %", f"{PLACE} [S]"),
        ("target, horizon", "6 nats, 10,000 episodes", "openai/lm-human-preferences [C]"),
    ),
    unknown=("people's judgements themselves",),
    statements=(
        Statement(
            "The controller brings the KL to its target from wherever it starts",
            f"{PLACE}, section 2.2",
            "near the target",
            "relative distance of the KL of the last fifth of updates from the target, the worst case",
            figure("miss"),
            most=0.1,
        ),
        Statement(
            "At twice the target a rollout of 512 raises the coefficient by 1.024 %",
            f"{PLACE}, section 2.2: 1 + 0.2 x 512 / 10,000",
            "1.01024",
            "distance of this project's controller from it",
            figure("step"),
            most=1e-12,
            always=True,
        ),
    ),
)
