"""The models as they are given, objects or names, and the ones that are made from them where they are not."""

import contextlib
import copy

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.errors import UserError, first_sentence
from ppo_vs_dpo.models.loading.adapters import check_adapters, is_peft, kind_of, merge, train_active, virtual_tokens
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.prepared import disable_dropout, score_head
from ppo_vs_dpo.models.loading.pretrained import load_policy, load_value_or_reward
from ppo_vs_dpo.models.loading.vocabulary import check_tokens
from ppo_vs_dpo.models.passes.answers import check_language_model
from ppo_vs_dpo.models.passes.logprobs import backbone, base, score_head_of
from ppo_vs_dpo.models.passes.padding import check_causal
from ppo_vs_dpo.models.sharding.deepspeed import (
    copied,
    copy_weights,
    is_sharded,
    unsharded_loading,
    whole,
    whole_copy,
)


def as_policy(
    model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None = None, what: str = "the policy"
) -> PreTrainedModel:
    """A policy or reference given as an object or a name, with dropout off (N+ detail 7).

    Raises:
        UserError: it is no causal language model, or none of this tokenizer.
    """
    if isinstance(model, str):
        model = load_policy(model, trainable=True)
    check_language_model(model, tokenizer, what)
    disable_dropout(model)
    return model


def check_trains(model: torch.nn.Module, what: str) -> None:
    """Something of a policy or value model must train; adapters that were loaded for reading are let to.

    Raises:
        UserError: nothing does, or what is left of a quantised model that has no adapters.
    """
    train_active(model)
    if getattr(model, "hf_quantizer", None) is not None and not is_peft(model):
        method = getattr(model, "quantization_method", "quantised")
        raise UserError(
            f"{what} is quantised ({getattr(method, 'value', method)}): its norms and embeddings alone could train. "
            f"Pass peft_config to train adapters on it, or load it whole."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"no weight of {what} requires gradients: nothing of it would be trained. Load it with trainable=True, "
            f"call requires_grad_(True), or pass peft_config to train adapters on it."
        )


def check_value_model(value_model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """A value model reads the tokens of a tokenizer from left to right and gives one number after each.

    Raises:
        UserError: it does something else; names what.
    """
    inner = base(value_model)
    if not isinstance(inner, PreTrainedModel):
        return  # a role on a shared base
    check_adapters(value_model, "value_model")
    outputs = getattr(score_head_of(inner), "out_features", 1)
    if outputs != 1:
        raise UserError(f"value_model has {outputs} labels; a value is one number (num_labels=1).")
    check_tokens(inner, tokenizer, "value_model")
    check_causal(backbone(value_model))


def as_value_or_reward(model: PreTrainedModel | str, trainable: bool, config: ModelConfig | None = None):
    """A value or reward model given as an object or a name, with dropout off."""
    if isinstance(model, str):
        model = load_value_or_reward(model, config, trainable=trainable)
    disable_dropout(model)
    return model


def value_model_from(reward_model: PreTrainedModel | None, policy: PreTrainedModel) -> PreTrainedModel:
    """What the value model starts from: a copy of the reward model (N+ detail 22), or the policy with a head of zeros.

    With a head of zeros all values are 0 at first: advantages start as what the rewards themselves say.
    """
    if reward_model is not None:
        if is_peft(reward_model):
            return merge(whole_copy(reward_model), "the reward model").requires_grad_(True)
        return copied(reward_model).requires_grad_(True)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    # A policy that comes with adapters is what it answers with them.
    inner = merge(whole_copy(policy), "the policy") if is_peft(policy) else policy
    in_pieces = any(is_sharded(parameter) for parameter in inner.parameters())
    try:
        # All that is drawn here is replaced; in pieces the first rank alone would draw.
        with torch.random.fork_rng(devices=[]), contextlib.nullcontext() if in_pieces else unsharded_loading():
            value_model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    except ValueError as error:
        raise _no_value_model(policy) from error
    theirs, mine = (getattr(model, model.base_model_prefix) for model in (inner, value_model))
    if mine.state_dict().keys() != theirs.state_dict().keys():
        raise _no_value_model(policy)  # another transformer under the same name (BART's with an encoder)
    copy_weights(theirs, mine)
    head = score_head(value_model).weight
    with whole([head]):
        torch.nn.init.zeros_(head)
    return value_model


def _no_value_model(policy: PreTrainedModel) -> UserError:
    return UserError(
        f"transformers has no model with a scalar head for {policy.config.model_type}, so none can be made from the "
        f"policy: pass value_model (any architecture with the policy's vocabulary), or train a reward model of "
        f"another architecture to start it from."
    )


def add_adapters(policy: PreTrainedModel, value_model: PreTrainedModel | None, peft_config) -> tuple:
    """Wrap policy and value model (if there is one) with PEFT adapters; the value head trains in full.

    Raises:
        UserError: the policy has adapters already, the adapters are to have dropout, or are of a kind that cannot be
            trained here.
    """
    from peft import PeftModel, TaskType, get_peft_model

    if isinstance(policy, PeftModel):
        raise UserError(
            "peft_config was given and the policy has adapters already. Merge them first (merge_and_unload), or drop "
            "peft_config to train the adapters it has."
        )
    if peft_config.is_prompt_learning:
        raise virtual_tokens("peft_config", peft_config)
    if kind_of(peft_config) == "ADALORA":
        raise UserError(
            "peft_config is ADALORA, which moves its ranks by a call after each step (update_and_allocate) that PPO's "
            "loop does not make: its ranks would never move. Use LoRA."
        )
    if peft_config.task_type not in (None, TaskType.CAUSAL_LM):
        raise UserError(
            f"peft_config.task_type is {getattr(peft_config.task_type, 'value', peft_config.task_type)}, and the "
            f"policy is a causal language model: its adapters could not be loaded again. Set it to CAUSAL_LM (the "
            f"value model's are made from the same settings)."
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
    if getattr(value_config, "init_lora_weights", None) == "corda":
        # Its directions were found on the policy; the value model's adapters start as they do by default.
        value_config.init_lora_weights, value_config.corda_config = True, None
    # The adapter library adds the head to the modules that train in full, for this task type.
    try:
        return get_peft_model(policy, peft_config), get_peft_model(value_model, value_config)
    except ValueError as error:
        raise UserError(f"peft_config: {first_sentence(error)}") from error
