"""Singhal et al. 2023: a long way to go, length in RLHF."""

from collections.abc import Sequence
from typing import Any

from ppo_vs_dpo.papers.claims import Report, Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.worlds.testbed import read

PLACE = "Singhal et al. 2023 (2310.03716)"


def draw(axes: Any, reports: Sequence[Report]) -> None:
    """Share of the gain in score between answers of equal length, PPO and DPO, a point a seed."""
    for number, method in enumerate(("ppo", "dpo")):
        values = [report["figures"][f"{method} share within lengths"] for report in reports]
        axes.scatter([number] * len(values), values, s=20, label=method.upper())
    axes.axhline(1.0, color="#444444", linestyle="--", label="nothing of the gain is length")
    axes.set_xticks([0, 1], ["PPO", "DPO"])
    axes.set_ylabel("share of the gain in score within lengths")


PAPER = Paper(
    name="singhal2023",
    title="Singhal et al. 2023: A long way to go: length correlations in RLHF (2310.03716)",
    question="How much of what PPO gains is length?",
    takes="2 GPUs, about 16 hours for 200 updates (released code, README)",
    world="the testbed, whose gold dislikes rambling beyond 24 words: a world *without* a reward for length",
    read=read,
    draw=draw,
    published=(
        ("share of the gain that is not length: WebGPT", "2.0 %", f"{PLACE} [S]"),
        ("share of the gain that is not length: Stack", "53.4 %", f"{PLACE} [S]"),
        ("share of the gain that is not length: RLCD", "27.2 %", f"{PLACE} [S]"),
        ("WebGPT, simulated preference: length alone as reward, reward model", "56, 58", f"{PLACE} [S]"),
        ("RLCD, simulated preference: length alone as reward, reward model", "64, 63", f"{PLACE} [S]"),
    ),
    unknown=("the reward model's learning rate and the adapters' rank (in code that we did not read)",),
    explanations={
        "PPO makes answers longer": "the testbed's gold takes points off for rambling; its reward model has learnt it",
        "Most of PPO's gain in score is length": "as above; the claim is about data sets with a taste for length",
    },
    statements=(
        Statement(
            "PPO makes answers longer",
            f"{PLACE} [S]",
            "on all three data sets",
            "tokens of PPO's answers less SFT's",
            figure("ppo length gain"),
            least=0.0,
        ),
        Statement(
            "Most of PPO's gain in score is length",
            f"{PLACE} [S]",
            "46.6 % to 98 % of it",
            "share of the gain that remains between answers of equal length",
            figure("ppo share within lengths"),
            most=0.5,
        ),
    ),
)
