"""The models of the stage, from the run folder: four separate ones, or adapters on one base."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.heads import load_reward
from ppo_vs_dpo.models.loading.prepared import score_head
from ppo_vs_dpo.models.loading.pretrained import load_policy, load_tokenizer, load_value_or_reward
from ppo_vs_dpo.models.loading.quantized import quantization
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.roles.given import value_model_from
from ppo_vs_dpo.ppo.roles.rewards import same_tokenizer
from ppo_vs_dpo.ppo.roles.shared import reward_adapter, share_base
from ppo_vs_dpo.ppo.roles.value_head import rescale_values
from ppo_vs_dpo.ppo.stage.config import PPOStage
from ppo_vs_dpo.reward_model.ensemble import members_of
from ppo_vs_dpo.reward_model.scorer import RewardScorer, read_bias, read_length_slope


def load_roles(context: StageContext, own: PPOStage, config: ModelConfig, args: PPOConfig) -> dict[str, Any]:
    """The roles as keyword arguments of `ppo.trainer.PPOTrainer`.

    Where the reward is made of functions only there is no reward model; the caller adds the functions.

    Raises:
        UserError: a stage before this one is missing, or the settings contradict each other.
    """
    context.run.require("sft")
    if own.uses_model:
        context.run.require("reward_model")
    return (_on_one_base if own.shared_base else _separate)(context, own, config, args)


def _separate(context: StageContext, own: PPOStage, config: ModelConfig, args: PPOConfig) -> dict[str, Any]:
    sft, folder = context.run.path("sft", "model"), context.run.path("reward_model", "model")
    base = quantization(own.lora, config, context)
    policy = load_policy(sft, config, trainable=True, quantization=base)
    roles: dict[str, Any] = {"model": policy}
    if own.lora is not None:
        roles["peft_config"] = own.lora.peft_config("CAUSAL_LM")
    if own.value_path is not None:
        roles["value_model"] = _given_values(own.value_path, sft, config, args, base)
    if not own.uses_model:
        if base is not None and args.has_critic and own.value_path is None:
            roles["value_model"] = _backbone_of(sft, config, base)
        return roles
    rows = args.local_rollout_forward_batch_size
    members = [RewardScorer.load(one, config, batch_size=rows) for one in members_of(folder.parent)]
    reward = members[0]
    roles["reward_model"] = members if len(members) > 1 else reward
    if not args.has_critic or own.value_path is not None:
        return roles
    if starts_from_reward_model(own, reward, sft, config):
        roles["value_model"] = load_reward(folder, config, trainable=True, quantization=base)
        rescale_values(roles["value_model"], 1.0, reward.bias + args.fixed_score_bias)
    elif base is not None:
        roles["value_model"] = _backbone_of(sft, config, base)
    else:
        roles["value_model"] = value_model_from(None, policy)
    return roles


def starts_from_reward_model(own: PPOStage, reward: RewardScorer, sft: Path, config: ModelConfig) -> bool:
    """Whether the value model can be a copy of the reward model: it must read the policy's tokens.

    One from the Hub may not (another vocabulary, an encoder); the value model then starts from the policy.
    """
    if own.value_from != "reward_model":
        return False
    return reward.is_decoder and same_tokenizer(reward.tokenizer, load_tokenizer(sft, config))


def _given_values(path: str, sft: Path, config: ModelConfig, args: PPOConfig, base: Any) -> PreTrainedModel:
    """A value model from its own checkpoint; its values are taken to be on the scale of the final scores.

    Raises:
        UserError: there are no values to train, or it reads other tokens than the policy writes.
    """
    if not args.has_critic:
        raise UserError(f"ppo.value_path={path} with advantage={args.advantage}, loss={args.loss}: no values there.")
    if not same_tokenizer(load_tokenizer(path, config), load_tokenizer(sft, config)):
        raise UserError(
            f"ppo.value_path={path} has another vocabulary or chat template than the policy, and a value model reads "
            f"the policy's own tokens. Take one that was trained on them, or leave it out."
        )
    return load_reward(path, config, trainable=True, quantization=base)


def _backbone_of(sft: Path, config: ModelConfig, base: Any) -> PreTrainedModel:
    """What `value_model_from` gives without a reward model, on a quantised backbone, which cannot be copied."""
    value_model = load_value_or_reward(sft, config, trainable=True, quantization=base)
    torch.nn.init.zeros_(score_head(value_model).weight)
    return value_model


def _on_one_base(context: StageContext, own: PPOStage, config: ModelConfig, args: PPOConfig) -> dict[str, Any]:
    if own.lora is None:
        raise UserError(
            "ppo.shared_base puts adapters on one frozen base: set ppo.lora, too, e.g. ppo.lora={r: 16, alpha: 32}."
        )
    if args.sync_ref_model:
        raise UserError("ppo.sync_ref_model moves the reference, and with ppo.shared_base it is the frozen base.")
    if own.uses_model and len(members_of(context.run.path("reward_model"))) > 1:
        raise UserError(
            "ppo.shared_base holds one reward adapter, and reward_model.ensemble trained several whole models: set "
            "shared_base=false, or reward_model.average_weights=true with shared_base=false."
        )
    sft = context.run.path("sft", "model")
    folder = None if not own.uses_model else reward_adapter(context.run.path("reward_model"), sft)
    policy, value_model, reward = share_base(
        load_policy(sft, config, quantization=quantization(own.lora, config, context)),
        own.lora,
        folder,
        own.value_from if args.has_critic else None,
    )
    roles: dict[str, Any] = {"model": policy, "value_model": value_model}
    if reward is not None:
        bias = read_bias(folder)
        tokenizer = load_tokenizer(folder, config)
        roles["reward_model"] = RewardScorer(reward, tokenizer, bias, args.local_rollout_forward_batch_size)
        roles["reward_model"].length_slope = read_length_slope(folder)
        if value_model is not None and own.value_from == "reward_model":
            rescale_values(value_model, 1.0, bias + args.fixed_score_bias)
    return roles
