"""Step 7 of the loop: passes over a rollout in minibatches, cut into micro-batches and shared among ranks.

All losses are averaged over the real tokens of the *minibatch*, whatever its cut into micro-batches and ranks. So
1 x 8, 2 x 4 and 8 x 1, on one rank or several, give the same update up to rounding.
"""

import contextlib
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from ppo_vs_dpo.models.passes.logprobs import Batch
from ppo_vs_dpo.models.sharding.collectives import any_rank, global_sum
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.rollouts.checks import non_finite
from ppo_vs_dpo.ppo.rollouts.cutting import passes, share_of
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout
from ppo_vs_dpo.ppo.updates.losses import Loss, LossInputs, LossSettings, Totals, log_ratio_from_0, ppo_loss
from ppo_vs_dpo.ppo.updates.online_dpo import chosen_and_rejected, dpo_loss
from ppo_vs_dpo.ppo.updates.pretraining import PretrainingText

LOSSES: dict[str, Loss] = {"ppo": ppo_loss, "dpo": dpo_loss, "ipo": dpo_loss}


@dataclass
class Update:
    """What an update leaves behind.

    Attributes:
        metrics: figures for the log, over all ranks.
        deviation: ``mean`` and ``max`` over tokens of |log ratio| on the first minibatch, before any step: 0 but for
            rounding. Empty where the policy was not trained.
        steps: optimizer steps taken.
        share: of the rollout's tokens that they trained on.
        value_only: the policy was not trained.
        stopped_early: ``early_stop_kl`` was exceeded.
    """

    metrics: dict[str, float]
    deviation: dict[str, float]
    steps: int
    value_only: bool
    stopped_early: bool
    share: float = 1.0


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    args: PPOConfig,
    accelerator: Accelerator,
    *,
    number: int,
    kl_coef: float,
    ptx: PretrainingText | None = None,
) -> Update:
    """Train policy and value model on one gathered rollout.

    Args:
        model: `ppo.roles.trained.PolicyAndValue`, prepared.
        rollout: of all ranks, with advantages and returns.
        number: of the update, from 0. The first ``args.value_warmup_updates`` leave the policy as it is.
        kl_coef: the coefficient of the moment; a loss term under ``kl_in="loss"``.

    Raises:
        Unusable: a loss or a gradient is not finite, on any rank; the weights have not been touched by it.
    """
    settings, value_only = LossSettings.of(args, kl_coef), number < args.value_warmup_updates
    if value_only:
        for group in optimizer.param_groups:
            if group.get("role") == "policy":
                group["lr"] = 0.0
    totals, deviation, steps, stopped = Totals(), Totals(), 0, False
    loss, whole, together = LOSSES[args.loss], rollout, 1
    if args.loss != "ppo":
        rollout, together = chosen_and_rejected(rollout, args.samples_per_prompt), 2
    for epoch, index, rows in passes(rollout, args, number, together):
        name = f"update {number + 1}, pass {epoch + 1}, minibatch {index + 1}"
        sizes = {"tokens": rollout.mask[rows].sum(), "value_tokens": rollout.value_mask[rows].sum()}
        sizes["responses"] = len(rows)
        mine, micro_batches = share_of(rollout, rows, args, accelerator, together)
        texts: list[Batch | None] = [None] * len(micro_batches)
        if ptx is not None and not value_only:
            # The draw of pretraining texts is numbered through, so that no text comes twice before all came once.
            draw = (number * args.num_ppo_epochs + epoch) * args.num_mini_batches + index
            texts = ptx.batches(draw, len(rows), len(micro_batches), accelerator)
            sizes["text_tokens"] = ptx.tokens_in_draw
        minibatch, finite = Totals(), torch.ones((), dtype=torch.bool, device=accelerator.device)
        at_once = args.coalesce_grad_reduction and _is_sharded(accelerator)
        with _one_reduction(model) if at_once else contextlib.nullcontext():
            for part, (micro, text) in enumerate(zip(micro_batches, texts, strict=True)):
                last = part == len(micro_batches) - 1
                with _accumulate(accelerator, model, last and not at_once):
                    inputs = _forward(model, mine.select(micro).to(accelerator.device), text, sizes, args, value_only)
                    out = loss(inputs, settings)
                    totals.add(out.sums, out.maxima)
                    minibatch.add(out.sums)
                    if not steps and not value_only:
                        deviation.add(*log_ratio_from_0(inputs))
                    finite &= torch.isfinite(out.loss.detach())
                    # Before the last backward pass: DeepSpeed's engine steps in it.
                    if last and any_rank(~finite, accelerator.device):
                        raise non_finite(rollout, f"the loss of {name}", args, sharded=False)
                    _backward(accelerator, out.loss)
        norm = _clip(accelerator, model, args.max_grad_norm)
        if norm is not None:
            if not torch.isfinite(norm) and accelerator.scaler is None:
                raise non_finite(rollout, f"the gradient of {name}", args, _is_sharded(accelerator))
            totals.add({"loss/grad_norm": torch.stack([norm, torch.ones_like(norm)])})
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if args.early_stop_kl is not None and not value_only:
            kl, tokens = global_sum(minibatch.sums["policy/approxkl_avg"])
            stopped = bool(kl / tokens.clamp_min(1) > args.early_stop_kl)
            if stopped:
                break
    metrics = {**totals.over_ranks(), "policy/optimizer_steps": steps}
    share = float(rollout.mask.sum() / whole.mask.sum().clamp_min(1)) if rollout is not whole else 1.0
    return Update(metrics, deviation.over_ranks(), steps, value_only, stopped, share)


