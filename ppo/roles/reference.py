"""The reference: a frozen policy of its own, or the policy with its adapters switched off."""

import contextlib

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.pretrained import check_same_vocabulary, disable_dropout
from ppo_vs_dpo.models.passes.logprobs import Batch, response_logprobs
from ppo_vs_dpo.models.sharding.deepspeed import gathered, whole, whole_copy
from ppo_vs_dpo.ppo.roles.shared import SharedRole


def is_peft(model: nn.Module) -> bool:
    """Whether a model carries PEFT adapters."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


class WithoutAdapters(nn.Module):
    """A PEFT model with its adapters switched off for the time of each call: the base, without a second copy."""

    def __init__(self, policy: PreTrainedModel):
        super().__init__()
        self.policy = policy
        self.config = policy.config

    def forward(self, **inputs):
        """The base model's forward pass."""
        shared = getattr(self.policy, "shared", None)
        with shared.active(None) if shared is not None else self.policy.disable_adapter():
            return self.policy(**inputs)


class Reference:
    """The frozen reference policy: a model of its own, or the policy with its adapters switched off.

    Args:
        model: a causal language model; ``None`` takes the policy without adapters.
        policy: the policy.

    Raises:
        UserError: the vocabularies differ; no model although the policy has no adapters; reference and policy are one.
    """

    def __init__(self, model: PreTrainedModel | None, policy: PreTrainedModel):
        if model is policy:
            raise UserError("ref_model is the policy itself: the KL would always be 0. Pass a copy, or nothing.")
        if model is None and not is_peft(policy):
            model = whole_copy(policy)
        if model is not None:
            check_same_vocabulary(policy, model)
            disable_dropout(model)
            model.requires_grad_(False)
            model.eval()
        self.model, self.policy = model, policy

    def prepare(self, accelerator: Accelerator) -> None:
        """Put it on the device, or under DeepSpeed's ZeRO-3 into an inference engine."""
        if self.model is not None:
            self.model = prepare_frozen(self.model, accelerator)

    @property
    def module(self) -> nn.Module:
        """The reference, ready for forward passes and generation."""
        if self.model is None:
            return WithoutAdapters(self.policy)
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
        for mine, theirs in zip(self.module.parameters(), policy.parameters(), strict=True):
            with whole([mine, theirs]):
                mine.lerp_(theirs.to(mine.dtype), alpha)

    def generating(self, engine: nn.Module) -> contextlib.AbstractContextManager:
        """The reference's weights whole, wherever they are: in an engine of its own or the policy's ``engine``."""
        return gathered(engine, self.policy) if self.model is None else gathered(self.model, self.model)


def prepare_frozen(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Place a frozen model: ZeRO-3 shards it, everything else holds it whole on each rank."""
    if isinstance(model, SharedRole):
        # Its base is in the policy's engine already.
        return model.to(accelerator.device)
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        from trl.models.utils import prepare_deepspeed

        return prepare_deepspeed(model, accelerator)
    return model.to(accelerator.device)
