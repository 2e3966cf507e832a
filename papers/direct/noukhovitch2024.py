"""Noukhovitch et al. 2024: asynchronous RLHF, and how stale samples may be."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ppo_vs_dpo.papers.claims import Report, Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.worlds.online import best_within, offline, online
from ppo_vs_dpo.papers.worlds.tree import world

PLACE = "Noukhovitch et al. 2024 (2410.18252)"
METHODS = {"dpo": "online DPO", "rloo": "RLOO, k = 2"}


def simulate(seed: int, settings: dict[str, Any]) -> Report:
    """Online DPO and a policy gradient whose samples are drawn anew every 1 to 64 updates; offline DPO beside them."""
    torch.set_num_threads(1)
    tree = world(seed, settings["depth"], settings["interaction"])
    limits = np.array(settings["kl"], dtype=float)
    gold = {
        (method, refresh): best_within(
            [online(tree, method, settings["betas"][method], settings, seed, refresh=refresh)], limits
        ).mean()
        for method in METHODS
        for refresh in settings["refresh"]
    }
    given = best_within([offline(tree, "dpo", settings["betas"]["dpo"], settings, seed)], limits)
    first, last = min(settings["refresh"]), max(settings["refresh"])
    figures = {f"{method} {refresh}": float(value) for (method, refresh), value in gold.items()}
    figures["offline"] = float(given.mean())
    figures["online less offline"] = figures[f"dpo {first}"] - figures["offline"]
    for method in METHODS:
        figures[f"{method} loss"] = figures[f"{method} {first}"] - figures[f"{method} {last}"]
    figures["robustness"] = figures["rloo loss"] - figures["dpo loss"]
    return {"seed": seed, "figures": figures}


def draw(axes: Any, reports: Sequence[Report]) -> None:
    """Gold against staleness."""
    colours = {"dpo": "#D55E00", "rloo": "#0072B2"}
    for report in reports:
        for method, shown in METHODS.items():
            places = sorted(int(k.split()[-1]) for k in report["figures"] if k.startswith(method) and k[-1].isdigit())
            values = [report["figures"][f"{method} {place}"] for place in places]
            axes.plot(places, values, "o-", color=colours[method], alpha=0.6, label=shown)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="updates between two drawings of samples", ylabel="best gold within a KL, mean over KLs")


PAPER = Paper(
    name="noukhovitch2024",
    title="Noukhovitch et al. 2024: Asynchronous RLHF (2410.18252)",
    question="How far behind may the samples be, and which method bears it best?",
    takes="410M and 1B on one GPU, 2.8B on four (released code)",
    world="a tree of three actions a state, a small network as policy; gold and KL are sums over all leaves",
    simulate=simulate,
    draw=draw,
    published=(
        ("staleness looked at", "1 to 64 updates", f"{PLACE} [C]"),
        ("most robust to it", "online DPO", f"{PLACE} [C]"),
    ),
    unknown=("the coefficient and temperature of its PPO (TRL's defaults of that time)",),
    statements=(
        Statement(
            "Online is better than offline at equal KL",
            f"{PLACE} [C]",
            "better",
            "best gold within a KL, online DPO less offline DPO, same updates and batch, mean over KLs",
            figure("online less offline"),
            least=0.0,
        ),
        Statement(
            "Of the online methods online DPO bears stale samples best",
            f"{PLACE} [C]",
            "most robust",
            "gold lost from fresh samples to the stalest, RLOO less online DPO",
            figure("robustness"),
            least=0.0,
        ),
    ),
)
