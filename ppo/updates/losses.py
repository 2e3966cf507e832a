"""The loss of a minibatch as a pure function: frozen inputs in, a loss and figures out, nothing else touched.

A minibatch goes through the models in micro-batches, on several ranks. Every mean is over the real tokens of the
*minibatch*, so the losses of its micro-batches add up to its loss, and so do the sums; the caller adds them.
Another algorithm is another function of the same shape.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ppo_vs_dpo.models.sharding.collectives import global_max, global_sum, union
from ppo_vs_dpo.ppo.algorithm import importance_weights, kl_estimate, masked_mean, policy_loss, value_loss
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch: ``B`` responses of at most ``R`` tokens, and the size of the minibatch it is a part of.

    Attributes:
        rollout: the micro-batch's rows: masks, old log-probabilities and values, advantages, returns.
        tokens: real response tokens of the whole minibatch.
        value_tokens: places where values count, of the whole minibatch.
        responses: of the whole minibatch.
        values: ``(B, R)`` of the value model now, with gradients; ``None`` without a value model.
        logprobs: ``(B, R)`` of the policy now, with gradients; ``None`` while only the values are trained.
        entropy: ``(B, R)`` of the policy now, with gradients; ``None`` where no term asks for it.
        ptx_logprobs: ``(B', R')`` of the pretraining texts that came along, with gradients; ``None`` without any.
        text_mask: ``(B', R')`` their real tokens.
        text_tokens: predicted tokens of all the minibatch's texts.
    """

    rollout: Rollout
    tokens: torch.Tensor
    value_tokens: torch.Tensor
    responses: int = 1
    values: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    ptx_logprobs: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None
    text_tokens: int = 1


@dataclass(frozen=True)
class LossSettings:
    """The coefficients; names are those of `ppo.config.PPOConfig`. ``kl_coef`` is 0 where the penalty is elsewhere."""

    cliprange: float = 0.2
    cliprange_value: float | None = 0.2
    vf_coef: float = 0.1
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    importance_sampling_cap: float | None = None
    ptx_coef: float = 0.0
    loss_average: str = "tokens"
    response_length: int = 1
    loss: str = "ppo"
    preference_labels: str = "certain"
    beta: float = 0.0
    importance_sampling: str = "token_truncate"

    @classmethod
    def of(cls, args: PPOConfig, kl_coef: float) -> "LossSettings":
        """Those of a run, with the KL coefficient of the moment (``beta``, where the loss is DPO's)."""
        mine = {name: getattr(args, name) for name in cls.__dataclass_fields__ if name not in ("kl_coef", "beta")}
        return cls(**mine, kl_coef=kl_coef if args.kl_in == "loss" else 0.0, beta=kl_coef)


