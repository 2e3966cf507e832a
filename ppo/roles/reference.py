"""The reference: a frozen policy of its own, or the policy with its adapters switched off."""

import contextlib

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.adapters import base_that_trains, is_peft
from ppo_vs_dpo.models.loading.prepared import disable_dropout, halve_frozen
from ppo_vs_dpo.models.loading.vocabulary import check_same_vocabulary
from ppo_vs_dpo.models.passes.answers import answers, rewriting_init, same_answers
from ppo_vs_dpo.models.passes.logprobs import Batch, response_logprobs
from ppo_vs_dpo.models.sharding.deepspeed import alike, copied, gathered, is_sharded, whole, whole_state
from ppo_vs_dpo.models.sharding.state import piece_of
from ppo_vs_dpo.ppo.roles.shared import SharedRole

logger = logging.get_logger(__name__)


class WithoutAdapters(nn.Module):
    """A PEFT model with its adapters switched off for the time of each call: the base, without a second copy."""

    # For whoever sends weights on (`models.sampling.weights`).
    adapters_off = True

    def __init__(self, policy: PreTrainedModel):
        super().__init__()
        self.policy = policy
        self.config = policy.config

    def switched_off(self) -> contextlib.AbstractContextManager:
        """The policy without its adapters inside the block."""
        shared = getattr(self.policy, "shared", None)
        return shared.active(None) if shared is not None else self.policy.disable_adapter()

    def forward(self, **inputs):
        """The base model's forward pass."""
        with self.switched_off():
            return self.policy(**inputs)


