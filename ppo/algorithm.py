"""Proximal policy optimisation for language models, as pure functions on tensors.

Shapes: ``B`` responses of at most ``T`` tokens. ``mask`` ``(B, T)`` says which tokens are real; gaps inside a row,
empty rows and rows of length 1 are fine, and what stands at masked positions (even NaN) changes nothing. All
logarithms are natural.

Sources: Schulman et al. 2016 (GAE, arXiv 1506.02438), Schulman et al. 2017 (PPO, 1707.06347), Ziegler et al. 2019
(1909.08593), Schulman 2020 ("Approximating KL divergence"), Huang et al. 2024 (N+ details, 2403.17031).
"""

import torch

from ppo_vs_dpo.models.sharding.collectives import global_sum

KL_ESTIMATORS = ("k1", "k2", "k3")


# ------------------------------------------------------------------------------------------------ over the mask


def masked_mean(x: torch.Tensor, mask: torch.Tensor, count: float | torch.Tensor | None = None) -> torch.Tensor:
    """Mean of ``x`` ``(B, T)`` over the real tokens; 0 where there are none.

    Args:
        count: divide by this instead of the number of real tokens here. With the count of the whole minibatch, the
            losses of micro-batches (and of ranks) add up to the loss of the minibatch.
    """
    mask = mask.bool()
    total = torch.where(mask, x, 0).sum()
    count = mask.sum() if count is None else count
    return total / torch.as_tensor(count, device=x.device).clamp_min(1)


def whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True, unbiased: bool = False) -> torch.Tensor:
    """Scale ``x`` to variance 1 and, with ``shift_mean``, to mean 0, over the real tokens of all ranks.

    ``x' = (x - mean) / sqrt(var + 1e-8)``, plus ``mean`` without ``shift_mean``. Statistics are summed in float64, so
    that one rank with 8 rows and two with 4 agree.

    Args:
        x: ``(B, T)``.
        mask: ``(B, T)``.
        shift_mean: False keeps the mean (reward whitening; Huang et al. 2024, detail 24).
        unbiased: Bessel's correction, as TRL has it. The population variance is what Ziegler et al. 2019 used
            (lm-human-preferences, ``whiten``).

    Returns:
        ``(B, T)``, 0 at masked positions.
    """
    mask = mask.bool()
    real = torch.where(mask, x, 0).double()
    count, total = global_sum(torch.stack([mask.sum().double(), real.sum()]))
    mean = total / count.clamp_min(1)
    squares = global_sum(torch.where(mask, (real - mean) ** 2, 0).sum())
    variance = squares / (count - 1 if unbiased else count).clamp_min(1)
    whitened = (real - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0).to(x.dtype)


# ------------------------------------------------------------------------------------------------ rewards


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled.

    With ``l = log pi(y)/pi_ref(y)`` (Schulman 2020):

    * ``k1 = l``: unbiased; a single value may be negative.
    * ``k2 = l^2 / 2``: biased, always >= 0; its gradient as a loss is that of KL(pi || ref).
    * ``k3 = exp(-l) - 1 + l``: unbiased, always >= 0; its gradient as a loss is that of KL(ref || pi).

    Nothing is clamped: a clamp would bias the penalty and the reported KL.

    Args:
        logprobs: any shape, of the sampled tokens under the policy.
        ref_logprobs: the same shape, under the reference.

    Raises:
        ValueError: another estimator.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl_estimator is {estimator!r}; it must be one of {', '.join(KL_ESTIMATORS)}.")


