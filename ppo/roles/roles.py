"""Who takes part in PPO: policy, value, reference, rewards, and the engine that samples."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.adapters import is_peft
from ppo_vs_dpo.models.loading.prepared import halve_frozen, train_in_full
from ppo_vs_dpo.models.loading.pretrained import eos_token_ids
from ppo_vs_dpo.models.passes.answers import answers
from ppo_vs_dpo.models.passes.head import compute_in_fp32
from ppo_vs_dpo.models.sampling.engine import Engine
from ppo_vs_dpo.models.sharding.deepspeed import held_bytes
from ppo_vs_dpo.models.sharding.state import state_bytes
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.roles.given import (
    add_adapters,
    as_policy,
    as_value_or_reward,
    check_trains,
    check_value_model,
    value_model_from,
)
from ppo_vs_dpo.ppo.roles.reference import Reference, prepare_frozen
from ppo_vs_dpo.ppo.roles.rewards import RewardError, RewardFunction, Rewards, make_rewards, tokens_of
from ppo_vs_dpo.ppo.roles.shared import POLICY, REWARD, VALUE, SharedRole
from ppo_vs_dpo.ppo.roles.trained import PolicyAndValue
from ppo_vs_dpo.ppo.roles.value_head import rescale_values


@dataclass
class Roles:
    """Who takes part.

    Attributes:
        policy: trained; a causal language model, unwrapped.
        value: trained; a scalar head on a backbone, unwrapped. ``None`` where no critic is asked for.
        reference: frozen; what the policy is held to.
        rewards: frozen; what gives the scores.
        tokenizer: the policy's.
        trained: policy and value as the one module that is trained; wrapped (DDP, DeepSpeed) once training begins.
        engine: what samples the rollouts; there when the trainer is.
        version: how often the policy's weights have changed.
        sent: whose weights an engine with a copy of its own has, and which version of them.
        length_coef: subtracted from a score for each token of the response.
        reference_scores: prompt's row -> scores of the reference's responses to it, where a score is shaped by them.
        reference_answers: set of prompts -> row -> the reference's answer, where a judge compares with it.
        computing: the run's arithmetic as a context: what is not called through ``trained`` runs within it, so that
            all roles and phases round alike.
    """

    policy: PreTrainedModel
    value: PreTrainedModel | None
    reference: Reference
    rewards: Rewards
    tokenizer: PreTrainedTokenizerBase
    trained: nn.Module
    engine: Engine | None = None
    version: int = 0
    sent: tuple[str, int] | None = None
    length_coef: float = 0.0
    reference_scores: dict[int, list[float]] = field(default_factory=dict)
    reference_answers: dict[str, dict[int, str]] = field(default_factory=dict)
    computing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    @property
    def model(self) -> PolicyAndValue:
        """`trained` without its wrapper."""
        return getattr(self.trained, "module", self.trained)

    @property
    def eos_ids(self) -> list[int]:
        """Every token that ends a response."""
        return eos_token_ids(self.policy, self.tokenizer)

    def check_known(self, responses: Sequence[Sequence[int]]) -> None:
        """Who reads the policy's token ids must have an embedding for each.

        Vocabularies are padded to different sizes, and what no tokenizer writes a policy may sample all the same.

        Raises:
            RewardError: value or reward model has fewer; names the token.
        """
        readers = [(part.name, part.model) for part in self.rewards.models() if part.same_tokens]
        for who, model in [("value_model", self.value), *readers]:
            size = tokens_of(model)
            for row, ids in enumerate(responses if size is not None else ()):
                if ids and max(ids) >= size:
                    raise RewardError(
                        f"the policy sampled token {max(ids)}, of which the {who.removeprefix('the ')} knows nothing: "
                        f"it has {size} tokens, and the policy {tokens_of(self.policy)}. Take one with the policy's "
                        f"vocabulary.",
                        row,
                    )

    def place(self, accelerator: Accelerator, reference_moves: bool = False) -> None:
        """Put what is frozen on the device, or under DeepSpeed's ZeRO-3 into inference engines."""
        self.computing = accelerator.autocast
        self.reference.prepare(accelerator, reference_moves)
        for part in self.rewards.models():
            part.model, part.computing = prepare_frozen(part.model, accelerator), accelerator.autocast

    def held_bytes(self) -> dict[str, int]:
        """Bytes that this rank holds of each role's weights and, sharded, of the optimizer and its fp32 weights."""
        models = [part.model for part in self.rewards.models()]
        reward = nn.ModuleList(models) if len(models) > 1 else next(iter(models), None)
        held = held_by_role(self.policy, self.value, self.reference.model, reward)
        return {**held, **state_bytes(self.trained)} if hasattr(self.trained, "get_global_grad_norm") else held


