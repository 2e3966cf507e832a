"""The update: passes over a rollout in minibatches, cut into micro-batches and shared among ranks.

All losses are averaged over the real tokens of the *minibatch*, whatever its cut into micro-batches and ranks. So
1 x 8, 2 x 4 and 8 x 1, on one rank or several, give the same update up to rounding.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ppo_vs_dpo.models.passes.logprobs import Batch
from ppo_vs_dpo.ppo.algorithm import (
    global_sum,
    kl_estimate,
    masked_mean,
    policy_loss,
    truncated_importance_weights,
    value_loss,
)
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout
from ppo_vs_dpo.ppo.updates.pretraining import PretrainingText
from ppo_vs_dpo.ppo.watching.metrics import Averages, any_rank


class NonFinite(ArithmeticError):
    """A loss or gradient norm that is not a finite number; the weights have not been touched by it."""


@dataclass
class Update:
    """What an update leaves behind.

    Attributes:
        metrics: figures for the log, over all ranks.
        first_deviation: largest |log ratio| on the first minibatch of the first pass, where it must be 0.
        first_deviation_mean: its mean over tokens, the figure to judge in low precision.
        steps: optimizer steps taken.
        stopped_early: ``early_stop_kl`` was exceeded.
    """

    metrics: dict[str, float]
    first_deviation: float
    first_deviation_mean: float
    steps: int
    stopped_early: bool


def run_update(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    args: PPOConfig,
    rollout: Rollout,
    *,
    update: int,
    kl_coef: float,
    temperature: float,
    value_only: bool = False,
    ptx: PretrainingText | None = None,
) -> Update:
    """Train policy and value model on one gathered rollout.

    Args:
        model: the prepared `ppo.roles.roles.PolicyAndValue`.
        optimizer: prepared with it.
        accelerator: of the trainer.
        args: the settings.
        rollout: of all ranks, with advantages and returns.
        update: its number, from 0.
        kl_coef: weight of the KL loss under ``kl_in="loss"``.
        temperature: of the log-probabilities.
        value_only: warm-up; the policy stays as it is.
        ptx: pretraining texts, or ``None``.

    Raises:
        NonFinite: a loss or a gradient is not finite, on any rank.
    """
    averages, deviation = Averages(), Averages()
    steps, stopped = 0, False
    # Ranks must make the same number of passes: sharded weights are gathered in each.
    budget = args.micro_batch_tokens if accelerator.num_processes == 1 else None
    for epoch in range(args.num_ppo_epochs):
        for number, rows in enumerate(rollout.minibatches(args.num_mini_batches, args.seed, update, epoch)):
            first = epoch == 0 and number == 0
            counts = {"tokens": rollout.mask[rows].sum(), "values": rollout.value_mask[rows].sum()}
            mine = rollout.select(rows[accelerator.process_index :: accelerator.num_processes])
            micro_batches = list(mine.micro_batches(args.per_device_train_batch_size, budget))
            # The draw of pretraining texts is numbered through, so that no text comes twice before all came once.
            draw = (update * args.num_ppo_epochs + epoch) * args.num_mini_batches + number
            texts = (
                ptx.batches(draw, len(rows), len(micro_batches), accelerator) if ptx else [None] * len(micro_batches)
            )
            minibatch_kl = Averages()
            finite = True
            for index, micro in enumerate(micro_batches):
                last = index == len(micro_batches) - 1
                with _accumulate(accelerator, model, last):
                    part = mine.select(micro).to(accelerator.device)
                    loss = _micro_loss(
                        model, args, part, counts, averages, kl_coef, temperature, value_only, texts[index],
                        ptx, minibatch_kl, deviation if first else None,
                    )  # fmt: skip
                    finite = finite and bool(torch.isfinite(loss))
                    # Before the last backward pass: DeepSpeed's engine steps in it.
                    if last and any_rank(not finite, accelerator.device):
                        raise NonFinite(f"the loss of update {update + 1}, pass {epoch + 1}, minibatch {number + 1}")
                    _backward(accelerator, loss)
            norm = _clip(accelerator, model, args.max_grad_norm)
            if norm is not None:
                if not torch.isfinite(norm) and accelerator.scaler is None:
                    raise NonFinite(f"the gradient of update {update + 1}, pass {epoch + 1}, minibatch {number + 1}")
                averages.add(1, **{"loss/grad_norm": norm})
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if args.early_stop_kl is not None and not value_only:
                total, weight = global_sum(torch.stack(minibatch_kl.local("kl")).to(accelerator.device))
                stopped = bool(total / weight.clamp_min(1) > args.early_stop_kl)
            if stopped:
                break
        if stopped:
            break
    seen = deviation.reduce(accelerator.device)
    metrics = averages.reduce(accelerator.device)
    metrics["policy/optimizer_steps"] = steps
    return Update(metrics, seen.get("max", 0.0), seen.get("mean", 0.0), steps, stopped)


def _micro_loss(
    model: torch.nn.Module,
    args: PPOConfig,
    part: Rollout,
    counts: dict[str, torch.Tensor],
    averages: Averages,
    kl_coef: float,
    temperature: float,
    value_only: bool,
    text: Batch | None,
    ptx: PretrainingText | None,
    minibatch_kl: Averages,
    deviation: Averages | None,
) -> torch.Tensor:
    """The part of the minibatch's loss that one micro-batch contributes; fills the statistics on the way."""
    out = model(
        part.batch(),
        temperature,
        value_mask=part.value_mask,
        with_policy=not value_only,
        with_entropy=args.entropy_coef != 0 and not value_only,
        ptx=text,
    )
    vf_loss, vf_stats = value_loss(
        out["values"], part.values, part.returns, part.value_mask, args.cliprange_value, counts["values"]
    )
    share = part.value_mask.sum()
    averages.add(share, **{"val/clipfrac_avg": vf_stats["clip_fraction"], "val/error": vf_stats["error"]})
    # Micro-batch losses are parts of a sum: weighted back to a mean over the tokens they stand for.
    averages.add(share, **{"loss/value_avg": vf_loss * counts["values"] / share.clamp_min(1)})
    loss = args.vf_coef * vf_loss
    if value_only:
        return loss
    tokens, logprobs = part.mask.sum(), out["logprobs"]
    # All 1 where the trainer's own loop sampled.
    weights = truncated_importance_weights(
        part.logprobs, part.engine_logprobs, part.mask, args.importance_sampling_cap
    )
    pg_loss, stats = policy_loss(
        logprobs, part.logprobs, part.advantages, part.mask, args.cliprange, counts["tokens"], weights
    )
    loss = loss + pg_loss
    averages.add(
        tokens,
        **{
            "loss/policy_avg": pg_loss * counts["tokens"] / tokens.clamp_min(1),
            "policy/approxkl_avg": stats["approx_kl"],
            "policy/clipfrac_avg": stats["clip_fraction"],
            "val/ratio": stats["ratio_mean"],
        },
    )
    averages.add_max(**{"val/ratio_max": stats["ratio_max"]})
    minibatch_kl.add(tokens, kl=stats["approx_kl"])
    if deviation is not None:
        distance = torch.where(part.mask, logprobs.detach() - part.logprobs, 0).abs()
        deviation.add(tokens, mean=masked_mean(distance, part.mask))
        deviation.add_max(max=distance.max())
    if args.kl_in == "loss" and kl_coef:
        kl = kl_estimate(logprobs, part.ref_logprobs, args.kl_estimator)
        kl_loss = masked_mean(kl, part.mask, counts["tokens"])
        averages.add(tokens, **{"loss/kl_avg": kl_loss * counts["tokens"] / tokens.clamp_min(1)})
        loss = loss + kl_coef * kl_loss
    if args.entropy_coef:
        loss = loss - args.entropy_coef * masked_mean(out["entropy"], part.mask, counts["tokens"])
    if text is not None:
        # InstructGPT eq. 2: + gamma E_x~pretrain log pi(x), as a mean over the minibatch's pretraining tokens.
        nll = -masked_mean(out["ptx_logprobs"], text.response_mask, ptx.tokens_in_draw)
        share = text.response_mask.sum()
        averages.add(share, **{"loss/ptx_avg": nll * ptx.tokens_in_draw / share.clamp_min(1)})
        loss = loss + args.ptx_coef * nll
    return loss


@contextlib.contextmanager
def _accumulate(accelerator: Accelerator, model: torch.nn.Module, last: bool):
    """Gradients of micro-batches add up; ranks exchange them on the last one only."""
    accelerator.gradient_state._set_sync_gradients(last)
    sharded = accelerator.distributed_type == DistributedType.DEEPSPEED
    with contextlib.nullcontext() if last or sharded else accelerator.no_sync(model):
        yield


def _backward(accelerator: Accelerator, loss: torch.Tensor) -> None:
    """Add the gradients of one micro-batch's share of the loss.

    Data-parallel wrappers average gradients over ranks, and the loss is a rank's share of a sum: times their number.
    """
    kwargs: dict[str, Any] = {}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        kwargs["scale_wrt_gas"] = False
    accelerator.backward(loss * accelerator.num_processes, **kwargs)


def _clip(accelerator: Accelerator, model: torch.nn.Module, max_norm: float | None) -> torch.Tensor | None:
    """Clip the norm of all gradients together; returns it (``None`` where the engine has not worked it out)."""
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm if max_norm else float("inf"))
    if norm is None and hasattr(model, "get_global_grad_norm"):
        norm = model.get_global_grad_norm()
    return None if norm is None else torch.as_tensor(norm).float().cpu()
