"""Figures of a rollout and of an update: over real tokens only, over all ranks."""

from collections import defaultdict

import torch
import torch.distributed as dist

from ppo_vs_dpo.ppo.algorithm import explained_variance, global_sum, kl_estimate, masked_mean
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout


class Averages:
    """Weighted means and maxima, collected over micro-batches and brought together over ranks.

    Means are weighted by real tokens, so that the figures do not depend on how a minibatch was cut.
    """

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self.weights: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self.maxima: dict[str, torch.Tensor] = {}

    def add(self, weight: float | torch.Tensor, **means: torch.Tensor) -> None:
        """Account for means over ``weight`` tokens."""
        for name, value in means.items():
            weight_ = torch.as_tensor(weight, dtype=torch.float64)
            # No 0 x NaN where a micro-batch has no tokens of this kind.
            if weight_ > 0:
                self.sums[name] = self.sums[name] + value.detach().double().cpu() * weight_.cpu()
                self.weights[name] = self.weights[name] + weight_.cpu()

    def add_max(self, **values: torch.Tensor) -> None:
        """Account for maxima."""
        for name, value in values.items():
            value = value.detach().double().cpu()
            self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value

    def local(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum and weight of one mean on this rank."""
        return self.sums[name], self.weights[name]

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Means and maxima over all ranks. Every rank must have collected the same names."""
        out = {}
        if self.sums:
            names = sorted(self.sums)
            stacked = torch.stack([torch.stack([self.sums[n], self.weights[n]]) for n in names]).to(device)
            for name, (total, weight) in zip(names, global_sum(stacked).tolist(), strict=True):
                out[name] = total / weight if weight else 0.0
        if self.maxima:
            names = sorted(self.maxima)
            highest = torch.stack([self.maxima[n] for n in names]).to(device)
            out.update(zip(names, global_max(highest).tolist(), strict=True))
        return out


def global_max(x: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum over ranks when torch.distributed is up."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on some rank: all then act alike, and none waits for another."""
    return bool(global_max(torch.tensor([float(flag)], device=device)).item())


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


def engine_metrics(rollout: Rollout, cap: float | None) -> dict[str, float]:
    """How far an engine's log-probabilities are from the trainer's, over the real tokens of a whole, gathered rollout.

    Without rounding the differences are 0 and the importance ratios 1. Without a cap the share above it is 0.
    """
    mask = rollout.mask
    log_ratio = torch.where(mask, rollout.logprobs - rollout.engine_logprobs, 0)
    ratio = log_ratio.exp()
    above = ratio > cap if cap is not None else torch.zeros_like(mask)
    figures = {
        "engine/logprob_difference_mean": masked_mean(log_ratio.abs(), mask),
        "engine/logprob_difference_max": log_ratio.abs().max(),
        "engine/importance_ratio_mean": masked_mean(ratio, mask),
        "engine/importance_ratio_max": torch.where(mask, ratio, 0).max(),
        "engine/importance_ratio_capped": masked_mean(above.float(), mask),
    }
    return {name: float(value) for name, value in figures.items()}
