"""A diagnosis in words: what is seen, why it usually happens, what to try.

Users' reports of PPO gone wrong read alike ("KL negative", "reward does not rise", "it never stops"), and the figures
that tell why are in the log all the time. Each check looks at the metrics of one update and those before, speaks
once, and is a function of the metrics alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Updates that a trend is judged over.
WINDOW = 10

Metrics = dict[str, float]


@dataclass
class Finding:
    """One finding.

    Attributes:
        kind: short name, e.g. ``"no EOS"``.
        seen: what the figures show.
        why: what it usually comes from.
        advice: what to try.
    """

    kind: str
    seen: str
    why: str
    advice: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.seen} {self.why} {self.advice}"


def non_finite(history: list[Metrics]) -> Finding | None:
    """A figure that is not a number."""
    bad = [name for name, value in history[-1].items() if isinstance(value, float) and not math.isfinite(value)]
    if not bad:
        return None
    return Finding(
        "non-finite figure",
        f"{', '.join(bad)} is not a finite number.",
        "Usually overflow in half precision, or a log-probability of minus infinity (top-k or top-p sampling).",
        "Try bf16 instead of fp16, top_k=0 and top_p=1, a lower learning_rate.",
    )


def first_ratio(history: list[Metrics]) -> Finding | None:
    """The policy that trains is not the one that sampled (N+: ratio exactly 1 on the first pass)."""
    deviation, allowed = history[-1].get("first_ratio/mean", 0.0), history[-1].get("first_ratio/allowed", 1e-4)
    if deviation <= allowed:
        return None
    return Finding(
        "ratio is not 1 at first",
        f"before the first optimizer step of the update the log ratio was off by {deviation:.2g} on average, more "
        f"than the rounding of this run's arithmetic ({allowed:g}).",
        "Usually dropout, or padding that changes what the model sees.",
        "Check dropout and the attention implementation; keep cliprange well above it.",
    )


def negative_kl(history: list[Metrics]) -> Finding | None:
    """A KL cannot be negative; its estimate can, within noise."""
    kl, error = history[-1].get("objective/kl", 0.0), history[-1].get("objective/kl_se", 0.0)
    if kl >= -4 * error - 1e-3:
        return None
    return Finding(
        "negative KL",
        f"the KL estimate is {kl:.3g} nats, {-kl / max(error, 1e-9):.0f} standard errors below 0.",
        "The tokens were not drawn from the distribution whose log-probabilities are compared: top-k or top-p "
        "sampling, "
        "another temperature, or generation that forces or forbids tokens.",
        "Sample with top_k=0, top_p=1 and no forced tokens.",
    )


def no_eos(history: list[Metrics]) -> Finding | None:
    """Responses that never end."""
    rate = history[-1].get("response/eos_rate", 1.0)
    first = history[0].get("response/eos_rate", 1.0)
    if rate >= 0.5:
        return None
    why = (
        "The policy did not end its responses from the start: the SFT data may lack the end token, or padding equals "
        "EOS and "
        "was masked out of the SFT loss."
        if first < 0.5
        else "The reward pays for length, or the penalty for not ending is too small beside it."
    )
    return Finding(
        "no EOS",
        f"{rate:.0%} of the responses end by themselves (at first {first:.0%}).",
        why,
        "Raise missing_eos_penalty or response_length; check that SFT examples end with the EOS token.",
    )


# Below this, scores have no spread.
NO_SPREAD = 1e-6


def reward_without_spread(history: list[Metrics]) -> Finding | None:
    """Scores that have been the same for every response since the beginning."""
    if len(history) < 3 or max(row.get("objective/scores_std", 1.0) for row in history) > NO_SPREAD:
        return None
    return Finding(
        "reward without spread",
        "every response has scored the same since the first update.",
        "The reward tells no response from another, so that only the KL penalty and missing_eos act.",
        "Call the reward on some responses by hand: a function may look for what this policy never says.",
    )


def reward_saturation(history: list[Metrics]) -> Finding | None:
    """Scores that lost their spread carry no signal any more."""
    spread = [row.get("objective/scores_std", 1.0) for row in history]
    if len(spread) < 3 or max(spread) <= NO_SPREAD or spread[-1] > 0.05 * max(spread[0], NO_SPREAD):
        return None
    return Finding(
        "reward saturation",
        f"the spread of scores fell from {spread[0]:.3g} to {spread[-1]:.3g}: nearly all responses score the same.",
        "The policy has found what the reward model likes best and repeats it, or scores run into score_clip.",
        "Read the samples; raise kl_coef, lift score_clip, or train a better reward model.",
    )


def reward_flat(history: list[Metrics]) -> Finding | None:
    """A reward that does not rise."""
    if len(history) < 3 * WINDOW:
        return None
    scores = [row.get("objective/rlhf_reward", 0.0) for row in history]
    spread = history[0].get("objective/scores_std", 0.0)
    rise = sum(scores[-WINDOW:]) / WINDOW - sum(scores[:WINDOW]) / WINDOW
    if rise > 0.02 * spread:
        return None
    return Finding(
        "reward does not rise",
        f"over {len(history)} updates the objective changed by {rise:.3g}, with scores that spread by {spread:.3g}.",
        "Usually a learning rate far too low or too high, a KL coefficient that forbids any change, or a reward model "
        "that cannot tell this policy's responses apart.",
        "Look at approx-KL: near 0 means raise learning_rate, above 0.05 means lower it. Check the reward model's "
        "report.",
    )


def entropy_collapse(history: list[Metrics]) -> Finding | None:
    """The policy has stopped exploring."""
    entropy = [row.get("policy/entropy", 1.0) for row in history]
    if len(entropy) < 3 or entropy[-1] > 0.1 * entropy[0]:
        return None
    return Finding(
        "entropy collapse",
        f"the entropy per token fell from {entropy[0]:.3g} to {entropy[-1]:.3g} nats.",
        "The policy has become almost deterministic and no longer explores.",
        "Raise kl_coef, lower learning_rate or num_ppo_epochs, or set a small entropy_coef (0.01).",
    )


def length_drift(history: list[Metrics]) -> Finding | None:
    """Lengths that run away (Singhal et al. 2023: much of the gain of RLHF is length)."""
    lengths = [row.get("response/length", 0.0) for row in history]
    if len(lengths) < 3 or not lengths[0] or 0.5 < lengths[-1] / lengths[0] < 2:
        return None
    return Finding(
        "length drift",
        f"the mean length went from {lengths[0]:.1f} to {lengths[-1]:.1f} tokens.",
        "Reward models often score by length, and the policy finds that first.",
        "See the reward model's report (correlation with length); compare with a length-controlled win rate.",
    )


def value_not_learning(history: list[Metrics]) -> Finding | None:
    """Values that explain nothing make advantages noise."""
    if len(history) < 2 * WINDOW:
        return None
    explained = [row["val/explained_variance"] for row in history[-WINDOW:] if "val/explained_variance" in row]
    if not explained:  # no value model
        return None
    if sum(explained) / WINDOW > 0:
        return None
    return Finding(
        "value model not learning",
        f"its explained variance over the last {WINDOW} updates is {sum(explained) / WINDOW:.2g} on average: a "
        f"constant "
        f"would do as well.",
        "Usually its learning rate is too low, or cliprange_value is small beside the size of the rewards.",
        "Raise value_learning_rate, widen cliprange_value, or start with value_warmup_updates.",
    )


def policy_clipped(history: list[Metrics]) -> Finding | None:
    """Updates so large that the clip holds most tokens."""
    clipped = [row.get("policy/clipfrac_avg", 0.0) for row in history[-3:]]
    if len(clipped) < 3 or min(clipped) < 0.3:
        return None
    return Finding(
        "updates too large",
        f"the clip held {clipped[-1]:.0%} of the tokens in each of the last 3 updates.",
        "The learning rate is too high for this many passes over a rollout.",
        "Lower learning_rate, num_ppo_epochs or num_mini_batches, or set early_stop_kl.",
    )


def engine_apart(history: list[Metrics]) -> Finding | None:
    """The engine samples from another policy than the one that trains: more than rounding."""
    difference = history[-1].get("engine/logprob_difference_mean", 0.0)
    if difference <= 0.1:
        return None
    return Finding(
        "engine and trainer apart",
        f"the engine's log-probabilities of its tokens differ from the trainer's by {difference:.2g} nats on average.",
        "Rounding gives below 1e-3 in fp32 and a few hundredths in bf16. More means that weights did not arrive, or "
        "that the engine computes this architecture differently.",
        "Use generation_engine=transformers, or train and sample in float32 to tell the two causes apart.",
    )


CHECKS: tuple[Callable[[list[Metrics]], Finding | None], ...] = (
    non_finite,
    first_ratio,
    negative_kl,
    no_eos,
    reward_without_spread,
    reward_saturation,
    reward_flat,
    entropy_collapse,
    length_drift,
    value_not_learning,
    policy_clipped,
    engine_apart,
)

# The figures that checks look at, and a checkpoint keeps.
WATCHED = (
    "first_ratio/mean",
    "first_ratio/allowed",
    "objective/kl",
    "objective/kl_se",
    "objective/rlhf_reward",
    "objective/scores_std",
    "response/eos_rate",
    "response/length",
    "policy/entropy",
    "policy/clipfrac_avg",
    "val/explained_variance",
    "engine/logprob_difference_mean",
)


class Diagnosis:
    """Watches a run, and says each thing once."""

    def __init__(self):
        self.history: list[Metrics] = []
        self.said: list[str] = []

    def observe(self, update: int, metrics: Metrics) -> list[str]:
        """Account for the metrics of one update.

        Returns:
            Warnings that have not been given before, as sentences.
        """
        self.history.append({name: metrics[name] for name in WATCHED if name in metrics})
        found = []
        for check in CHECKS:
            finding = check([*self.history[:-1], metrics] if check is non_finite else self.history)
            if finding is not None and finding.kind not in self.said:
                self.said.append(finding.kind)
                found.append(f"update {update}: {finding}")
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: trends must go on, and nothing be said twice, after a resume."""
        return {"history": self.history, "said": self.said}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.history, self.said = list(state["history"]), list(state["said"])
