"""Coste et al. 2023, with WARM (Ramé et al. 2024) and PAR (Fu et al. 2025) on the same plot: several reward models."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ppo_vs_dpo.papers.claims import Report, Statement, figure
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.worlds.bits import Bits, best_of_n, pairs, tilt, world

PLACE = "Coste et al. 2023 (2310.02743)"
WARM, PAR = "WARM (2401.12187)", "PAR (2502.18770)"
METHODS = ("single", "mean", "worst case", "uncertainty", "weights")


def reward_model(
    bits: Bits, labels: tuple[np.ndarray, np.ndarray], seed: int, settings: dict[str, Any], own_head: bool
) -> list[torch.Tensor]:
    """One member: a small network from the common start, minibatches in its own order.

    Args:
        labels: ``(winners, losers)``.
        own_head: draw the head as Coste et al.'s seeds do; else it starts at 0 in every member, as averaging weights
            needs (WARM starts all from one probe).
    """
    base = torch.Generator().manual_seed(settings["start"])
    own = torch.Generator().manual_seed(seed)
    width, length = settings["width"], bits.responses.shape[1]
    body = torch.randn(length, width, generator=base, dtype=torch.double) / np.sqrt(length)
    head = (
        torch.randn(width, generator=own, dtype=torch.double) / np.sqrt(width + 1)
        if own_head
        else body.new_zeros(width)
    )
    parameters = [body, body.new_zeros(width), head]
    for one in parameters:
        one.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, settings["learning_rate"])
    inputs = torch.tensor(bits.responses)
    winners, losers = (torch.tensor(side) for side in labels)
    for _ in range(settings["epochs"]):
        for rows in torch.randperm(len(winners), generator=own).split(settings["batch"]):
            optimizer.zero_grad()
            margin = scores(parameters, inputs[winners[rows]]) - scores(parameters, inputs[losers[rows]])
            (-torch.nn.functional.logsigmoid(margin)).mean().backward()
            optimizer.step()
    return [one.detach() for one in parameters]


def scores(parameters: Sequence[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """``(N,)`` scores of a member."""
    body, bias, head = parameters
    return torch.tanh(inputs @ body + bias) @ head


def combined(members: np.ndarray, weight: float) -> dict[str, np.ndarray]:
    """Mean, worst case and uncertainty-weighted scores (Coste et al. 2023: mu - lambda var).

    Args:
        members: ``(K, Y)`` scores of each member, centred under the reference.
        weight: lambda.
    """
    return {
        "mean": members.mean(0),
        "worst case": members.min(0),
        "uncertainty": members.mean(0) - weight * members.var(0),
    }


def simulate(seed: int, settings: dict[str, Any]) -> Report:
    """Five members that differ in head and order of data, put together in each way; best-of-n and exact RL by each."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    bits = world(rng, settings["length"])
    labels = pairs(bits, settings["pairs"], rng)
    inputs = torch.tensor(bits.responses)
    trained, common = (
        [reward_model(bits, labels, 1000 * seed + k, settings, own) for k in range(settings["members"])]
        for own in (True, False)
    )
    members = np.stack([scores(one, inputs).numpy() for one in trained])
    members = members - (members @ bits.reference)[:, None]
    proxies: dict[str, list[np.ndarray]] = {"single": list(members)}
    proxies |= {name: [one] for name, one in combined(members, settings["weight"]).items()}
    average = [torch.stack(parts).mean(0) for parts in zip(*common, strict=True)]
    proxies["weights"] = [scores(average, inputs).numpy()]
    numbers = np.unique(np.round(np.logspace(0, np.log10(settings["largest_n"]), settings["points"])).astype(int))
    figures: dict[str, float] = {}
    curves: dict[str, Any] = {}
    for name, group in proxies.items():
        gold, distance = _best_of_n(bits, group, numbers)
        figures[f"{name} end"], figures[f"{name} peak"] = float(gold[-1]), float(gold.max())
        curves[name] = {"distance": distance.tolist(), "gold": gold.tolist()}
    figures["fall"] = figures["single peak"] - figures["single end"]
    for name in METHODS[1:]:
        figures[f"{name} gain"] = figures[f"{name} end"] - figures["single end"]
    figures |= _bounded(bits, members, settings, curves)
    return {"seed": seed, "figures": figures, "curves": curves}