class Reference:
    """The frozen reference policy: a model of its own, or the policy with its adapters switched off.

    Args:
        model: a causal language model; ``None`` takes the policy as it was given.
        policy: the policy.
        given: `models.passes.answers.answers` of the policy before it got adapters; ``None``: it came as it is.

    Attributes:
        is_start: the reference is what the policy starts from, so their KL is 0 before the first step.

    Raises:
        UserError: the vocabularies differ; reference and policy are one; the policy's adapters make another model of
            it than was given.
    """

    def __init__(self, model: PreTrainedModel | None, policy: PreTrainedModel, given: torch.Tensor | None = None):
        if model is policy:
            raise UserError("ref_model is the policy itself: the KL would always be 0. Pass a copy, or nothing.")
        self.is_start = model is None
        if model is None and not (is_peft(policy) and base_is_given(policy, given)):
            model = copied(policy)
        if model is not None:
            check_same_vocabulary(policy, model)
            disable_dropout(model)
            model.requires_grad_(False)
            model.eval()
        self.model, self.policy = model, policy
        # One for the whole run: what is looked at once a model is looked at once.
        self.without = WithoutAdapters(policy) if model is None else None
        # The weights that `follow` moves, in fp32: this rank's pieces under ZeRO-3.
        self.slow: dict[str, torch.Tensor] = {}
        # How often it has moved.
        self.version = 0

    def prepare(self, accelerator: Accelerator, moves: bool = False) -> None:
        """Put it on the device, or under DeepSpeed's ZeRO-3 into an inference engine."""
        if self.model is not None:
            if not sharded(accelerator) and not is_peft(self.policy):
                # Loaded in another dtype than what trains it would round otherwise, and the KL would never be 0.
                self.model.to(next(self.policy.parameters()).dtype)
            self.model = prepare_frozen(self.model, accelerator, halve=not moves)

    @property
    def module(self) -> nn.Module:
        """The reference, ready for forward passes and generation."""
        if self.model is None:
            return self.without
        # A DeepSpeed engine works by hooks on the module inside it.
        return getattr(self.model, "module", self.model)

    @torch.no_grad()
    def logprobs(self, batch: Batch, temperature: float) -> torch.Tensor:
        """``(B, R)`` log-probabilities of the response tokens."""
        return response_logprobs(self.module, batch, temperature)[0]

    @torch.no_grad()
    def follow(self, policy: PreTrainedModel, alpha: float) -> None:
        """``ref <- alpha policy + (1 - alpha) ref`` (Xu et al. 2024, EMA reference)."""
        if self.model is None:
            raise UserError(
                "sync_ref_model needs a reference with weights of its own, and here it is the policy without "
                "adapters. "
                "Pass ref_model, or switch sync_ref_model off."
            )
        theirs, self.version = dict(policy.named_parameters()), self.version + 1
        for name, mine in self.module.named_parameters():
            with alike(mine, theirs[name]) as (target, source):
                if target.dtype == torch.float32:
                    target.lerp_(source.float(), alpha)
                    continue
                # In bfloat16 a thousandth of the way is less than half a step: it would stand still.
                slow = self.slow.setdefault(name, target.float())
                target.copy_(slow.lerp_(source.float(), alpha))

    @torch.no_grad()
    def state(self, keep: bool) -> dict[str, torch.Tensor]:
        """Its weights on the host, whole and as exact as they are kept; all ranks must call this."""
        found = whole_state(self.module, keep)
        for name, parameter in self.module.named_parameters():
            slow = self.slow.get(name)
            if slow is not None and slow.shape != getattr(parameter, "ds_shape", parameter.shape):
                pieces = [torch.empty_like(slow) for _ in range(dist.get_world_size())]
                dist.all_gather(pieces, slow)
                slow = torch.cat(pieces)[: parameter.ds_numel].view(parameter.ds_shape)
            if keep and slow is not None:
                found[name] = slow.cpu().clone()
        return found

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state` gave; all ranks must call this."""
        self.version += 1
        for name, parameter in self.module.named_parameters():
            with whole([parameter]):
                parameter.copy_(state[name].view(parameter.shape))
            if parameter.dtype == torch.float32:
                continue
            value = state[name].float()
            if is_sharded(parameter) and not getattr(parameter, "ds_persist", False):
                value = piece_of(parameter, value)
            self.slow[name] = value.to(parameter.device).clone()

    def generating(self, engine: nn.Module) -> contextlib.AbstractContextManager:
        """The reference's weights whole, wherever they are: in an engine of its own or the policy's ``engine``."""
        return gathered(engine, self.policy) if self.model is None else gathered(self.model, self.model)


def base_is_given(policy: PreTrainedModel, given: torch.Tensor | None) -> bool:
    """Whether a PEFT policy without its adapters is the model that was given, and stays it; else a copy with them is.

    Raises:
        UserError: neither is.
    """
    with_adapters, without = answers(policy), answers(WithoutAdapters(policy))
    init, moving = rewriting_init(policy), base_that_trains(policy)
    if without is None:
        if given is None or init is None:
            return not moving
        raise UserError(
            f"peft_config.init_lora_weights={init} rewrites the policy's base, which is in pieces here (ZeRO-3): the "
            f"reference would be lost. Use init_lora_weights=true, or pass ref_model."
        )
    dtype = next(policy.parameters()).dtype
    given = with_adapters if given is None else given
    if same_answers(without, given, dtype) and not moving:
        return True
    if not moving and not same_answers(with_adapters, given, dtype):
        cause = f" (init_lora_weights={init})" if init else ""
        raise UserError(
            f"the policy with its new adapters is not the model that was given{cause}: its log-probabilities are off "
            f"by up to {(with_adapters - given).abs().max():.2g}. Use adapters that change nothing at first "
            f"(init_lora_weights=true), or pass the reference as ref_model."
        )
    why = f"init_lora_weights={init}" if init else "its adapters are trained"
    if moving:
        why = f"{moving[0]} and {len(moving) - 1} more of its own weights train, which no switch takes back"
    logger.warning(
        "the policy without its adapters is not the model that was given, or will not be (%s): the reference is a "
        "copy of the policy as it is now, adapters included, with weights of its own.",
        why,
    )
    return False


def sharded(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed holds the models."""
    return getattr(accelerator.state, "deepspeed_plugin", None) is not None


def prepare_frozen(model: nn.Module, accelerator: Accelerator, halve: bool = True) -> nn.Module:
    """Place a frozen model: ZeRO-3 shards it, everything else holds it whole on each rank.

    ``halve``: under autocast, linear layers are held in the dtype that they compute in.
    """
    if isinstance(model, SharedRole):
        # Its base is in the policy's engine already.
        return model.to(accelerator.device)
    if sharded(accelerator):
        from trl.models.utils import prepare_deepspeed

        return prepare_deepspeed(model, accelerator)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if halve and half is not None and accelerator.native_amp:
        halve_frozen(model, half)
    return model.to(accelerator.device)
