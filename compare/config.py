"""The ``compare`` section of the configuration."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ppo_vs_dpo.artifacts.settings import nearest

# What trains a policy, and how reports call it; best-of-n and policies that were given are no methods of training.
METHODS = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO", "reinforce_pp": "REINFORCE++"}
METHODS |= {"online_dpo": "online DPO", "online_ipo": "online IPO", "dpo": "DPO"}
# The key of a method's section that holds beta, and under which its done.json has it.
COEFFICIENT = {method: "beta" if method == "dpo" else "kl_coef" for method in METHODS}
# Keys of a section that say which method it is; all others are settings of it.
KIND = {"ppo": ("advantage", "loss"), "dpo": ()}

# What a report takes from the reward model's own.
REWARD_MODEL_FIGURES = ("accuracy", "ceiling", "of_ceiling", "ece")

# On which prompts a main point was chosen: none (fixed beforehand), validation prompts, or those of the comparison.
CHOSEN_ON = ("fixed", "validation", "heldout")


def method_of(stage: str, settings: dict[str, Any]) -> str:
    """The method (`METHODS`) of a stage with these settings: of online losses the loss says it, else the advantage."""
    if stage == "ppo" and settings.get("loss") in ("dpo", "ipo"):
        return f"online_{settings['loss']}"
    if stage == "ppo" and settings.get("advantage") in METHODS:
        return str(settings["advantage"])
    return stage


@dataclass
class CompareStage:
    """How the policies of a run are compared; each key has its comment in ``configs/compare/default.yaml``."""

    n_prompts: int = 512
    max_new_tokens: int = 64
    temperature: float = 1.0
    other_temperatures: list[float] = field(default_factory=list)
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 512
    workers: int = 1
    samples: int = 1
    baseline_draws: int = 4
    pool_size: int = 20
    best_of_n: list[int] = field(default_factory=lambda: [2, 4, 16])
    best_of: dict[str, list[int]] = field(default_factory=dict)
    checkpoints: dict[str, Any] = field(default_factory=dict)
    length_difficulty: bool = False
    enumerate_up_to: int = 100_000
    policies: dict[str, Any] = field(default_factory=dict)
    judges: list[Any] = field(default_factory=list)
    check_pairs: int = 0
    tuning: dict[str, Any] = field(default_factory=dict)
    select: dict[str, Any] | None = None
    near_duplicate: float = 0.8
    delta: float = 0.05
    resamples: int = 2000
    confidence: float = 0.95

    def problems(self) -> list[str]:
        """What cannot be meant, a sentence each; the command asks before the first stage starts."""
        found = [*_unknown_steps(self.checkpoints or {}), *_unknown_draws(self.best_of or {})]
        if self.select:
            found += _unknown_selection(self.select)
            if self.tuning:
                found.append("compare.tuning says by hand what compare.select does and records: give one of them.")
        if self.temperature <= 0:
            found.append("compare.temperature is 0: a greedy policy has no KL. Put 0 into compare.other_temperatures.")
        too_large = [n for n in self.best_of_n if not 1 <= n <= self.pool_size]
        if too_large:
            found.append(f"compare.best_of_n: {too_large[0]} is not in 1..pool_size ({self.pool_size}).")
        for name, one in (self.tuning or {}).items():
            known = isinstance(one, dict) and set(one) <= {"settings", "chosen_on"}
            counted = known and type(one.get("settings", 1)) is int and one.get("settings", 1) >= 1
            if name not in METHODS or not counted or one.get("chosen_on", "fixed") not in CHOSEN_ON:
                found.append(
                    f"compare.tuning.{name} is {one!r}; it must be like "
                    f"{{settings: 12, chosen_on: validation}}, for one of {', '.join(METHODS)}, "
                    f"chosen_on one of {', '.join(CHOSEN_ON)}."
                )
        if not 0 < self.delta < 0.5:
            found.append(f"compare.delta is {self.delta}; it must lie between 0 and 0.5 (0.05 is 5 points).")
        return found


# Prompts that `select` takes where it does not say.
VALIDATION_PROMPTS = 128


def _unknown_selection(select: dict[str, Any]) -> Iterator[str]:
    where = "compare.select"
    for key in set(select) - {"by", "prompts"}:
        yield f"{where}.{key}: no such key.{nearest(str(key), ['by', 'prompts'])}"
    if not isinstance(select.get("by"), str):
        yield f"{where}.by is {select.get('by')!r}; it must be gold, reward_model or the name of a judge."
    prompts = select.get("prompts", VALIDATION_PROMPTS)
    if type(prompts) is not int or prompts < 2:
        yield f"{where}.prompts is {prompts!r}; it must be a number of validation prompts, 2 or more."


def _unknown_steps(checkpoints: dict[str, Any]) -> Iterator[str]:
    for stage, steps in checkpoints.items():
        where = f"compare.checkpoints.{stage}"
        if stage not in ("ppo", "dpo"):
            yield f"{where}: only ppo and dpo have checkpoints of a policy.{nearest(stage, ['ppo', 'dpo'])}"
        elif steps != "all" and not (
            isinstance(steps, list) and all(type(step) is int and step > 0 for step in steps)
        ):
            yield f"{where} is {steps!r}; it must be a list of steps, [8, 16], or all."


def _unknown_draws(best_of: dict[str, Any]) -> Iterator[str]:
    for name, ns in best_of.items():
        where = f"compare.best_of.{name}"
        if name == "sft":
            yield f"{where}: the reference's values of n are compare.best_of_n."
        elif not (isinstance(ns, list) and ns and all(type(n) is int and 1 <= n <= 1024 for n in ns)):
            yield f"{where} is {ns!r}; it must be a list of values of n, [4, 16]."
