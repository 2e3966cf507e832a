"""The models as they are given, objects or names, and the ones that are made from them where they are not."""

import copy

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.prepared import disable_dropout, score_head
from ppo_vs_dpo.models.loading.pretrained import load_policy, load_value_or_reward
from ppo_vs_dpo.models.sharding.deepspeed import unsharded_loading, whole_copy, whole_state


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
    try:
        with unsharded_loading():
            value_model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    except ValueError as error:
        raise UserError(
            f"transformers has no model with a scalar head for {policy.config.model_type}, so none can be made from "
            f"the policy: pass value_model (any architecture with the policy's vocabulary), or train a reward model "
            f"of another architecture to start it from."
        ) from error
    # A policy that comes with adapters is what it answers with them.
    inner = whole_copy(policy).merge_and_unload() if hasattr(policy, "merge_and_unload") else policy
    theirs = whole_state(getattr(inner, inner.base_model_prefix), keep=True)
    getattr(value_model, value_model.base_model_prefix).load_state_dict(theirs)
    torch.nn.init.zeros_(score_head(value_model).weight)
    return value_model


def add_adapters(policy: PreTrainedModel, value_model: PreTrainedModel | None, peft_config) -> tuple:
    """Wrap policy and value model (if there is one) with PEFT adapters; the value head trains in full.

    Raises:
        UserError: the policy has adapters already, or the adapters are to have dropout.
    """
    from peft import PeftModel, TaskType, get_peft_model

    if isinstance(policy, PeftModel):
        raise UserError(
            "peft_config was given and the policy has adapters already. Merge them first (merge_and_unload), or drop "
            "peft_config to train the adapters it has."
        )
    if rates := {key: value for key, value in vars(peft_config).items() if "dropout" in key and value}:
        name, rate = next(iter(rates.items()))
        raise UserError(
            f"peft_config.{name} is {rate}, and PPO trains without dropout: with it the policy that trains is not the "
            f"one that sampled (the ratio of the first pass must be 1). Set it to 0."
        )
    if value_model is None:
        return get_peft_model(policy, peft_config), None
    value_config = copy.deepcopy(peft_config)
    value_config.task_type = TaskType.SEQ_CLS
    # The adapter library adds the head to the modules that train in full, for this task type.
    try:
        return get_peft_model(policy, peft_config), get_peft_model(value_model, value_config)
    except ValueError as error:
        raise UserError(f"peft_config: {str(error).splitlines()[0]}") from error
