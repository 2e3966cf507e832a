"""Rafailov et al. 2024: direct alignment algorithms over-optimise as reward models do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ppo_vs_dpo.papers.claims import Report, Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.worlds.tree import labelled, pair_loss, train, world

PLACE = "Rafailov et al. 2024 (2406.02900)"
LOSSES = ("dpo", "ipo", "slic")


def simulate(seed: int, settings: dict[str, Any]) -> Report:
    """Each loss at each beta, from one reference on one set of pairs, watched along training."""
    torch.set_num_threads(1)
    tree = world(seed, settings["depth"], settings["interaction"])
    generator = torch.Generator().manual_seed(seed)
    pairs = labelled(tree, tree.reference, settings["pairs"], generator)
    winners, losers = pairs
    figures: dict[str, float] = {}
    curves: dict[str, Any] = {}
    ends = {}
    for kind in LOSSES:
        for beta in settings["betas"]:

            def loss(law, kind=kind, beta=beta):
                ratio = law - tree.reference
                return pair_loss(kind, ratio[winners] - ratio[losers], beta)

            _, track = train(tree, loss, settings["steps"], settings["learning_rate"], settings["looks"], pairs)
            top = int(np.argmax(track.gold))
            label = f"{kind} {beta:g}"
            curves[label] = {"kl": track.kl, "gold": track.gold}
            figures[f"{label} fall"] = track.gold[top] - track.gold[-1]
            figures[f"{label} peak share"] = track.step[top] / track.step[-1]
            figures[f"{label} chosen"] = track.chosen[-1]
            figures[f"{label} accuracy gain"] = track.accuracy[-1] - track.accuracy[top]
            figures[f"{label} end"] = track.gold[-1]
            figures[f"{label} kl"] = track.kl[-1]
            ends[kind, beta] = track.gold[-1]
    widest = min(settings["betas"])
    for kind in LOSSES:
        best = max(ends[kind, beta] for beta in settings["betas"])
        figures[f"{kind} hump"] = best - ends[kind, widest]
        for name in ("fall", "peak share", "chosen", "accuracy gain"):
            figures[f"{kind} {name}"] = figures[f"{kind} {widest:g} {name}"]
    return {"seed": seed, "figures": figures, "curves": curves}


def draw(axes: Any, reports: Sequence[Report]) -> None:
    """Gold against the square root of KL at the end of training, each beta a point, and along the first seed's DPO."""
    colours = {"dpo": "#D55E00", "ipo": "#0072B2", "slic": "#009E73"}
    for kind in LOSSES:
        labels = [label for label in reports[0]["curves"] if label.startswith(f"{kind} ")]
        for report in reports:
            points = sorted(
                (np.sqrt(max(report["figures"][f"{label} kl"], 0)), report["figures"][f"{label} end"])
                for label in labels
            )
            name = f"{kind.upper()}, by beta"
            axes.plot(*zip(*points, strict=True), "o-", color=colours[kind], alpha=0.5, markersize=3, label=name)
    axes.set(xlabel="sqrt KL(policy, reference) at the end, nats^½", ylabel="gold reward, standard deviations")


def _hump(kind: str) -> Statement:
    name = {"dpo": "DPO", "ipo": "IPO", "slic": "SLiC"}[kind]
    return Statement(
        f"{name}: a hump of quality against KL, over beta",
        f"{PLACE} [S]",
        "a hump for all three losses",
        "gold at the end of training: best beta less widest KL, standard deviations",
        figure(f"{kind} hump"),
        least=0.05,
    )


PAPER = Paper(
    name="daa2024",
    title="Rafailov et al. 2024: Scaling laws for reward model overoptimization in direct alignment (2406.02900)",
    question="Do DPO, IPO and SLiC over-optimise as a reward model does, and when along training?",
    takes="Pythia 1B to 6.9B, one pass over 92k pairs; hardware not published, planned on 8 GPUs of 80 GB",
    world="a tree of three actions a state, a small network as policy; gold and KL are sums over all leaves",
    simulate=simulate,
    draw=draw,
    published=(
        ("wide-KL runs peak after", "about 25 % of the pass", f"{PLACE} [S]"),
        ("least affected loss", "IPO", f"{PLACE} [S]"),
        ("most affected size", "1B", f"{PLACE} [S]"),
        ("log-probability of the chosen", "falls, about as -KL(ref || policy)", f"{PLACE} [S]"),
    ),
    explanations={
        "DPO: a hump of quality against KL, over beta": (
            "trees differ: on some the widest KL is nearly the best of the five"
        ),
        "IPO: a hump of quality against KL, over beta": (
            "IPO stops at a margin of 1 / (2 beta); here its quality still rises with KL"
        ),
        "SLiC: a hump of quality against KL, over beta": "as for DPO",
        "At a small beta DPO's quality peaks inside training and falls": "trees differ, and five are few",
        "... in the first half": "trees differ, and five are few",
        "... while accuracy on the pairs goes on rising: it does not tell quality": "trees differ, and five are few",
        "IPO suffers less than DPO": "trees differ, and five are few",
    },
    unknown=("four of the seven betas", "lengths", "the coefficients of the refitted forms"),
    statements=(
        *(_hump(kind) for kind in LOSSES),
        Statement(
            "At a small beta DPO's quality peaks inside training and falls",
            f"{PLACE} [S]",
            "peak after about 25 % of the pass",
            "gold at its peak less gold at the end, standard deviations",
            figure("dpo fall"),
            least=0.05,
        ),
        Statement(
            "... in the first half",
            f"{PLACE} [S]",
            "about 25 %",
            "share of training at the peak",
            figure("dpo peak share"),
            most=0.5,
        ),
        Statement(
            "... while accuracy on the pairs goes on rising: it does not tell quality",
            f"{PLACE} [S]",
            "implicit accuracy and loss do not predict win rate",
            "accuracy at the end less accuracy at gold's peak",
            figure("dpo accuracy gain"),
            least=0.0,
        ),
        Statement(
            "The log-probability of chosen responses falls",
            f"{PLACE} [S]",
            "falls",
            "mean change from the reference at the end, nats",
            figure("dpo chosen"),
            most=0.0,
        ),
        Statement(
            "IPO suffers less than DPO",
            f"{PLACE} [S]",
            "least of the three",
            "fall of gold from its peak, DPO less IPO, at the smallest beta",
            lambda report: report["figures"]["dpo fall"] - report["figures"]["ipo fall"],
            least=0.0,
        ),
    ),
)
