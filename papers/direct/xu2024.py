"""Xu et al. 2024: is DPO superior to PPO? What each does with responses that no pair has."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ppo_vs_dpo.papers.claims import Report, Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.worlds.cells import dpo, figures, rlhf, world

PLACE = "Xu et al. 2024 (2404.10719)"


def simulate(seed: int, settings: dict[str, Any]) -> Report:
    """DPO, and a reward model with exact RL, from one reference on one set of pairs, at each beta."""
    torch.set_num_threads(1)
    found: dict[str, float] = {"counterexample": counterexample()}
    cells = world(seed, settings["covered"], noisy=True)
    reference = figures(cells, cells.reference)
    for beta in settings["betas"]:
        both = {
            "dpo": figures(cells, dpo(cells, beta, settings["steps"])),
            "ppo": figures(cells, rlhf(cells, beta, settings["steps"])),
        }
        for method, values in both.items():
            found |= {f"{method} {beta} {name}": value for name, value in values.items()}
        for name in both["dpo"]:
            found[f"{beta} {name}"] = both["dpo"][name] - both["ppo"][name]
    return {"seed": seed, "figures": {**found, **{f"reference {k}": v for k, v in reference.items()}}}


def counterexample(beta: float = 0.1) -> float:
    """Table 1: DPO's loss of the best policy that keeps off the third response, less that of one that lives there.

    p = (1/2, 1/2, 0), one pair 1 > 2. With pi = (a, b, 1 - a - b) the loss is log(1 + (b/a)^beta): (.1, 0, .9) has 0,
    every policy with b > 0 more, though E r - beta KL(pi || p) is -infinity there and the RL optimum has pi(3) = 0.
    """

    def loss(a: float, b: float) -> float:
        return float(np.log1p((b / a) ** beta))

    kept = min(loss(a, 1 - a) for a in np.linspace(0.5, 0.999, 500))
    return kept - loss(0.1, 0.0)


def draw(axes: Any, reports: Sequence[Report]) -> None:
    """Mass on responses that no pair has: reference, DPO and PPO."""
    betas = sorted({name.split()[1] for name in reports[0]["figures"] if name.startswith("dpo ")})
    for number, beta in enumerate(betas):
        for offset, (method, colour) in enumerate((("dpo", "#D55E00"), ("ppo", "#0072B2"))):
            values = [report["figures"][f"{method} {beta} unseen mass"] for report in reports]
            places = number + 0.25 * offset + np.linspace(-0.05, 0.05, len(values))
            axes.scatter(places, values, color=colour, s=14, label=method.upper())
    mean = np.mean([report["figures"]["reference unseen mass"] for report in reports])
    axes.axhline(mean, color="#444444", linestyle="--", label="reference, mean")
    axes.set_xticks([number + 0.125 for number in range(len(betas))], [f"beta {beta}" for beta in betas])
    axes.set_ylabel("mass on responses that no pair has")


PAPER = Paper(
    name="xu2024",
    title="Xu et al. 2024: Is DPO superior to PPO for LLM alignment? A comprehensive study (2404.10719)",
    question="Does DPO exploit responses outside of its pairs where PPO does not, and which is better?",
    takes="Llama-2-7B, PPO 5 and DPO 2 passes; hardware not in our notes, planned on 8 GPUs of 80 GB",
    world="8 prompts with 8 responses each, small networks, half of the responses in no pair; exact expectations",
    simulate=simulate,
    draw=draw,
    published=(
        ("SafeRLHF, Llama-2-7B, safety rate: PPO", "99.5 %", f"{PLACE}, table 2 [P]"),
        ("SafeRLHF, Llama-2-7B, safety rate: DPO", "55.4 %", f"{PLACE}, table 2 [P]"),
        ("HH, reward by OpenAssistant's model: DPO", "0.611", f"{PLACE}, table 4 [P]"),
        ("HH, reward by OpenAssistant's model: iterative DPO", "0.678", f"{PLACE}, table 4 [P]"),
        ("HH, reward by OpenAssistant's model: PPO", "0.718", f"{PLACE}, table 4 [P]"),
        ("APPS introductory, PPO without and with advantage normalisation", "18.0, 38.1", f"{PLACE}, table 3 [P]"),
        ("synthetic: one cell outside of the pairs under DPO", "from .11 to .23", f"{PLACE}, section 4.2 [P]"),
    ),
    unknown=("learning rates of SFT and reward model (not in the notes this was written from)",),
    explanations={
        "DPO puts more mass than PPO on responses that no pair has, at beta 0.1": (
            "which way unseen responses go depends on how the networks generalise; at a small beta the reward model's "
            "guesses about them are amplified, too, and nothing restrains them"
        ),
        "PPO finds the best response more often, at beta 0.1": (
            "as above: mass that the reward model's guesses draw away is missing at the best response"
        ),
    },
    statements=(
        Statement(
            "DPO has minimisers outside of the reference's support that RL has not",
            f"{PLACE}, table 1",
            "a counterexample",
            "loss of the best policy that keeps off it, less the loss of one that does not (0)",
            figure("counterexample"),
            least=1e-3,
            always=True,
        ),
        *(
            Statement(
                f"DPO puts more mass than PPO on responses that no pair has, at beta {beta}",
                f"{PLACE}, section 4.2",
                "one cell .11 to .23 under DPO, not under PPO",
                "mass on unseen responses, DPO less PPO",
                figure(f"{beta} unseen mass"),
                least=0.0,
            )
            for beta in (0.1, 0.5)
        ),
        *(
            Statement(
                f"PPO finds the best response more often, at beta {beta}",
                f"{PLACE}, section 4.2",
                "PPO at the optimum",
                "probability of the best response, PPO less DPO",
                lambda report, beta=beta: -report["figures"][f"{beta} best"],
                least=0.0,
            )
            for beta in (0.1, 0.5)
        ),
    ),
)
