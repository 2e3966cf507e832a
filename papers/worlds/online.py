"""Methods on the tree: pairs collected once, pairs drawn from the policy itself, samples that have grown stale."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ppo_vs_dpo.papers.worlds.tree import Track, Tree, draw, labelled, pair_loss, train


def offline(tree: Tree, kind: str, beta: float, settings: dict[str, Any], seed: int, times: int = 1) -> Track:
    """Direct alignment on ``times * pairs`` pairs of the reference, ``batch`` of them drawn for each update."""
    generator = torch.Generator().manual_seed(seed)
    winners, losers = labelled(tree, tree.reference, times * settings["pairs"], generator)
    now: dict[str, torch.Tensor] = {}

    def before(step: int, model: torch.nn.Module) -> None:
        now["rows"] = torch.randint(len(winners), (settings["batch"],), generator=generator)

    def loss(law: torch.Tensor) -> torch.Tensor:
        ratio, rows = law - tree.reference, now["rows"]
        return pair_loss(kind, ratio[winners[rows]] - ratio[losers[rows]], beta)

    test = held_out(tree, settings["test_pairs"], seed)
    return train(tree, loss, settings["steps"], settings["learning_rate"], settings["looks"], test, before)[1]


def online(tree: Tree, kind: str, beta: float, settings: dict[str, Any], seed: int, refresh: int = 1) -> Track:
    """Direct alignment on ``batch`` fresh pairs an update, drawn ``refresh`` updates' worth at a time.

    With ``refresh`` above 1 the last of them are that many updates old. With ``kind="rloo"`` the pairs'
    gold is the reward: REINFORCE with the other sample as the baseline (Ahmadian et al. 2024, RLOO, k = 2), the KL
    penalty in the reward, through the ratio to the samples' law.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = settings["batch"]
    drawn: dict[str, torch.Tensor] = {}
    now: dict[str, torch.Tensor] = {}

    def before(step: int, model: torch.nn.Module) -> None:
        if step % refresh == 0:
            with torch.no_grad():
                drawn["law"] = law = tree.law(model)
            if kind == "rloo":
                drawn["first"], drawn["second"] = (draw(law, batch * refresh, generator) for _ in range(2))
            else:
                drawn["first"], drawn["second"] = labelled(tree, law, batch * refresh, generator)
        rows = slice(batch * (step % refresh), batch * (step % refresh + 1))
        now["first"], now["second"] = drawn["first"][rows], drawn["second"][rows]

    def loss(law: torch.Tensor) -> torch.Tensor:
        first, second = now["first"], now["second"]
        if kind != "rloo":
            ratio = law - tree.reference
            return pair_loss(kind, ratio[first] - ratio[second], beta)
        reward = tree.gold - beta * (drawn["law"] - tree.reference)
        importance = (law - drawn["law"]).exp()
        gap = reward[first] - reward[second]
        return -((importance[first] - importance[second]) * gap).mean() / 2

    test = held_out(tree, settings["test_pairs"], seed)
    return train(tree, loss, settings["steps"], settings["learning_rate"], settings["looks"], test, before)[1]


def held_out(tree: Tree, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(better, worse)`` by gold's order: pairs of the reference that no training saw."""
    generator = torch.Generator().manual_seed(seed + 10_000)
    first, second = (draw(tree.reference, count, generator) for _ in range(2))
    better = tree.gold[first] >= tree.gold[second]
    return torch.where(better, first, second), torch.where(better, second, first)


def rlhf(tree: Tree, simple: bool, beta: float, settings: dict[str, Any], seed: int) -> Track:
    """A reward model on ``pairs`` pairs of the reference, then exact gradients of E r - beta KL from the reference.

    With ``simple`` the reward model sees single actions only and is linear; else it is a number for every
    response.
    """
    generator = torch.Generator().manual_seed(seed)
    winners, losers = labelled(tree, tree.reference, settings["pairs"], generator)
    features = tree.features() if simple else torch.eye(len(tree.paths), dtype=torch.double)
    weights = torch.zeros(features.shape[1], dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        scores = features @ weights
        value = -torch.nn.functional.logsigmoid(scores[winners] - scores[losers]).mean() + 1e-3 * weights @ weights
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        scores = features @ weights

    def loss(law: torch.Tensor) -> torch.Tensor:
        return -(law.exp() * (scores - beta * (law - tree.reference))).sum()

    test = held_out(tree, settings["test_pairs"], seed)
    return train(tree, loss, settings["steps"], settings["learning_rate"], settings["looks"], test)[1]


def best_within(tracks: list[Track], kl: np.ndarray) -> np.ndarray:
    """The best gold that any of the tracks had within each KL."""
    reached = np.concatenate([track.kl for track in tracks])
    gold = np.concatenate([track.gold for track in tracks])
    return np.array([gold[reached <= limit].max() for limit in kl])


def curves(tracks: dict[str, list[Track]], kl: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """The best gold of each group of tracks within each KL, and the same as a report has it."""
    gold = {name: best_within(group, kl) for name, group in tracks.items()}
    return gold, {name: {"kl": kl.tolist(), "gold": values.tolist()} for name, values in gold.items()}


def draw_curves(axes: Any, reports: Sequence[dict[str, Any]], shown: dict[str, tuple[str, str, str]]) -> None:
    """The reports' `curves`, each by its name, colour and line."""
    for report in reports:
        for name, curve in report["curves"].items():
            label, colour, line = shown[name]
            axes.plot(np.sqrt(curve["kl"]), curve["gold"], line, color=colour, alpha=0.6, label=label)
    axes.set(xlabel="sqrt KL(policy, reference), nats^½", ylabel="best gold within that KL, standard deviations")
