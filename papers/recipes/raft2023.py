"""Dong et al. 2023 (RAFT) and Liu et al. 2023 (RSO): choosing among samples, whose laws are known exactly."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppo_vs_dpo.papers.claims import Report, Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.worlds.bits import best_of_n, bradley_terry, pairs, tilt, world
from ppo_vs_dpo.preferences.rejection.select import acceptance, pick_best

RAFT, RSO = "Dong et al. 2023, RAFT (2304.06767)", "Liu et al. 2023, RSO (2309.06657)"


def simulate(seed: int, settings: dict[str, Any]) -> Report:
    """RAFT's rounds with perfect fits, RSO's accepted law, and this project's own selection against both."""
    rng = np.random.default_rng(seed)
    bits = world(rng, settings["length"])
    winners, losers = pairs(bits, settings["pairs"], rng)
    seen = bits.features("small")
    proxy = seen @ bradley_terry(seen[winners] - seen[losers])
    k, beta = settings["k"], settings["beta"]
    policy, gold, scores, entropy = bits.reference, [], [], []
    for _ in range(settings["rounds"]):
        gold.append(float(policy @ bits.gold))
        scores.append(float(policy @ proxy))
        entropy.append(float(-(policy[policy > 0] * np.log(policy[policy > 0])).sum()))
        policy = best_of_n(policy, proxy, k)
    twice = best_of_n(best_of_n(bits.reference, proxy, k), proxy, k)
    accepted = bits.reference * acceptance(proxy, beta)
    # The project's own choice among K draws, counted over groups of draws.
    draws = rng.choice(len(bits.reference), (settings["groups"], k), p=bits.reference)
    picked = np.array([row[pick_best(proxy[row], rng)] for row in draws])
    error = proxy[picked].std() / np.sqrt(len(picked))
    law = best_of_n(bits.reference, proxy, k)
    figures = {
        "composition": float(np.abs(twice - best_of_n(bits.reference, proxy, k * k)).max()),
        "accepted law": float(np.abs(accepted / accepted.sum() - tilt(bits.reference, proxy, beta)).max()),
        "rate": float(abs(accepted.sum() / (bits.reference @ np.exp((proxy - proxy.max()) / beta)) - 1)),
        "entropy least fall": float(-np.diff(entropy).max()),
        "score gain": scores[1] - scores[0],
        "gold fall": max(gold) - gold[-1],
        "selection z": float(abs(proxy[picked].mean() - law @ proxy) / error),
    }
    return {"seed": seed, "figures": figures, "curves": {"gold": gold, "score": scores, "entropy": entropy}}


def draw(axes: Any, reports: Sequence[Report]) -> None:
    """Gold and score over RAFT's rounds."""
    for report in reports:
        axes.plot(report["curves"]["gold"], "o-", color="#0072B2", alpha=0.5, label="gold")
        axes.plot(report["curves"]["score"], "s--", color="#D55E00", alpha=0.5, label="reward model")
    axes.set(xlabel="rounds of RAFT", ylabel="mean reward")


PAPER = Paper(
    name="raft2023",
    title="Dong et al. 2023: RAFT (2304.06767); Liu et al. 2023: statistical rejection sampling, RSO (2309.06657)",
    question="What does choosing among samples do, and what does repeating it do?",
    takes="LLaMA-7B on 8 x A40, 5 to 7 hours for K = 8 to 32",
    world="4,096 bit strings with exact probabilities; fine-tuning is a perfect fit",
    simulate=simulate,
    draw=draw,
    published=(
        ("RAFT on HH, reward at K = 8, 16, 32", "2.180, 2.251, 2.329", f"{RAFT} [S]"),
        ("RAFT (K = 32) and PPO on HH, reward", "2.294, 2.077", f"{RAFT} [S]"),
        ("RSO and DPO on TL;DR, T5-large, proxy of gold", "84.40, 76.09", f"{RSO} [S]"),
    ),
    explanations={
        "Entropy falls with every round": (
            "no theorem: ones have probability .35 and are liked, and .5 has more entropy, so first rounds raise it"
        ),
    },
    unknown=("RAFT: prompts of a round, temperature, response length, learning rate; the reward model's Hub name",),
    statements=(
        Statement(
            "Two rounds with K samples are one with K^2",
            f"{RAFT}; best-of-n composes",
            "exact for a perfect fit",
            "largest difference of the two laws",
            figure("composition"),
            most=1e-12,
            always=True,
        ),
        Statement(
            "What RSO accepts follows the KL-regularised optimum",
            f"{RSO}, theorem 1",
            "exact",
            "largest difference from p e^(r/beta) / Z",
            figure("accepted law"),
            most=1e-12,
            always=True,
        ),
        Statement(
            "... at the rate Z e^(-r_max/beta)",
            f"{RSO}",
            "exact",
            "relative difference of the rate",
            figure("rate"),
            most=1e-12,
            always=True,
        ),
        Statement(
            "A round raises the reward model's score",
            f"{RAFT} [S]",
            ".772 to 2.294 in all",
            "mean score after one round less before",
            figure("score gain"),
            least=0.0,
        ),
        Statement(
            "Entropy falls with every round",
            f"{RAFT}: diversity is what is spent",
            "falls",
            "least fall of entropy over the rounds, nats",
            figure("entropy least fall"),
            least=0.0,
            always=True,
        ),
        Statement(
            "Rounds over-optimise as best-of-n does",
            "follows from the composition, with Gao et al. 2022",
            "gold rises, then falls",
            "gold at its peak less gold after the last round, standard deviations",
            figure("gold fall"),
            least=0.1,
        ),
        Statement(
            "This project's own choice among K samples follows that law",
            "data.rule=best_vs_worst",
            "mean score within sampling error",
            "distance of the mean score from the exact one, standard errors",
            figure("selection z"),
            most=3.0,
        ),
    ),
)
