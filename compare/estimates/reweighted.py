"""Win rates of policies near the reference, from the reference's own draws: each draw weighs what the policy makes of
it.

    W(a, b) - 1/2 = E rho(y) tau(y') [h(y, y') - 1/2],   rho = a / ref, tau = b / ref,   y, y' independent draws of the
    reference.

With D draws a prompt all ordered pairs of different draws are used: unbiased at any KL, and at KL below about 0.3 nats
far less noisy than fresh draws, because a draw that both policies like alike cannot decide anything.
"""

import numpy as np

from ppo_vs_dpo.compare.sampling.completions import Draws
from ppo_vs_dpo.compare.sampling.contenders import Contender
from ppo_vs_dpo.compare.sampling.policies import REFERENCE

# Nats to the reference, of both policies. Above, few draws carry the weight.
LOW_KL = 0.3


def log_ratios(contender: Contender, own: list[Draws]) -> np.ndarray | None:
    """``(P, D)`` log pi / ref of the reference's draws, or ``None`` where they are not known or the policy
    is too far.
    """
    if contender.n is not None:
        return None
    shapes = [one.shape for one in own]
    if contender.name == REFERENCE:
        return np.concatenate([np.zeros(shape) for shape in shapes], axis=1)
    kl = contender.kl()
    if kl is None or kl.mean() >= LOW_KL or not all(contender.name in one.under for one in own):
        return None
    reference = [one.under.get(REFERENCE, one.measures["logprob"]) for one in own]
    ratios = [one.under[contender.name] - ref for one, ref in zip(own, reference, strict=True)]
    joined = np.concatenate(ratios, axis=1)
    return joined if np.isfinite(joined).all() else None


def reweighted(ours: Contender, theirs: Contender, own: list[Draws], judge: str) -> np.ndarray | None:
    """``(P,)`` values whose mean is the win rate of one policy over the other; ``None`` where it cannot be had so.

    ``own`` are all draws of the reference at the temperature of the comparison, scored by ``judge``.
    """
    if not own or not all(judge in one.scores for one in own):
        return None
    rho, tau = log_ratios(ours, own), log_ratios(theirs, own)
    if rho is None or tau is None or rho.shape[1] < 2:
        return None
    scores = np.concatenate([one.scores[judge] for one in own], axis=1)
    return reweighted_values(scores, rho, tau)


def reweighted_values(scores: np.ndarray, log_rho: np.ndarray, log_tau: np.ndarray) -> np.ndarray:
    """``(P,)``: 1/2 + mean over i != j of rho_i tau_j [1(s_i > s_j) - 1(s_i < s_j)] / 2.

    Args:
        scores: ``(P, D)`` of the reference's draws.
        log_rho: ``(P, D)`` log-ratio of the first policy to the reference.
        log_tau: ``(P, D)`` of the second one.
    """
    size = scores.shape[1]
    above = np.sign(scores[:, :, None] - scores[:, None, :])
    return 0.5 + np.einsum("pi,pij,pj->p", np.exp(log_rho), above, np.exp(log_tau)) / (2 * size * (size - 1))
