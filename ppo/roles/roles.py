"""The four models of PPO: policy and value in one trained module, reference and reward frozen beside it."""

import contextlib
import copy
import dataclasses

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.pretrained import (
    check_same_vocabulary,
    disable_dropout,
    load_policy,
    load_value_or_reward,
    score_head,
)
from ppo_vs_dpo.models.passes.logprobs import Batch, response_logprobs, response_values
from ppo_vs_dpo.models.sharding.deepspeed import (
    gathered,
    held_bytes,
    unsharded_loading,
    whole,
    whole_copy,
    whole_state,
)
from ppo_vs_dpo.ppo.roles.shared import POLICY, REWARD, VALUE, SharedRole


class PolicyAndValue(nn.Module):
    """Policy and value model in one module: one optimizer with two groups, one DDP wrapper or DeepSpeed engine.

    Everything that needs gradients goes through one `forward` a backward pass, as data-parallel wrappers require.
    """

    def __init__(self, policy: PreTrainedModel, value_model: PreTrainedModel):
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        # What integrations (DeepSpeed's auto values, trackers, the Hub) read.
        self.config = policy.config

    def forward(
        self,
        batch: Batch,
        temperature: float,
        value_mask: torch.Tensor | None = None,
        with_policy: bool = True,
        with_entropy: bool = False,
        ptx: Batch | None = None,
    ) -> dict[str, torch.Tensor]:
        """Log-probabilities, entropies and values of the response tokens.

        Args:
            batch: ``B`` prompts and responses.
            temperature: of the log-probabilities.
            value_mask: ``(B, R)``, where values count; the response mask by default.
            with_policy: False computes values only (warm-up of the value model).
            with_entropy: also the entropies, with gradients.
            ptx: pretraining texts, as a batch whose "response" is the text after its first token.

        Returns:
            ``values`` ``(B, R)`` and, as asked for, ``logprobs`` and ``entropy`` ``(B, R)``, ``ptx_logprobs``.
        """
        value_batch = batch
        if value_mask is not None and not torch.equal(value_mask, batch.response_mask):
            # A parity convention: one value more, of the state after the last token. It attends to what is before it.
            prompt_mask = batch.attention_mask[:, : batch.prompt_length]
            attention_mask = torch.cat([prompt_mask, value_mask.to(prompt_mask.dtype)], dim=1)
            value_batch = dataclasses.replace(batch, response_mask=value_mask, attention_mask=attention_mask)
        out = {"values": response_values(self.value_model, value_batch)}
        if with_policy:
            out["logprobs"], entropy = response_logprobs(self.policy, batch, temperature, with_entropy)
            if entropy is not None:
                out["entropy"] = entropy
        if ptx is not None:
            out["ptx_logprobs"] = response_logprobs(self.policy, ptx)[0]
        return out

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed; generation switches that off for its time."""
        name = "activation" if hasattr(type(self.policy), "is_activation_checkpointing") else "gradient"
        return bool(getattr(self.policy, f"is_{name}_checkpointing", False))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Trade compute for memory in both models."""
        if isinstance(self.value_model, SharedRole):
            gradient_checkpointing_kwargs = {
                **(gradient_checkpointing_kwargs or {}),
                "use_reentrant": False,
                "context_fn": self.value_model.shared.checkpoint_contexts,
            }
        for model in (self.policy, self.value_model):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        for model in (self.policy, self.value_model):
            model.gradient_checkpointing_disable()


def as_policy(model: PreTrainedModel | str, config: ModelConfig | None = None) -> PreTrainedModel:
    """A policy given as an object or a name, with dropout off (N+ detail 7)."""
    if isinstance(model, str):
        model = load_policy(model, config, trainable=True)
    disable_dropout(model)
    return model


def as_value_or_reward(model: PreTrainedModel | str, trainable: bool, config: ModelConfig | None = None):
    """A value or reward model given as an object or a name, with dropout off."""
    if isinstance(model, str):
        model = load_value_or_reward(model, config, trainable=trainable)
    disable_dropout(model)
    return model


