"""Figures of a rollout and of an update: over real tokens only, over all ranks."""

import torch

from ppo_vs_dpo.models.sharding.collectives import global_sum
from ppo_vs_dpo.ppo.algorithm import kl_estimate, masked_mean
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout
from ppo_vs_dpo.ppo.updates.update import Update


def update_metrics(
    rollout: Rollout, done: Update, args: PPOConfig, kl_coef: float, rates: dict[str, float], other_engine: bool
) -> dict[str, float]:
    """Everything the log says about one update, but times."""
    metrics = {**rollout_metrics(rollout, kl_coef), **done.metrics}
    if other_engine:
        metrics.update(engine_metrics(rollout, args.importance_sampling_cap, args.importance_sampling))
    metrics["val/first_ratio_deviation"] = done.deviation.get("max", 0.0)
    metrics["policy/stopped_early"] = float(done.stopped_early)
    metrics["lr"], metrics["lr_value"] = rates.get("policy", 0.0), rates.get("value_model", 0.0)
    if args.samples_per_prompt > 1:
        metrics["val/groups_without_signal"] = groups_without_signal(rollout, args.samples_per_prompt)
    if not args.has_critic:
        for name in ("val/explained_variance", "val/mean", "lr_value"):
            del metrics[name]
    return metrics


def rollout_metrics(rollout: Rollout, kl_coef: float) -> dict[str, float]:
    """Figures of the whole, gathered rollout (the same on every rank).

    ``objective/kl`` is the mean over responses of the *sum* over tokens of k1, in nats: an unbiased estimate of the
    sequence KL at the sampling temperature. ``objective/kl_per_token`` divides by tokens instead of responses.
    ``objective/rlhf_reward`` is the quantity PPO maximises: final score - kl_coef x KL.
    """
    mask, tokens = rollout.mask, rollout.mask.sum().clamp_min(1)
    n = len(rollout)
    k1 = torch.where(mask, kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1"), 0)
    k3 = torch.where(mask, kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k3"), 0)
    sequence_kl = k1.sum(1)
    kl = sequence_kl.mean()
    spread = sequence_kl.std() if n > 1 else kl.new_zeros(())
    lengths = rollout.lengths().float()
    score_spread = rollout.scores.std() if n > 1 else kl.new_zeros(())
    mean_score = rollout.final_scores.mean()
    figures = {
        "objective/kl": kl,
        "objective/kl_se": spread / n**0.5,
        "objective/kl_k3": k3.sum(1).mean(),
        "objective/kl_per_token": k1.sum() / tokens,
        "objective/entropy": torch.where(mask, rollout.entropy, 0).sum(1).mean(),
        "objective/scores": rollout.scores.mean(),
        "objective/scores_std": score_spread,
        "objective/final_scores": mean_score,
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": mean_score - kl_coef * kl,
        "objective/kl_coef": kl_coef,
        "policy/entropy": masked_mean(rollout.entropy, mask),
        # Every rank holds the whole rollout: summing over ranks once more cancels in the ratio.
        "val/explained_variance": explained_variance(rollout.values, rollout.returns, rollout.value_mask),
        "val/mean": masked_mean(rollout.values, rollout.value_mask),
        "response/eos_rate": rollout.finished.float().mean(),
        "response/length": lengths.mean(),
        "response/length_max": lengths.max(),
    }
    return {name: float(value) for name, value in figures.items()}


def groups_without_signal(rollout: Rollout, k: int) -> float:
    """Share of prompts whose ``k`` responses all got the same reward: they move a group-relative policy nowhere.

    The same but for rounding: equal responses of other batches have penalties that differ in the last bits.
    """
    groups = rollout.rewards.sum(1).view(-1, k)
    highest, lowest = groups.amax(1), groups.amin(1)
    return float((highest - lowest <= 1e-5 * (1 + highest.abs())).float().mean())


def engine_metrics(rollout: Rollout, cap: float | None, kind: str = "token_truncate") -> dict[str, float]:
    """How far an engine's log-probabilities are from the trainer's, over the real tokens of a whole, gathered rollout.

    All before anything is cut or left out. Without rounding the differences are 0 and the importance ratios 1. Without
    a cap the share above it is 0; it is that of tokens or of responses, as the correction counts them.
    """
    mask = rollout.mask
    log_ratio = torch.where(mask, rollout.logprobs - rollout.engine_logprobs, 0)
    ratio = log_ratio.exp()
    of_response = log_ratio.sum(1).exp()
    above = (ratio > cap) if cap is not None else torch.zeros_like(mask)
    share = masked_mean(above.float(), mask)
    if cap is not None and kind.startswith("sequence"):
        share = (of_response > cap).float().mean()
    figures = {
        "engine/logprob_difference_mean": masked_mean(log_ratio.abs(), mask),
        "engine/logprob_difference_max": log_ratio.abs().max(),
        "engine/importance_ratio_mean": masked_mean(ratio, mask),
        "engine/importance_ratio_max": torch.where(mask, ratio, 0).max(),
        "engine/sequence_ratio_mean": of_response.mean(),
        "engine/sequence_ratio_max": of_response.max(),
        # Tokens are the engine's, so this is KL(engine || trainer) a token.
        "engine/kl": -masked_mean(log_ratio, mask),
        "engine/importance_ratio_capped": share,
    }
    return {name: float(value) for name, value in figures.items()}


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``1 - Var(returns - values) / Var(returns)`` over the real tokens of all ranks; 0 where returns do not vary."""
    mask = mask.bool()
    residual, target = (torch.where(mask, x, 0).double() for x in (returns - values, returns))
    sums = [mask.sum().double(), residual.sum(), (residual**2).sum(), target.sum(), (target**2).sum()]
    count, r1, r2, t1, t2 = global_sum(torch.stack(sums))
    count = count.clamp_min(1)
    variance = t2 / count - (t1 / count) ** 2
    unexplained = r2 / count - (r1 / count) ** 2
    return torch.where(variance > 1e-12, 1 - unexplained / variance.clamp_min(1e-12), 0).to(values.dtype)
