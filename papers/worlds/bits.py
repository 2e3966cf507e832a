"""Responses that are bit strings: 2^L of them, so every policy's reward and KL are exact.

The reference draws each bit with probability 0.35. Gold wants certain bits and dislikes many ones:
gold(y) = w.y - 2 max(0, #ones - 7), standardised under the reference, with w uniform in [0.3, 1]. A proxy is a
Bradley-Terry reward model fitted to labelled pairs of the reference; one that is linear in the bits cannot express the
penalty, one that also counts the ones can.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, rel_entr

ONE, PENALTY, FREE = 0.35, 2.0, 7


@dataclass(frozen=True)
class Bits:
    """The world of one seed.

    Attributes:
        responses: ``(Y, L)`` all bit strings.
        reference: ``(Y,)`` their probabilities under the reference.
        gold: ``(Y,)`` gold rewards, mean 0 and variance 1 under the reference.
    """

    responses: np.ndarray
    reference: np.ndarray
    gold: np.ndarray

    @property
    def ones(self) -> np.ndarray:
        """``(Y,)`` how many ones each has."""
        return self.responses.sum(1).astype(int)

    def features(self, kind: str) -> np.ndarray:
        """``(Y, F)`` what a reward model sees: the bits (``small``), or the number of ones beside them (``large``)."""
        if kind == "small":
            return self.responses
        return np.hstack([self.responses, np.eye(self.responses.shape[1] + 1)[self.ones]])

    def kl(self, policy: np.ndarray) -> float:
        """KL(policy || reference), nats."""
        return float(rel_entr(policy, self.reference).sum())


def world(rng: np.random.Generator, length: int = 12) -> Bits:
    """A world: gold's weights are drawn, all else is fixed."""
    responses = ((np.arange(2**length)[:, None] >> np.arange(length)) & 1).astype(float)
    reference = np.prod(np.where(responses == 1, ONE, 1 - ONE), axis=1)
    gold = responses @ rng.uniform(0.3, 1.0, length) - PENALTY * np.maximum(0, responses.sum(1) - FREE)
    gold = gold - reference @ gold
    return Bits(responses, reference, gold / np.sqrt(reference @ gold**2))


def pairs(bits: Bits, count: int, rng: np.random.Generator, deterministic: bool = False) -> tuple[np.ndarray, ...]:
    """``(winners, losers)``: draws of the reference in pairs, labelled by Bradley-Terry or by gold's order."""
    first, second = (rng.choice(len(bits.reference), count, p=bits.reference) for _ in range(2))
    gap = bits.gold[first] - bits.gold[second]
    wins = gap > 0 if deterministic else rng.random(count) < expit(gap)
    return np.where(wins, first, second), np.where(wins, second, first)


def bradley_terry(differences: np.ndarray, ridge: float = 0.1, steps: int = 60) -> np.ndarray:
    """Weights ``(F,)`` of a linear reward model, by Newton's method on the Bradley-Terry loss with a ridge.

    Args:
        differences: ``(M, F)`` features of winners less those of losers.
    """
    weights = np.zeros(differences.shape[1])
    for _ in range(steps):
        # -log sigma(margin): gradient -sigma(-margin), curvature sigma (1 - sigma).
        miss = expit(-(differences @ weights))
        hessian = (differences * (miss * (1 - miss))[:, None]).T @ differences + ridge * np.eye(len(weights))
        step = np.linalg.solve(hessian, differences.T @ miss - ridge * weights)
        weights = weights + step
        if np.abs(step).max() < 1e-12:
            break
    return weights


def best_of_n(reference: np.ndarray, scores: np.ndarray, n: float) -> np.ndarray:
    """The exact law of best-of-n: p(y) / P(r = r_y) [F(r_y)^n - F(r_y^-)^n] (Beirami et al. 2024).

    Args:
        reference: ``(Y,)`` probabilities.
        scores: ``(Y,)`` what is selected by; ties are shared in proportion to the reference.
        n: how many draws.
    """
    order = np.argsort(scores, kind="stable")
    cumulative = np.cumsum(reference[order])
    _, first, count = np.unique(scores[order], return_index=True, return_counts=True)
    upper = np.minimum(cumulative[first + count - 1], 1.0)
    lower = np.concatenate([[0.0], upper[:-1]])
    mass = upper - lower
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(mass > 0, (upper**n - lower**n) / mass, 0.0)
    policy = np.empty_like(reference)
    policy[order] = reference[order] * np.repeat(share, count)
    return policy / policy.sum()


def tilt(reference: np.ndarray, scores: np.ndarray, beta: float) -> np.ndarray:
    """The optimum of E r - beta KL: p e^{r / beta} / Z."""
    logits = np.log(reference) + scores / beta
    policy = np.exp(logits - logits.max())
    return policy / policy.sum()