def token_rewards(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    kl_coef: float,
    kl_estimator: str = "k1",
    score_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rewards of the tokens: the KL penalty on each, the score on the last real one.

    ``r_t = -kl_coef * kl_t + [t last real token] * score`` (Ziegler et al. 2019, eq. 2; Huang et al. 2024, detail 12).
    With ``k1`` a row's rewards sum to ``score - kl_coef * log pi(y)/pi_ref(y)``.

    Args:
        scores: ``(B,)`` score of each whole response.
        logprobs: ``(B, T)`` under the sampling policy.
        ref_logprobs: ``(B, T)`` under the reference.
        mask: ``(B, T)``. A row without real tokens gets no reward.
        kl_coef: beta, >= 0.
        score_mask: ``(B, T)``; the score lands on the last True of this mask instead. TRL <= 1.12 and
            summarize-from-feedback put it one position after the last token.

    Returns:
        ``(B, T)``, 0 at masked positions (but for the score under ``score_mask``).
    """
    mask = mask.bool()
    score_mask = mask if score_mask is None else score_mask.bool()
    penalty = torch.where(mask, kl_estimate(logprobs, ref_logprobs, kl_estimator), 0)
    rewards = -kl_coef * penalty
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(score_mask, columns, -1).amax(dim=1)
    rows = (last >= 0).nonzero().squeeze(-1)
    rewards[rows, last[rows]] += scores[rows].to(rewards.dtype)
    return rewards


# ------------------------------------------------------------------------------------------------ advantages


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) along the real tokens of each row.

    ``A_t = sum_l (gamma lam)^l delta_{t+l}`` with ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``V`` = 0 after the
    last real token. "Next" means the next *real* token: a gap in the mask is stepped over.

    Args:
        rewards: ``(B, T)``.
        values: ``(B, T)``, V of the state before each token.
        mask: ``(B, T)``.
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1]; or ``(B,)``, one a row.

    Returns:
        ``(advantages, returns)``, each ``(B, T)``; ``returns = advantages + values``. 0 at masked positions.
    """
    mask = mask.bool()
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    next_value = torch.zeros_like(values[:, 0]) if values.shape[1] else values.new_zeros(values.shape[0])
    running = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        real = mask[:, t]
        running = torch.where(real, delta + gamma * lam * running, running)
        next_value = torch.where(real, values[:, t], next_value)
        columns.append(torch.where(real, running, 0))
    advantages = torch.stack(columns[::-1], dim=1) if columns else torch.zeros_like(values)
    return advantages, torch.where(mask, advantages + values, 0)


# ------------------------------------------------------------------------------------------------ losses


def importance_weights(
    old_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, mask: torch.Tensor, cap: float | None, kind: str
) -> torch.Tensor:
    """Per-token weights that correct for an engine that samples with other probabilities than the trainer computes.

    ``min(pi_trainer(y) / pi_engine(y), C)`` (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training", truncated importance sampling), of tokens or of whole responses (a product over tokens);
    ``mask`` drops what is above C instead (Liu et al. 2025, "When Speed Kills Stability": masked). Both let bias in.

    Args:
        old_logprobs: ``(B, T)``, of the policy before the update, as the trainer computes them.
        engine_logprobs: ``(B, T)``, of the same tokens, as the engine sampled them.
        mask: ``(B, T)``.
        cap: C, >= 1; ``None`` corrects nothing.
        kind: one of those of `PPOConfig.importance_sampling`; TRL's names.

    Returns:
        ``(B, T)``, without gradients; exactly 1 where the two agree, at masked positions, and without a cap.
    """
    if cap is None:
        return torch.ones_like(old_logprobs)
    log_weights = torch.where(mask.bool(), (old_logprobs - engine_logprobs).detach(), 0)
    if kind.startswith("sequence"):
        log_weights = log_weights.sum(1, keepdim=True).expand_as(log_weights)
    weights = log_weights.exp()
    return weights.clamp_max(cap) if kind.endswith("truncate") else torch.where(weights > cap, 0, weights)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    count: float | torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate (Schulman et al. 2017, eq. 7) as a loss, averaged over real tokens.

    ``-mean w min(rho A, clip(rho, 1 - eps, 1 + eps) A)``, ``rho = exp(logprobs - old_logprobs)``.

    Args:
        logprobs: ``(B, T)``, with gradients.
        old_logprobs: ``(B, T)``, of the policy that sampled.
        advantages: ``(B, T)``.
        mask: ``(B, T)``.
        clip_range: eps.
        count: number of real tokens to average over; see `masked_mean`.
        weights: ``(B, T)``, w: see `importance_weights`; 1 by default.

    Returns:
        The loss, and detached statistics over the real tokens given: ``ratio_mean``, ``ratio_max``, ``approx_kl``
        (``mean (logprobs - old_logprobs)^2 / 2``, k2 of the two policies), ``clip_fraction`` (share of tokens where
        the clipped term is the one that counts, so that the gradient is 0).
    """
    mask = mask.bool()
    # Masked before the exponential: inf or NaN at a masked position must not reach the gradient.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    advantages = torch.where(mask, advantages, 0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    surrogate = torch.maximum(unclipped, clipped)
    if weights is not None:
        # Yao et al. 2025: the weight multiplies the token's clipped term, and the mean is still over all tokens.
        surrogate = surrogate * torch.where(mask, weights, 1)
    loss = masked_mean(surrogate, mask, count)
    with torch.no_grad():
        stats = {
            "ratio_mean": masked_mean(ratio, mask),
            "ratio_max": torch.where(mask, ratio, 0).max() if mask.numel() else ratio.new_zeros(()),
            "approx_kl": masked_mean(0.5 * log_ratio**2, mask),
            "clip_fraction": masked_mean((clipped > unclipped).to(ratio.dtype), mask),
        }
    return loss, stats


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float | None,
    count: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Squared error of the values, clipped around the old ones, averaged over real tokens.

    ``0.5 mean max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)`` (Schulman et al. 2016b's code, kept by
    Ziegler et al. 2019 and Huang et al. 2024).

    Args:
        values: ``(B, T)``, with gradients.
        old_values: ``(B, T)``, those the advantages were computed with.
        returns: ``(B, T)``.
        mask: ``(B, T)``.
        clip_range: eps, in units of the reward; ``None`` does not clip.
        count: number of real tokens to average over; see `masked_mean`.

    Returns:
        The loss, and detached statistics: ``clip_fraction``, ``mean``, ``error`` (mean squared error, unclipped).
    """
    mask = mask.bool()
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    error = (values - returns) ** 2
    if clip_range is None:
        worst = clipped_error = error
    else:
        clipped = torch.minimum(torch.maximum(values, old_values - clip_range), old_values + clip_range)
        clipped_error = (clipped - returns) ** 2
        worst = torch.maximum(error, clipped_error)
    loss = 0.5 * masked_mean(worst, mask, count)
    with torch.no_grad():
        stats = {
            "clip_fraction": masked_mean((clipped_error > error).to(values.dtype), mask),
            "mean": masked_mean(values, mask),
            "error": masked_mean(error, mask),
        }
    return loss, stats
