"""Swamy et al. 2025: all roads lead to likelihood. When is online RLHF better than offline?"""

import functools
from typing import Any

import numpy as np
import torch

from ppo_vs_dpo.papers.claims import Report, Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.worlds.online import curves, draw_curves, offline, rlhf
from ppo_vs_dpo.papers.worlds.tree import world

PLACE = "Swamy et al. 2025 (2503.01067)"


def simulate(seed: int, settings: dict[str, Any]) -> Report:
    """DPO beside RLHF, by a verifier that is simpler than the policy and by one that is as complex as it gets."""
    torch.set_num_threads(1)
    # Gold is a sum over single actions: a linear verifier can say it, the policy must still learn to sample by it.
    tree = world(seed, settings["depth"], interaction=0.0)
    limits = np.array(settings["kl"], dtype=float)
    tracks: dict[str, list] = {"offline": [], "simple": [], "complex": []}
    for number, beta in enumerate(settings["betas"]):
        at = seed * 100 + number
        tracks["offline"].append(offline(tree, "dpo", beta, settings, at))
        tracks["simple"].append(rlhf(tree, True, beta, settings, at))
        tracks["complex"].append(rlhf(tree, False, beta, settings, at))
    gold, drawn = curves(tracks, limits)
    figures = {
        "gap, simple verifier": float((gold["simple"] - gold["offline"]).mean()),
        "gap, complex verifier": float((gold["complex"] - gold["offline"]).mean()),
    }
    figures["verifier"] = figures["gap, simple verifier"] - figures["gap, complex verifier"]
    return {"seed": seed, "figures": figures, "curves": drawn}


# The best gold within each KL: DPO, RLHF with a simple and with a complex verifier.
SHOWN = {
    "simple": ("RLHF, simple verifier", "#0072B2", "-"),
    "complex": ("RLHF, complex verifier", "#009E73", ":"),
    "offline": ("DPO", "#D55E00", "--"),
}

PAPER = Paper(
    name="swamy2025",
    title="Swamy et al. 2025: All roads lead to likelihood (2503.01067)",
    question="Is RLHF better than DPO only where verifying is simpler than generating?",
    takes="not obtained; planned on 8 GPUs of 80 GB",
    world="a tree of three actions a state whose gold is a sum over single actions; reward models that see just that, "
    "or a number for every response",
    simulate=simulate,
    draw=functools.partial(draw_curves, shown=SHOWN),
    published=(("equal optima where reward and policy classes match", "theorems 2.2 and 2.3", f"{PLACE} [S]"),),
    unknown=("sizes, learning rates, betas, episodes: not obtained",),
    statements=(
        Statement(
            "With a verifier simpler than the policy, RLHF is better than DPO at equal KL",
            f"{PLACE} [S]",
            "a gap",
            "best gold within a KL, RLHF less DPO, mean over KLs, standard deviations",
            figure("gap, simple verifier"),
            least=0.0,
        ),
        Statement(
            "The gap comes from the verifier: it shrinks when that is as complex as can be",
            f"{PLACE} [S]",
            "no gap without a generation-verification gap",
            "gap with the simple verifier less gap with the complex one",
            figure("verifier"),
            least=0.0,
        ),
    ),
)