@dataclass(frozen=True)
class LossOutputs:
    """What one micro-batch contributes.

    Attributes:
        loss: scalar, its share of the minibatch's loss.
        sums: figure -> ``(2,)`` float64, the sum over tokens and their number: added up, the first over the second is
            the mean.
        maxima: figure -> scalar; of several, the largest counts.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)


def ppo_loss(inputs: LossInputs, settings: LossSettings) -> LossOutputs:
    """``policy + vf_coef value + kl_coef KL - entropy_coef entropy + ptx_coef pretraining``.

    The clipped surrogate and the clipped value error of PPO (`ppo.algorithm`), the KL penalty as a loss, an entropy
    bonus, and InstructGPT's pretraining mix (eq. 2).
    """
    old, loss, sums, maxima = inputs.rollout, 0.0, {}, {}

    if inputs.values is not None:
        here = old.value_mask.sum()
        share, stats = value_loss(
            inputs.values, old.values, old.returns, old.value_mask, settings.cliprange_value, inputs.value_tokens
        )
        sums |= figures_of(here, {"val/clipfrac_avg": stats["clip_fraction"], "val/error": stats["error"]})
        sums |= figures_of(here, {"loss/value_avg": _mean_of(share, inputs.value_tokens, here)})
        loss = loss + settings.vf_coef * share

    if inputs.logprobs is not None:
        mask, here = old.mask, old.mask.sum()
        # All 1 where the trainer's own loop sampled.
        weights = importance_weights(
            old.logprobs, old.engine_logprobs, mask, settings.importance_sampling_cap, settings.importance_sampling
        )
        share_of = _token_weights(inputs, settings)
        if share_of is not None:
            weights = weights * share_of
        share, stats = policy_loss(
            inputs.logprobs, old.logprobs, old.advantages, mask, settings.cliprange, inputs.tokens, weights
        )
        means = {
            "loss/policy_avg": _mean_of(share, inputs.tokens, here),
            "policy/approxkl_avg": stats["approx_kl"],
            "policy/clipfrac_avg": stats["clip_fraction"],
            "val/ratio": stats["ratio_mean"],
        }
        maxima["val/ratio_max"] = stats["ratio_max"].double()
        loss = loss + share
        if settings.kl_coef:
            # Masked before the exponential: NaN at a masked position must not reach the gradient.
            pair = (torch.where(mask, logprobs, 0) for logprobs in (inputs.logprobs, old.ref_logprobs))
            kl = kl_estimate(*pair, settings.kl_estimator)
            share = masked_mean(kl if share_of is None else kl * share_of, mask, inputs.tokens)
            means["loss/kl_avg"] = _mean_of(share, inputs.tokens, here)
            loss = loss + settings.kl_coef * share
        if settings.entropy_coef:
            loss = loss - settings.entropy_coef * masked_mean(inputs.entropy, mask, inputs.tokens)
        sums |= figures_of(here, means)

    return with_pretraining(LossOutputs(loss, sums, maxima), inputs, settings)


def with_pretraining(out: LossOutputs, inputs: LossInputs, settings: LossSettings) -> LossOutputs:
    """``out``, and the pretraining texts' share where some came along.

    InstructGPT eq. 2: + gamma E_x~pretrain log pi(x), as a mean over the minibatch's pretraining tokens.
    """
    if inputs.ptx_logprobs is None:
        return out
    here = inputs.text_mask.sum()
    share = -masked_mean(inputs.ptx_logprobs, inputs.text_mask, inputs.text_tokens)
    figures = figures_of(here, {"loss/ptx_avg": _mean_of(share, inputs.text_tokens, here)})
    return LossOutputs(out.loss + settings.ptx_coef * share, out.sums | figures, out.maxima)


def _token_weights(inputs: LossInputs, settings: LossSettings) -> torch.Tensor | None:
    """``(B, 1)``: what turns a mean over tokens into the mean that ``loss_average`` names; ``None`` for ``tokens``.

    ``responses``: ``1/N sum_i 1/|y_i| sum_t`` (GRPO: Shao et al. 2024, eq. 3), in which a token of a long response
    counts less. ``budget``: ``1/(N L) sum_i sum_t`` with L the response budget (Dr. GRPO: Liu et al. 2025, section 3).
    """
    if settings.loss_average == "tokens":
        return None
    lengths = inputs.rollout.mask.sum(1, keepdim=True).clamp_min(1)
    if settings.loss_average == "budget":
        lengths = torch.full_like(lengths, settings.response_length)
    return inputs.tokens / (inputs.responses * lengths)


def log_ratio_from_0(inputs: LossInputs) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """|log ratio| of a micro-batch as ``sums`` and ``maxima``: how far the policy is from the one that sampled."""
    old = inputs.rollout
    distance = torch.where(old.mask, inputs.logprobs.detach() - old.logprobs, 0).abs()
    return figures_of(old.mask.sum(), {"mean": masked_mean(distance, old.mask)}), {"max": distance.max().double()}


def _mean_of(share: torch.Tensor, whole: torch.Tensor | int, here: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens ``here``, from their share of a mean over the ``whole`` minibatch."""
    return share * whole / here.clamp_min(1)


def figures_of(tokens: torch.Tensor, means: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Means over some tokens as entries of `LossOutputs.sums`."""
    weight = tokens.double()
    return {name: torch.stack([mean.detach().double() * weight, weight]) for name, mean in means.items()}


Loss = Callable[[LossInputs, LossSettings], LossOutputs]


class Totals:
    """Sums and maxima of `LossOutputs`, over micro-batches and then over ranks."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.maxima: dict[str, torch.Tensor] = {}

    def add(self, sums: dict[str, torch.Tensor], maxima: dict[str, torch.Tensor] | None = None) -> None:
        """Account for one micro-batch; nothing is read back from the device."""
        for name, pair in sums.items():
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair
        for name, value in (maxima or {}).items():
            self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value

    def over_ranks(self) -> dict[str, float]:
        """Means and maxima. A rank may lack a figure that another has (fewer texts than ranks)."""
        names, highest = union(self.sums), union(self.maxima)
        zero = torch.zeros(2, dtype=torch.float64, device=next(iter(self.sums.values())).device) if names else None
        out: dict[str, float] = {}
        if names:
            pairs = global_sum(torch.stack([self.sums.get(name, zero) for name in names])).tolist()
            out.update(
                (name, total / count if count else 0.0) for name, (total, count) in zip(names, pairs, strict=True)
            )
        if highest:
            out.update(zip(highest, global_max(torch.stack([self.maxima[n] for n in highest])).tolist(), strict=True))
        return out
