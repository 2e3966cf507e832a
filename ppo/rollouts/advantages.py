"""Step 6: advantages, with a value model (GAE) or without one (RLOO, GRPO, REINFORCE++).

Without a value model the baseline is what the other responses to the same prompt got. Responses to one prompt are a
*group*: ``k`` neighbouring rows of the whole, gathered rollout. A response's reward is then the sum of its tokens'
rewards, the KL penalty included where it is in the reward.
"""

import torch

from ppo_vs_dpo.ppo.algorithm import gae, whiten
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout

# Shao et al. 2024's code, kept by TRL: groups whose rewards are equal give 0, not a division by 0.
GRPO_EPS = 1e-4


def rloo(rewards: torch.Tensor, k: int) -> torch.Tensor:
    """REINFORCE leave-one-out: ``A_i = R_i - mean_{j != i} R_j`` (Kool et al. 2019; Ahmadian et al. 2024, eq. 9).

    The baseline does not depend on response ``i``, so the gradient is unbiased for any k >= 2. A group's advantages
    add up to 0.

    Args:
        rewards: ``(G k,)``, groups of ``k`` neighbours.
    """
    groups = rewards.view(-1, k)
    return ((groups - groups.mean(1, keepdim=True)) * (k / (k - 1))).flatten()


def grpo(rewards: torch.Tensor, k: int, divide_by_std: bool = True) -> torch.Tensor:
    """Group-relative: ``A_i = (R_i - mean) / std`` of the group (Shao et al. 2024, 2402.03300, section 4.1.2).

    Without the division it is Dr. GRPO's (Liu et al. 2025, 2503.20783, section 3.2), and ``(k - 1) / k`` of RLOO's.

    Args:
        rewards: ``(G k,)``, groups of ``k`` neighbours.
        divide_by_std: the division; it weighs prompts with little spread up.
    """
    groups = rewards.view(-1, k)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + GRPO_EPS) if divide_by_std else centred).flatten()


def reinforce_pp(rollout: Rollout, k: int, gamma: float) -> torch.Tensor:
    """REINFORCE++ before it is whitened: ``A_t = sum_{s >= t} gamma^(s - t) r_s`` (Hu et al. 2025, 2501.03262, eq. 3).

    With ``k > 1`` a group's mean reward is subtracted from it first (there: REINFORCE++-baseline).

    Args:
        rollout: with rewards; whole where ``k > 1``.

    Returns:
        ``(N, R)``, 0 at masked positions.
    """
    returns, _ = gae(rollout.rewards, torch.zeros_like(rollout.rewards), rollout.value_mask, gamma, 1.0)
    if k > 1:
        groups = rollout.rewards.sum(1).view(-1, k)
        baseline = groups.mean(1, keepdim=True).expand_as(groups).reshape(-1, 1)
        returns = torch.where(rollout.value_mask, returns - baseline, 0)
    return returns


def adaptive_lambda(mask: torch.Tensor, alpha: float) -> torch.Tensor:
    """``(N,)`` lambda by length: ``1 - 1/(alpha l)`` for a response of ``l`` tokens, not below 0 (VAPO: Yue et al.
    2025, 2504.05118, length-adaptive GAE). The weights of GAE, lambda^t, then reach as far as the response does.

    Args:
        mask: ``(N, R)``.
        alpha: 0.05 there.
    """
    return (1 - 1 / (alpha * mask.sum(1).clamp_min(1))).clamp_min(0)


def with_values(rollout: Rollout, args: PPOConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages by GAE and the values' targets, which may have a lambda of their own (VAPO: decoupled GAE).

    A target with ``value_lam=1`` is the sum of rewards, without the values' own bias.
    """
    inputs = (rollout.rewards, rollout.values, rollout.value_mask, args.gamma)
    lam = args.lam if args.lam_alpha is None else adaptive_lambda(rollout.value_mask, args.lam_alpha)
    advantages, returns = gae(*inputs, lam)
    return advantages, returns if args.value_lam is None else gae(*inputs, args.value_lam)[1]


def estimate(rollout: Rollout, args: PPOConfig) -> Rollout:
    """Fill in advantages and returns by ``args.advantage``; gives the rollout of all ranks."""
    k, unbiased = args.samples_per_prompt, args.conventions.unbiased
    if args.loss != "ppo":  # It compares scores; there is nothing to estimate.
        return rollout.gather()
    if args.advantage == "gae":
        rollout.advantages, rollout.returns = with_values(rollout, args)
        if args.whitens_advantages:
            rollout.advantages = whiten(rollout.advantages, rollout.mask, unbiased=unbiased)
        return rollout.gather()
    # Ranks take turns along the list of prompts, so a group is whole only once all have met.
    rollout = rollout.gather()
    if args.advantage == "reinforce_pp":
        rollout.advantages = reinforce_pp(rollout, k, args.gamma)
    else:
        rewards = rollout.rewards.sum(1)
        of_responses = rloo(rewards, k) if args.advantage == "rloo" else grpo(rewards, k, args.grpo_divide_by_std)
        rollout.advantages = torch.where(rollout.mask, of_responses[:, None], 0)
    if args.whitens_advantages:
        # Every rank holds all rows: summing over ranks once more cancels.
        rollout.advantages = whiten(rollout.advantages, rollout.mask, unbiased=unbiased)
    rollout.returns = rollout.advantages.clone()
    return rollout


def extend_by_one(mask: torch.Tensor) -> torch.Tensor:
    """``mask`` ``(N, R)`` with the position after each row's last True added, where there is room.

    The value mask of TRL <= 1.12 and summarize-from-feedback (``padding_mask_p1``).
    """
    shifted = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return mask | shifted
