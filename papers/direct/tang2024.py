"""Tang et al. 2024: the gap between online and offline alignment algorithms."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ppo_vs_dpo.papers.claims import Report, Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.worlds.online import best_within, offline, online
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
    gold = {name: best_within(group, limits) for name, group in tracks.items()}
    figures = {
        "gap": float((gold["online"] - gold["offline"]).mean()),
        "gap with more pairs": float((gold["online"] - gold["more"]).mean()),
        "accuracy": float(np.mean([t.accuracy[-1] for t in tracks["offline"]]))
        - float(np.mean([t.accuracy[-1] for t in tracks["online"]])),
    }
    figures |= {
        f"gap at {limit:g}": float(a - b) for limit, a, b in zip(limits, gold["online"], gold["offline"], strict=True)
    }
    curves = {name: {"kl": limits.tolist(), "gold": values.tolist()} for name, values in gold.items()}
    return {"seed": seed, "figures": figures, "curves": curves}


def draw(axes: Any, reports: Sequence[Report]) -> None:
    """The best gold within each KL, online and offline."""
    styles = {"online": ("#0072B2", "-"), "offline": ("#D55E00", "--"), "more": ("#CC79A7", ":")}
    names = {"online": "online", "offline": "offline", "more": "offline, more pairs"}
    for number, report in enumerate(reports):
        for name, curve in report["curves"].items():
            colour, line = styles[name]
            shown = names[name] if number == 0 else None
            axes.plot(np.sqrt(curve["kl"]), curve["gold"], line, color=colour, alpha=0.6, label=shown)
    axes.set_xlabel("sqrt KL(policy, reference), nats^½")
    axes.set_ylabel("best gold within that KL, standard deviations")
    axes.legend(frameon=False, fontsize=8)


PAPER = Paper(
    name="tang2024",
    title="Tang et al. 2024: Understanding the performance gap between online and offline alignment (2405.08448)",
    question="At equal KL, is learning from the policy's own samples better than learning from given pairs, and why?",
    takes="not obtained: T5X, an XXL preference model as gold; no full configuration",
    world="a tree of three actions a state, a small network as policy; IPO; gold and KL are sums over all leaves",
    simulate=simulate,
    draw=draw,
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
