"""One base, four roles: policy, value and reward are adapters (and heads) on one frozen model; the reference is the
base with adapters off. One copy of the weights in memory instead of four.

PEFT's own switch (``set_adapter``) also switches ``requires_grad``, and a gradient that was on its way would be lost.
Here a role's forward pass selects its adapter in the layers and puts the choice back.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.config import LoraSettings
from ppo_vs_dpo.models.loading.pretrained import is_adapter
from ppo_vs_dpo.models.sharding.deepspeed import unsharded_loading, whole

# PEFT saves an adapter of this name as a plain adapter folder.
POLICY, VALUE, REWARD = "default", "value", "reward"


class SharedBase:
    """The adapters' layers of one model, and which adapter is on."""

    def __init__(self, model: nn.Module):
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.model = model
        self.layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self.adapter: str | None = POLICY

    def _select(self, adapter: str | None) -> None:
        self.adapter = adapter
        for layer in self.layers:
            layer._disable_adapters = adapter is None
            layer._active_adapter = [adapter or POLICY]

    @contextlib.contextmanager
    def active(self, adapter: str | None) -> Iterator[None]:
        """One adapter on inside the block; ``None`` for the bare base."""
        before = self.adapter
        self._select(adapter)
        try:
            yield
        finally:
            self._select(before)

    def checkpoint_contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """For ``torch.utils.checkpoint``: activations are computed again under the adapter they were computed with."""
        return contextlib.nullcontext(), self.active(self.adapter)


class Switched(nn.Module):
    """The base's transformer under one adapter. The base's parameters are not this module's."""

    def __init__(self, shared: SharedBase, adapter: str):
        super().__init__()
        self.shared, self.adapter = shared, adapter

    def forward(self, **inputs):
        """The transformer's forward pass."""
        with self.shared.active(self.adapter):
            return self._inner(**inputs)

    @property
    def _inner(self) -> nn.Module:
        base = self.shared.model.get_base_model()
        return getattr(base, base.base_model_prefix)

    @property
    def layers(self) -> nn.ModuleList:
        """The base's, which `models.passes.fused` looks at."""
        return self._inner.layers


class SharedRole(nn.Module):
    """A value or reward model on the shared base: an adapter and a scalar head."""

    base_model_prefix = "transformer"
    is_gradient_checkpointing = False

    def __init__(self, shared: SharedBase, adapter: str, head: nn.Linear):
        super().__init__()
        self.transformer, self.score = Switched(shared, adapter), head
        self.shared, self.adapter, self.config = shared, adapter, shared.model.config

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Nothing: the policy's layers are this model's, too."""

    def gradient_checkpointing_disable(self) -> None:
        """Nothing, as above."""


def reward_adapter(stage: Path, base: Path) -> Path:
    """The folder of the adapter that the reward-model stage trained.

    Raises:
        UserError: it trained a whole model, or its adapter belongs to another base.
    """
    from peft import PeftConfig

    for folder in (stage / "adapter", stage / "model"):
        if is_adapter(folder):
            there = PeftConfig.from_pretrained(folder).base_model_name_or_path
            if Path(there).resolve() != base.resolve():
                raise UserError(
                    f"ppo.shared_base: the reward model's adapter belongs to {there}, and the policy starts from "
                    f"{base}. Train the reward model in this run (reward_model.lora)."
                )
            return folder
    raise UserError(
        f"ppo.shared_base puts all roles on one base, and {stage} holds a whole reward model. Train it as an adapter "
        f"(reward_model.lora={{r: 16, alpha: 32}}), or set ppo.shared_base=false."
    )


def share_base(
    base: PreTrainedModel, lora: LoraSettings, reward: Path | None, value_from: str | None
) -> tuple[nn.Module, SharedRole | None, SharedRole | None]:
    """Put the roles on one base.

    Args:
        base: a causal language model; it is frozen and gets the adapters.
        lora: of the policy, and of the value model where it starts from the policy.
        reward: folder of the reward model's adapter; ``None`` where the reward is a function.
        value_from: ``reward_model``: the value model starts as a copy of the reward's adapter and head (N+ detail
            22); ``policy``: as the bare base with a head of zeros; ``None``: there is no value model.

    Returns:
        ``(policy, value model or None, reward model or None)``. The policy's adapter is named ``default``.
    """
    from peft import get_peft_model

    config = lora.peft_config("CAUSAL_LM")
    model = get_peft_model(base, config)
    width = base.config.get_text_config().hidden_size
    heads: dict[str, nn.Linear] = {}
    for name in (VALUE, REWARD):
        # Small, and trained or scored outside of any engine of its own.
        with unsharded_loading():
            heads[name] = nn.Linear(width, 1, bias=False, dtype=torch.float32)
        starts_from_reward = reward is not None and (name == REWARD or value_from == "reward_model")
        if starts_from_reward:
            _load_scalar_adapter(model, reward, name, heads[name])
        elif name == VALUE and value_from is not None:
            model.add_adapter(VALUE, config)
            nn.init.zeros_(heads[VALUE].weight)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and f".{REWARD}." not in name)
    shared = SharedBase(model)
    shared._select(POLICY)
    model.shared = shared
    heads[REWARD].requires_grad_(False)
    scorer = SharedRole(shared, REWARD, heads[REWARD]) if reward is not None else None
    return model, SharedRole(shared, VALUE, heads[VALUE]) if value_from is not None else None, scorer


def _load_scalar_adapter(model: nn.Module, folder: Path, name: str, head: nn.Linear) -> None:
    """Add an adapter that was trained with a scalar head: its layers to the base, its head to ``head``."""
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(folder)
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
    weights = load_file(folder / "adapter_model.safetensors")
    heads = {key: weights.pop(key) for key in list(weights) if ".lora_" not in key}
    if len(heads) != 1:
        raise UserError(
            f"{folder} holds {sorted(heads) or 'no head'} beside its adapters; a reward model has one scalar head."
        )
    model.add_adapter(name, config)
    # Under ZeRO-3 the new layers are in pieces: gathered for this, and split again.
    with whole([p for n, p in model.named_parameters() if f".{name}." in n]):
        set_peft_model_state_dict(model, weights, adapter_name=name)
    with torch.no_grad():
        head.weight.copy_(next(iter(heads.values())))