def value_model_from(reward_model: PreTrainedModel | None, policy: PreTrainedModel) -> PreTrainedModel:
    """What the value model starts from: a copy of the reward model (N+ detail 22), or the policy with a head of zeros.

    With a head of zeros all values are 0 at first: advantages start as what the rewards themselves say.

    Args:
        reward_model: one that reads the policy's tokens, or ``None``.
        policy: its backbone serves where there is no such reward model.
    """
    if reward_model is not None:
        return whole_copy(reward_model).requires_grad_(True)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    with unsharded_loading():
        value_model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    inner = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    theirs = whole_state(getattr(inner, inner.base_model_prefix), keep=True)
    # A PEFT policy names its wrapped layers otherwise; the plain weights are under the same names less the wrapper's
    # part.
    theirs = {k.replace(".base_layer", ""): v for k, v in theirs.items() if ".lora_" not in k}
    getattr(value_model, value_model.base_model_prefix).load_state_dict(theirs)
    torch.nn.init.zeros_(score_head(value_model).weight)
    return value_model


def add_adapters(policy: PreTrainedModel, value_model: PreTrainedModel, peft_config) -> tuple:
    """Wrap policy and value model with PEFT adapters; the value head trains in full.

    Raises:
        UserError: the policy has adapters already.
    """
    from peft import PeftModel, TaskType, get_peft_model

    if isinstance(policy, PeftModel):
        raise UserError(
            "peft_config was given and the policy has adapters already. Merge them first (merge_and_unload), or drop "
            "peft_config to train the adapters it has."
        )
    value_config = copy.deepcopy(peft_config)
    value_config.task_type = TaskType.SEQ_CLS
    # The adapter library adds the head to the modules that train in full, for this task type.
    return get_peft_model(policy, peft_config), get_peft_model(value_model, value_config)


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


def held_by_role(
    policy: nn.Module, value_model: nn.Module, reference: nn.Module | None, reward: nn.Module | None
) -> dict[str, int]:
    """Bytes of weights that this rank holds of each role; on a shared base of the base and of each role's own part.

    ``reference`` and ``reward`` are ``None`` where there is no such model, or where it is another's weights.
    """
    roles = {"policy": policy, "value": value_model, "reference": reference, "reward": reward}
    if not isinstance(value_model, SharedRole):
        return {role: held_bytes(model) for role, model in roles.items() if model is not None}
    parts: dict[str, list] = {"base": [], "policy": [], "value": [], "reward": []}
    for name, parameter in policy.named_parameters():
        adapter = next((a for a in (POLICY, VALUE, REWARD) if "lora_" in name and f".{a}." in name), None)
        parts[{POLICY: "policy", None: "base"}.get(adapter, adapter)].append(parameter)
    for role in ("value", "reward"):
        parts[role].extend(roles[role].parameters() if roles[role] is not None else ())
    return {role: held_bytes(parameters) for role, parameters in parts.items() if parameters}


def prepare_frozen(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Place a frozen model: ZeRO-3 shards it, everything else holds it whole on each rank."""
    if isinstance(model, SharedRole):
        # Its base is in the policy's engine already.
        return model.to(accelerator.device)
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        from trl.models.utils import prepare_deepspeed

        return prepare_deepspeed(model, accelerator)
    return model.to(accelerator.device)


def optimizer_groups(
    model: PolicyAndValue, decay: set[str], weight_decay: float, policy_lr: float, value_lr: float
) -> list[dict]:
    """Parameter groups: policy and value, each with and without weight decay, each role with its learning rate.

    Args:
        model: the trained module.
        decay: names of parameters that decay (the Trainer's own rule: no biases, no norms).
        weight_decay: for those.
        policy_lr: learning rate of the policy.
        value_lr: learning rate of the value model.
    """
    groups = []
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def role_of(name: str) -> str:
        # On a shared base the value model's adapter is among the policy's modules.
        return "value_model" if name.startswith("value_model.") or f".{VALUE}." in name else "policy"

    for role, lr in (("policy", policy_lr), ("value_model", value_lr)):
        named = [(n, p) for n, p in trained if role_of(n) == role]
        for decays in (True, False):
            params = [p for n, p in named if (n in decay) == decays]
            if params:
                groups.append(
                    {"params": params, "lr": lr, "weight_decay": weight_decay if decays else 0.0, "role": role}
                )
    return groups
