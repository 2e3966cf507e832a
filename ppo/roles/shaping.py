"""Scores that are harder to hack: several reward models as one, and what is made of a score before it is a reward.

Pure functions on scores. ``N`` responses, ``M`` models (or parts of a reward), groups of ``k`` neighbouring rows.
"""

import torch

# As GRPO's division (`ppo.rollouts.advantages`): scores that are all equal give 0.
GDPO_EPS = 1e-4


def combined(scores: torch.Tensor, kind: str, coef: float) -> torch.Tensor:
    """One score from those of ``M`` reward models (Coste et al. 2023, 2310.02743, section 3.2).

    Args:
        scores: ``(N, M)``.
        kind: of `PPOConfig.reward_ensemble`: the ``mean``, the ``worst`` (worst-case optimisation), or under
            ``uncertainty`` the mean less ``coef`` times their variance (of the population).
        coef: lambda of ``uncertainty``.

    Returns:
        ``(N,)``.
    """
    if kind == "worst":
        return scores.amin(1)
    mean = scores.mean(1)
    return mean if kind == "mean" else mean - coef * scores.var(1, unbiased=False)


def par(scores: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Preference as reward: ``mean_m sigma(r - r_ref^m)`` (PAR: Fu et al. 2025, 2502.18770).

    The probability, by the reward model, that a response is better than one of the reference to the same prompt. It
    is bounded, and its slope falls off where a response is better for sure: what is over-optimised pays less and less.

    Args:
        scores: ``(N,)``.
        references: ``(N, m)``, scores of the reference's responses to the same prompts.
    """
    return torch.sigmoid(scores[:, None] - references).mean(1)


def normalised_apart(parts: torch.Tensor, weights: torch.Tensor, k: int) -> torch.Tensor:
    """``sum_m w_m (r_m - mean) / std``, mean and spread of each part over the group (GDPO: Liu et al. 2026,
    2601.05242; TRL's ``normalize_then_sum``).

    In a plain sum a part with a large spread drowns the others, and answers that differ in parts may have one sum.

    Args:
        parts: ``(N, M)``.
        k: responses to a prompt, at least 2.

    Returns:
        ``(N,)``. GDPO divides by the spread over the batch afterwards: ``whiten_advantages``.
    """
    groups = parts.view(-1, k, parts.shape[1])
    centred = groups - groups.mean(1, keepdim=True)
    normal = centred / (groups.std(1, keepdim=True) + GDPO_EPS)
    return (normal.flatten(0, 1) * weights).sum(1)