def _best_of_n(bits: Bits, group: list[np.ndarray], numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    gold = np.zeros((len(group), len(numbers)))
    distance = np.zeros_like(gold)
    for row, proxy in enumerate(group):
        for column, n in enumerate(numbers):
            policy = best_of_n(bits.reference, proxy, float(n))
            gold[row, column] = policy @ bits.gold
            distance[row, column] = np.sqrt(max(bits.kl(policy), 0.0))
    return gold.mean(0), distance.mean(0)


def _bounded(bits: Bits, members: np.ndarray, settings: dict[str, Any], curves: dict[str, Any]) -> dict[str, float]:
    """PAR: r = E over references y' of sigmoid(r(y) - r(y')), beside the raw reward under the same KL coefficients."""
    betas = np.logspace(*np.log10(settings["betas"]), settings["points"])
    gold: dict[str, np.ndarray] = {}
    for name in ("raw", "shaped"):
        rows = []
        for proxy in members:
            reward = proxy
            if name == "shaped":
                drawn = np.random.default_rng(0).choice(proxy, settings["references"], p=bits.reference)
                reward = (1 / (1 + np.exp(-(proxy[:, None] - drawn[None])))).mean(1)
            policies = [tilt(bits.reference, reward, beta) for beta in betas]
            rows.append([(p @ bits.gold, np.sqrt(max(bits.kl(p), 0.0))) for p in policies])
        table = np.array(rows).mean(0)
        gold[name] = table[:, 0]
        curves[f"RL, {name} reward"] = {"distance": table[:, 1].tolist(), "gold": table[:, 0].tolist()}
    return {
        "shaped gain": float(gold["shaped"][-1] - gold["raw"][-1]),
        "shaped peak": float(gold["shaped"].max() - gold["raw"].max()),
        "raw fall": float(gold["raw"].max() - gold["raw"][-1]),
    }


def draw(axes: Any, reports: Sequence[Report]) -> None:
    """Gold against the square root of KL under best-of-n, each way of putting members together, mean over seeds."""
    colours = ("#444444", "#E69F00", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9")
    for colour, name in zip(colours, reports[0]["curves"], strict=True):
        distance = np.mean([report["curves"][name]["distance"] for report in reports], axis=0)
        gold = np.mean([report["curves"][name]["gold"] for report in reports], axis=0)
        axes.plot(distance, gold, "--" if name.startswith("RL") else "-", color=colour, label=name)
    axes.set(xlabel="sqrt KL(policy, reference), nats^½", ylabel="gold reward, standard deviations")


def _gain(name: str, text: str, source: str) -> Statement:
    return Statement(
        text,
        source,
        "less over-optimisation than one model",
        "gold at the largest n, less that of the single models, standard deviations",
        figure(f"{name} gain"),
        least=0.0,
    )


PAPER = Paper(
    name="coste2023",
    title="Coste et al. 2023: Reward model ensembles help mitigate overoptimization (2310.02743); WARM; PAR",
    question="Do several reward models, averaged weights or a bounded reward keep gold from falling?",
    takes="one GPU of 80 GB; the pool of scored samples is released",
    world="4,096 bit strings with exact probabilities; five small networks that differ in head and order of data",
    simulate=simulate,
    draw=draw,
    published=(
        ("best-of-n up to", "n = 12,500", f"{PLACE} [C]"),
        ("uncertainty weight: best-of-n, PPO", "0.5, 0.1", f"{PLACE} [C]"),
        (
            "worst case and uncertainty weighting",
            "no hump in best-of-n; in PPO with a small KL penalty",
            f"{PLACE} [C]",
        ),
        ("averaged weights against one model, at RL", "79.4 % wins", f"{WARM} [P]"),
        ("bounded reward", "does not hack over 2 epochs, does not raise the peak", f"{PAR} [C]"),
    ),
    explanations={
        "The mean of five does better at the end than one": (
            "pairs of the reference hardly hold the responses that gold dislikes, so all five are wrong alike"
        ),
        "The worst case of five does better at the end than one": "as for the mean",
        "Uncertainty weighting does better at the end than one": "as for the mean",
        "Averaged weights do better at the end than one": "as for the mean",
        "... and does not raise the peak": "it raises the peak by about as much as the bar allows",
    },
    unknown=("WARM's code and models",),
    statements=(
        Statement(
            "Best-of-n by one reward model over-optimises",
            f"{PLACE} [C]",
            "a hump",
            "gold at its peak less gold at the largest n, mean of five models, standard deviations",
            figure("fall"),
            least=0.1,
        ),
        _gain("mean", "The mean of five does better at the end than one", f"{PLACE} [C]"),
        _gain("worst case", "The worst case of five does better at the end than one", f"{PLACE} [C]"),
        _gain("uncertainty", "Uncertainty weighting does better at the end than one", f"{PLACE} [C]"),
        _gain("weights", "Averaged weights do better at the end than one", f"{WARM} [P]"),
        Statement(
            "Under one and the same small KL coefficient a bounded reward loses less gold",
            f"{PAR} [C]",
            "gold stays flat where the raw reward's falls",
            "gold at the smallest coefficient, shaped less raw, standard deviations",
            figure("shaped gain"),
            least=0.0,
        ),
        Statement(
            "... and does not raise the peak",
            f"{PAR} [C]",
            "same peak",
            "peak of gold over coefficients, shaped less raw, standard deviations",
            figure("shaped peak"),
            least=-0.1,
            most=0.1,
        ),
    ),
)
