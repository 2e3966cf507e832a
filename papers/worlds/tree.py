"""A tree of three actions a state (Rafailov et al. 2024), small enough to know every leaf's probability.

A response is a path of ``depth`` actions. Policies are a small network from the path so far to three logits; gold is a
sum of terms for single actions and for pairs of them, standardised under the reference. What a policy is worth and how
far it went (KL) are sums over all leaves.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import logsigmoid, one_hot

ACTIONS = 3


@dataclass(frozen=True)
class Tree:
    """The world of one seed.

    Attributes:
        paths: ``(Y, depth)`` every response's actions.
        prefixes: ``(S, depth * 3)`` what the network sees of every state.
        states: ``(Y, depth)`` the state before each action of each response.
        gold: ``(Y,)`` rewards.
        network: the reference.
        reference: ``(Y,)`` its log-probabilities.
    """

    paths: torch.Tensor
    prefixes: torch.Tensor
    states: torch.Tensor
    gold: torch.Tensor
    network: torch.nn.Module
    reference: torch.Tensor

    def law(self, model: torch.nn.Module) -> torch.Tensor:
        """Log-probabilities ``(Y,)`` of all responses."""
        steps = torch.log_softmax(model(self.prefixes), 1)[self.states]
        return steps.gather(2, self.paths[:, :, None])[:, :, 0].sum(1)

    def features(self) -> torch.Tensor:
        """``(Y, depth * 3)`` which action stands where: what a simple reward model sees."""
        return one_hot(self.paths, ACTIONS).flatten(1).double()


def world(seed: int, depth: int, interaction: float, hidden: int = 32) -> Tree:
    """A tree, a random reference, gold.

    With ``interaction`` 0, the weight of gold's pairwise terms, gold is additive.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    paths = torch.tensor(list(itertools.product(range(ACTIONS), repeat=depth)))
    known: dict[tuple[int, ...], int] = {}
    rows = []
    states = torch.zeros(len(paths), depth, dtype=torch.long)
    for number, path in enumerate(paths.tolist()):
        for place in range(depth):
            prefix = tuple(path[:place])
            if prefix not in known:
                known[prefix] = len(rows)
                row = torch.zeros(depth, ACTIONS)
                row[torch.arange(place), torch.tensor(prefix, dtype=torch.long)] = 1.0
                rows.append(row.flatten())
            states[number, place] = known[prefix]
    single = rng.normal(size=(depth, ACTIONS))
    double = rng.normal(size=(depth, ACTIONS, depth, ACTIONS))
    gold = np.array([sum(single[i, a] for i, a in enumerate(path)) for path in paths.tolist()])
    gold = gold + interaction * np.array(
        [sum(double[i, a, j, path[j]] for i, a in enumerate(path) for j in range(i)) for path in paths.tolist()]
    )
    model = torch.nn.Sequential(
        torch.nn.Linear(depth * ACTIONS, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, ACTIONS)
    ).double()
    tree = Tree(paths, torch.stack(rows).double(), states, torch.tensor(gold), model, torch.zeros(len(paths)))
    with torch.no_grad():
        reference = tree.law(model)
    p = reference.exp()
    centred = tree.gold - p @ tree.gold
    return Tree(paths, tree.prefixes, states, centred / (p @ centred**2).sqrt(), model, reference)


def draw(law: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """``(count,)`` responses of a policy."""
    return torch.multinomial(law.detach().exp(), count, replacement=True, generator=generator)


def labelled(
    tree: Tree, law: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(winners, losers)``: pairs of a policy's responses, by Bradley and Terry's model of gold."""
    first, second = draw(law, count, generator), draw(law, count, generator)
    better = torch.rand(count, generator=generator, dtype=torch.double) < torch.sigmoid(
        tree.gold[first] - tree.gold[second]
    )
    return torch.where(better, first, second), torch.where(better, second, first)


def pair_loss(kind: str, margin: torch.Tensor, beta: float) -> torch.Tensor:
    """Of the log-ratio margin h_w - h_l: DPO, IPO (Azar et al. 2024, eq. 17) or SLiC's hinge (Rafailov 2024)."""
    if kind == "dpo":
        return -logsigmoid(beta * margin).mean()
    if kind == "ipo":
        return ((margin - 1 / (2 * beta)) ** 2).mean()
    return torch.relu(1 - beta * margin).mean()


@dataclass
class Track:
    """A policy along its training; each list has an entry a look."""

    step: list[int]
    kl: list[float]
    gold: list[float]
    chosen: list[float]
    accuracy: list[float]


def train(
    tree: Tree,
    loss: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
    lr: float,
    looks: int,
    pairs: tuple[torch.Tensor, torch.Tensor],
    before: Callable[[int, torch.nn.Module], None] = lambda step, model: None,
) -> tuple[torch.nn.Module, Track]:
    """Adam from the reference on a loss of the policy's law.

    Args:
        loss: of the log-probabilities ``(Y,)``.
        looks: how often the policy is measured, evenly, the start and the end among them.
        pairs: ``(winners, losers)`` on which log-probability of the chosen and accuracy are taken.
        before: called before each update, to draw new samples.
    """
    model = copy.deepcopy(tree.network)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    track = Track([], [], [], [], [])
    at = set(np.linspace(0, steps, looks).round().astype(int).tolist())
    for step in range(steps + 1):
        before(step, model)
        law = tree.law(model)
        if step in at:
            with torch.no_grad():
                p, ratio = law.exp(), law - tree.reference
                track.step.append(step)
                track.kl.append(float(p @ ratio))
                track.gold.append(float(p @ tree.gold))
                track.chosen.append(float(ratio[pairs[0]].mean()))
                gap = ratio[pairs[0]] - ratio[pairs[1]]
                track.accuracy.append(float(((gap > 0).double() + (gap == 0).double() / 2).mean()))
        if step < steps:
            optimizer.zero_grad()
            loss(law).backward()
            optimizer.step()
    return model, track
