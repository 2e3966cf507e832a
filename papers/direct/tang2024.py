"""Tang et al. 2024: the gap between online and offline alignment algorithms."""

import functools
from typing import Any

import numpy as np
import torch

from ppo_vs_dpo.papers.claims import Report, Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.worlds.online import curves, draw_curves, offline, online
from ppo_vs_dpo.papers.worlds.tree import world

PLACE = "Tang et al. 2024 (2405.08448)"


def simulate(seed: int, settings: dict[str, Any]) -> Report:
    """IPO on pairs of the reference, and on fresh pairs of the policy itself, at several betas."""
    torch.set_num_threads(1)
    tree = world(seed, settings["depth"], settings["interaction"])
    limits = np.array(settings["kl"], dtype=float)
    tracks: dict[str, list] = {"offline": [], "more": [], "online": []}
    for number, beta in enumerate(settings["betas"]):
        at = seed * 100 + number
        tracks["offline"].append(offline(tree, "ipo", beta, settings, at))
        tracks["more"].append(offline(tree, "ipo", beta, settings, at, times=settings["more"]))
        tracks["online"].append(online(tree, "ipo", beta, settings, at))
    gold, drawn = curves(tracks, limits)
    figures = {
        "gap": float((gold["online"] - gold["offline"]).mean()),
        "gap with more pairs": float((gold["online"] - gold["more"]).mean()),
        "accuracy": float(np.mean([t.accuracy[-1] for t in tracks["offline"]]))
        - float(np.mean([t.accuracy[-1] for t in tracks["online"]])),
    }
    figures |= {
        f"gap at {limit:g}": float(a - b) for limit, a, b in zip(limits, gold["online"], gold["offline"], strict=True)
    }
    return {"seed": seed, "figures": figures, "curves": drawn}


# The best gold within each KL, online and offline.
SHOWN = {
    "online": ("online", "#0072B2", "-"),
    "offline": ("offline", "#D55E00", "--"),
    "more": ("offline, more pairs", "#CC79A7", ":"),
}

PAPER = Paper(
    name="tang2024",
    title="Tang et al. 2024: Understanding the performance gap between online and offline alignment (2405.08448)",
    question="At equal KL, is learning from the policy's own samples better than learning from given pairs, and why?",
    takes="not obtained: T5X, an XXL preference model as gold; no full configuration",
    world="a tree of three actions a state, a small network as policy; IPO; gold and KL are sums over all leaves",
    simulate=simulate,
    draw=functools.partial(draw_curves, shown=SHOWN),
    published=(("online against offline at equal KL", "online better on all four tasks", f"{PLACE} [S]"),),
    explanations={
        "Offline is the better classifier of pairs of the reference": "on a tree this small both classify alike",
    },
    unknown=("learning rates, betas, steps: not obtained",),
    statements=(
        Statement(
            "At equal KL online is better than offline (same updates, same batch)",
            f"{PLACE} [S]",
            "better at every KL",
            "best gold within a KL, online less offline, mean over KLs, standard deviations",
            figure("gap"),
            least=0.0,
        ),
        Statement(
            "More offline pairs do not close the gap",
            f"{PLACE} [S]",
            "not closed by data or scale",
            "the same against four times as many offline pairs",
            figure("gap with more pairs"),
            least=0.0,
        ),
        Statement(
            "Offline is the better classifier of pairs of the reference",
            f"{PLACE} [S]",
            "better at classifying, worse at generating",
            "accuracy on held-out pairs of the reference, offline less online",
            figure("accuracy"),
            least=0.0,
        ),
    ),
)