def _forward(model: nn.Module, part: Rollout, text: Batch | None, sizes: dict, args: PPOConfig, value_only: bool):
    """The one pass with gradients through all that is trained; gives the `LossInputs` of the micro-batch ``part``."""
    out = model(
        part.batch(),
        args.logprob_temperature,
        value_mask=part.value_mask if args.conventions.score_after_last else None,
        with_policy=not value_only,
        with_entropy=args.entropy_coef != 0 and not value_only,
        ptx=text,
    )
    text_mask = None if text is None else text.response_mask
    return LossInputs(rollout=part, **sizes, **out, text_mask=text_mask)


def _is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


@contextlib.contextmanager
def _accumulate(accelerator: Accelerator, model: nn.Module, last: bool):
    """Gradients of micro-batches add up; ranks exchange them on the last one only."""
    accelerator.gradient_state._set_sync_gradients(last)
    with contextlib.nullcontext() if last or _is_sharded(accelerator) else accelerator.no_sync(model):
        yield


@contextlib.contextmanager
def _one_reduction(model: nn.Module):
    """Inside the block a DeepSpeed engine keeps gradients where they are; afterwards it exchanges them, and steps."""
    with model.coalesce_grad_reduction():
        yield
    model.set_gradient_accumulation_boundary(True)
    model.step()


def _backward(accelerator: Accelerator, loss: torch.Tensor) -> None:
    """Add the gradients of one micro-batch's share of the loss.

    Data-parallel wrappers average gradients over ranks, and the loss is a rank's share of a sum: times their number.
    """
    kwargs = {"scale_wrt_gas": False} if _is_sharded(accelerator) else {}
    accelerator.backward(loss * accelerator.num_processes, **kwargs)


def _clip(accelerator: Accelerator, model: nn.Module, max_norm: float | None) -> torch.Tensor | None:
    """Clip the norm of all gradients together; returns it (``None`` where the engine has not worked it out)."""
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm if max_norm else float("inf"))
    if norm is None and hasattr(model, "get_global_grad_norm"):
        norm = model.get_global_grad_norm()
    return None if norm is None else torch.as_tensor(norm, device=accelerator.device).float().double()