def make_roles(
    model: PreTrainedModel | str,
    reward_model: Any,
    ref_model: PreTrainedModel | str | None,
    value_model: PreTrainedModel | str | None,
    args: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    reward_funcs: RewardFunction | list[RewardFunction] | None = None,
    reward_tokenizer: PreTrainedTokenizerBase | None = None,
    peft_config: Any = None,
) -> Roles:
    """The roles from what a `ppo.trainer.PPOTrainer` was given; see there.

    Raises:
        UserError: the models do not fit each other, or there is no reward.
    """
    policy = as_policy(model, tokenizer)
    rewards = make_rewards(
        reward_model,
        reward_funcs,
        tokenizer,
        reward_tokenizer,
        args.reward_weights,
        args.local_rollout_forward_batch_size,
        policy,
        args.reward_ensemble,
        args.reward_ensemble_coef,
    )
    length_coef = args.score_length_coef
    if length_coef == "auto":
        length_coef = rewards.length_slope
        if length_coef is None:
            raise UserError(
                "ppo.score_length_coef=auto takes what the reward model's stage measured, and this reward has no "
                "model that says so. Give a number, in units of the score a token."
            )
    if rewards.wants_references and (args.reward_shaping == "par" or args.sync_ref_model):
        other = "reward_shaping=par" if args.reward_shaping == "par" else "sync_ref_model"
        raise UserError(
            f"a judge compares with the answers of the reference that the run starts from: ppo.{other} does not go "
            f"with it. Leave it out."
        )
    if args.reward_aggregation == "normalize_then_sum" and len(rewards.parts) < 2:
        raise UserError(
            f"ppo.reward_aggregation=normalize_then_sum weighs several rewards, and there is one: "
            f"{rewards.parts[0].name}. Give two or more, or reward_aggregation=sum."
        )
    if not args.has_critic and value_model is not None:
        method = f"advantage={args.advantage}" if args.loss == "ppo" else f"loss={args.loss}"
        raise UserError(f"a value_model was given, and {method} trains none. Drop it, or use gae.")
    if args.has_critic and value_model is None:
        shared, weight, bias = rewards.shared() or (None, 1.0, 0.0)
        value_model = value_model_from(shared, policy)
        if shared is not None:
            rescale_values(value_model, weight, weight * bias + args.fixed_score_bias)
    value = as_value_or_reward(value_model, trainable=True) if args.has_critic else None
    if value is not None and (value is reward_model or value is policy):
        raise UserError("value_model must be a model of its own: it is trained. Pass a copy, or nothing.")
    if value is not None:
        check_value_model(value, tokenizer)
    reference = as_policy(ref_model, tokenizer, "ref_model") if ref_model is not None else None
    given = None
    if peft_config is not None:
        given = answers(policy)
        policy, value = add_adapters(policy, value, peft_config)
    for trained, what in ((policy, "the policy"), (value, "value_model")):
        if trained is not None:
            check_trains(trained, what)
            train_in_full(trained, sharded=getattr(args, "deepspeed_plugin", None) is not None)
    reference = Reference(reference, policy, given)
    if args.cast_lm_head_to_fp32:
        for one in filter(None, (policy, reference.model)):
            compute_in_fp32(one)
    halve_bases(policy, value, args)
    trained = PolicyAndValue(policy, value)
    return Roles(policy, value, reference, rewards, tokenizer, trained, length_coef=float(length_coef))


def halve_bases(policy: nn.Module, value_model: nn.Module | None, args: PPOConfig) -> None:
    """Hold the linear layers under adapters in the dtype that they compute in, before they go to a device.

    Autocast keeps its copies of weights that train; one that is frozen it would cast anew at every use, for every
    decoded token. The adapter is merged into the base as it was saved, not into this one.
    """
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    if half is None or args.device.type == "cpu" or getattr(args, "deepspeed_plugin", None) is not None:
        return
    for model in (policy, value_model):
        # A role on the policy's base has it in half already.
        if model is not None and is_peft(model):
            halve_frozen(model, half)


def held_by_role(
    policy: nn.Module, value_model: nn.Module | None, reference: nn.Module | None, reward: nn.Module | None
) -> dict[str, int]:
    """Bytes of weights that this rank holds of each role; on a shared base of the base and of each role's own part.

    A role is ``None`` where there is no such model, or where it is another's weights.
    """
    roles = {"policy": policy, "value": value_model, "reference": reference, "reward": reward}
    if not isinstance(value_model, SharedRole) and not isinstance(reward, SharedRole):
        return {role: held_bytes(model) for role, model in roles.items() if model is not None}
    parts: dict[str, list] = {"base": [], "policy": [], "value": [], "reward": []}
    for name, parameter in policy.named_parameters():
        adapter = next((a for a in (POLICY, VALUE, REWARD) if "lora_" in name and f".{a}." in name), None)
        parts[{POLICY: "policy", None: "base"}.get(adapter, adapter)].append(parameter)
    for role in ("value", "reward"):
        parts[role].extend(roles[role].parameters() if roles[role] is not None else ())
    return {role: held_bytes(parameters) for role, parameters in parts.items() if parameters}
