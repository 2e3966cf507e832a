"""A handful of prompts with a handful of responses each, and policies that are a small network (Xu et al. 2024, 4.2).

Some responses are in no pair: what each method does with them is the question. Everything is in float32 on one thread,
as small networks are trained.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import logsigmoid

SIZE = 8


@dataclass(frozen=True)
class Cells:
    """The world of one seed; arrays ``(prompts, responses)``.

    Attributes:
        gold: rewards; the best response of prompt i is response i.
        reference: log-probabilities of the reference.
        network: the reference itself.
        covered: whether a response is in any pair of its prompt.
        pairs: ``(prompt, first, second, P(first is better))``, each ``(M,)``.
    """

    gold: np.ndarray
    reference: torch.Tensor
    network: torch.nn.Module
    covered: np.ndarray
    pairs: tuple[torch.Tensor, ...]


def network(hidden: int = 64) -> torch.nn.Module:
    """A one-hot prompt to a score for each response."""
    return torch.nn.Sequential(torch.nn.Linear(SIZE, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, SIZE))


def laws(model: torch.nn.Module) -> torch.Tensor:
    """Log-probabilities ``(prompts, responses)``."""
    return torch.log_softmax(model(torch.eye(SIZE)), 1)


def world(seed: int, covered: int, noisy: bool) -> Cells:
    """Rewards, a reference fitted to a random law, and all pairs among ``covered`` responses of each prompt.

    The best response is among them. ``noisy``: labels by Bradley and Terry's probabilities; else gold's order, for
    certain.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=(SIZE, SIZE))
    gold[np.arange(SIZE), np.arange(SIZE)] = gold.max(1) + 1
    reference = network()
    law = torch.tensor(rng.dirichlet(np.full(SIZE, 2.0), size=SIZE), dtype=torch.float32)
    train(reference, lambda: -(law * laws(reference)).sum(1).mean(), 400, 1e-2)
    seen = np.zeros((SIZE, SIZE), dtype=bool)
    rows = []
    for prompt in range(SIZE):
        others = rng.choice([y for y in range(SIZE) if y != prompt], covered - 1, replace=False)
        chosen = [prompt, *others]
        seen[prompt, chosen] = True
        for i, first in enumerate(chosen):
            for second in chosen[i + 1 :]:
                gap = gold[prompt, first] - gold[prompt, second]
                rows.append((prompt, int(first), int(second), 1 / (1 + np.exp(-gap)) if noisy else float(gap > 0)))
    prompts, first, second, probability = (torch.tensor(np.array(column)) for column in zip(*rows, strict=True))
    with torch.no_grad():
        log_reference = laws(reference)
    return Cells(gold, log_reference, reference, seen, (prompts, first, second, probability.float()))


def train(model: torch.nn.Module, loss, steps: int, lr: float) -> None:
    """Adam on a loss of the whole set."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def cross_entropy(margin: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
    """Of labels that are probabilities."""
    return -(probability * logsigmoid(margin) + (1 - probability) * logsigmoid(-margin)).mean()


def dpo(cells: Cells, beta: float, steps: int, lr: float = 1e-3) -> torch.Tensor:
    """Log-probabilities of DPO's policy, trained from the reference (Rafailov et al. 2023, eq. 7)."""
    model = copy.deepcopy(cells.network)
    prompts, first, second, probability = cells.pairs

    def loss():
        ratio = laws(model) - cells.reference
        return cross_entropy(beta * (ratio[prompts, first] - ratio[prompts, second]), probability)

    train(model, loss, steps, lr)
    with torch.no_grad():
        return laws(model)


def rlhf(cells: Cells, beta: float, steps: int, lr: float = 1e-3) -> torch.Tensor:
    """Log-probabilities after a reward model and exact policy gradients of E r - beta KL, from the reference."""
    reward_model = network()
    prompts, first, second, probability = cells.pairs

    def reward_loss():
        scores = reward_model(torch.eye(SIZE))
        return cross_entropy(scores[prompts, first] - scores[prompts, second], probability)

    train(reward_model, reward_loss, steps, lr)
    with torch.no_grad():
        scores = reward_model(torch.eye(SIZE))
        scores = scores - (scores * cells.reference.exp()).sum(1, keepdim=True)
    model = copy.deepcopy(cells.network)

    def loss():
        law = laws(model)
        return -(law.exp() * (scores - beta * (law - cells.reference))).sum(1).mean()

    train(model, loss, steps, lr)
    with torch.no_grad():
        return laws(model)


def figures(cells: Cells, law: torch.Tensor) -> dict[str, float]:
    """Mass on responses that are in no pair, on the best response, and expected gold, means over prompts."""
    policy = law.exp().numpy()
    return {
        "unseen mass": float(policy[~cells.covered].sum() / SIZE),
        "best": float(np.diag(policy).mean()),
        "gold": float((policy * cells.gold).sum(1).mean()),
    }
