"""The optimal frontier where the space cannot be enumerated: an estimate from samples of the reference.

pi*(y) = p(y) e^{r(y) / beta} / Z is the reference reweighted, so samples of the reference with weights e^{r / beta}
stand for it (self-normalised importance sampling; Owen, Monte Carlo theory, methods and examples, section 9.2). That
holds as long as many samples carry the weight: with N draws a prompt, a tilt that lives on one of them says what that
one draw happened to be. The effective sample size 1 / sum w^2 says when to stop, and points beyond are left out.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

# Mean effective draws a prompt below which nothing is claimed, and the largest share of prompts that may hang on
# (nearly) one draw. On an enumerable space the estimate is then close (tests/compare/frontier/test_tilted.py says
# how close).
LEAST_ESS = 4.0
HANGS_ON_ONE, MOST_HANGING = 2.0, 0.02


@dataclass(frozen=True)
class Tilted:
    """Estimates for pi* at one beta; arrays ``(P,)``, means over prompts estimate the figures.

    Attributes:
        beta: of the KL penalty.
        reward: E_{pi*} r.
        kl: KL(pi* || p) in nats.
        optimum: J* = beta log Z.
        least_optimum: beta log (mean e^{r / beta}), without correction: its expectation is at most J* (Jensen), for
            any rewards and however few draws carry the weight.
        ess: effective draws.
    """

    beta: float
    reward: np.ndarray
    kl: np.ndarray
    optimum: np.ndarray
    least_optimum: np.ndarray
    ess: np.ndarray

    @property
    def usable(self) -> bool:
        """Whether enough draws carry the weight."""
        return bool(self.ess.mean() >= LEAST_ESS and (self.ess < HANGS_ON_ONE).mean() <= MOST_HANGING)


def tilt(rewards: np.ndarray, beta: float) -> Tilted:
    """Estimate pi* from draws of the reference, with the jackknife's correction of the bias of ratios and logarithms.

    Args:
        rewards: ``(P, N)`` rewards of ``N`` > 1 draws a prompt.
        beta: above 0.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    n = rewards.shape[1]
    scaled = rewards / beta
    whole = _figures(scaled.max(1), np.exp(scaled - scaled.max(1, keepdims=True)), rewards, beta, n)
    # Leave out one draw at a time (Quenouille 1956): N theta - (N - 1) mean theta_(-i).
    keep = ~np.eye(n, dtype=bool)
    left_out = np.zeros((3, len(rewards)))
    for row in keep:
        part = scaled[:, row]
        top = part.max(1)
        left_out += np.stack(_figures(top, np.exp(part - top[:, None]), rewards[:, row], beta, n - 1))
    reward, kl, optimum = n * np.stack(whole) - (n - 1) / n * left_out
    weights = softmax(scaled, axis=1)
    return Tilted(beta, reward, kl, optimum, whole[2], 1.0 / (weights**2).sum(1))


def _figures(top: np.ndarray, weights: np.ndarray, rewards: np.ndarray, beta: float, n: int) -> tuple:
    """Plug-in E_{pi*} r, KL and J*; ``weights`` are e^{r / beta - top}, not normalised."""
    total = weights.sum(1)
    reward = (weights * rewards).sum(1) / total
    log_z = np.log(total) + top - np.log(n)
    # papers.md 3.1.3: KL(pi* || p) = E_{pi*} r / beta - log Z.
    return reward, reward / beta - log_z, beta * log_z


def usable_betas(rewards: np.ndarray, betas: np.ndarray) -> list[Tilted]:
    """The estimates at those ``betas`` where the draws suffice, by rising KL."""
    return [one for beta in sorted(betas, reverse=True) if (one := tilt(rewards, float(beta))).usable]
