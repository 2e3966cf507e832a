"""The best that any policy can do on a space small enough to enumerate: the exact frontier, and J* - J.

On a finite set of responses with reference p and reward r, the policy that maximises J = E r - beta KL(pi || p) is
pi* = p e^{r / beta} / Z with J* = beta log Z, and J* - J(pi) = beta KL(pi || pi*) for every pi (papers.md 3.1).
"""

import numpy as np
from scipy.special import logsumexp, rel_entr


def kl_divergence(policy: np.ndarray, reference: np.ndarray) -> float:
    """KL(policy || reference) of two distributions ``(Y,)``, in nats."""
    return float(rel_entr(policy, reference).sum())


def optimal_policy(reference: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """pi* = p e^{r / beta} / Z, ``(Y,)``."""
    with np.errstate(divide="ignore"):
        logits = np.log(reference) + np.asarray(reward) / beta
    return np.exp(logits - logsumexp(logits))


def suboptimality(policy: np.ndarray, reference: np.ndarray, reward: np.ndarray, beta: float) -> float:
    """J* - J(policy), which ranks methods with no judge: 0 at the optimum, positive elsewhere."""
    with np.errstate(divide="ignore"):
        best = beta * logsumexp(np.log(reference) + np.asarray(reward) / beta)
    return float(best - (policy @ reward - beta * kl_divergence(policy, reference)))
