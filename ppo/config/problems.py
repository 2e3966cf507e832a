"""What cannot be meant: one sentence for each setting of `PPOConfig`, before work starts."""

import dataclasses
from collections.abc import Iterator

from transformers import TrainingArguments

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.settings import field_names
from ppo_vs_dpo.artifacts.settings.values import of_another_type, out_of_range
from ppo_vs_dpo.models.sampling.generation import SamplingConfig
from ppo_vs_dpo.ppo.config.tables import ESTIMATORS, UNUSED


def problems(args) -> Iterator[str]:
    """One sentence for each setting that cannot be meant."""
    fields = {one.name: one for one in dataclasses.fields(TrainingArguments)}
    # Of PPO's own fields; transformers looks at its own.
    own = {name: getattr(args, name) for name in field_names(type(args)) if name not in fields}
    types = list(of_another_type(own, type(args), "ppo"))
    if isinstance(args.generation_kwargs, dict):
        types += of_another_type(args.generation_kwargs, SamplingConfig, "ppo.generation_kwargs")
    yield from types
    if types:
        return  # they are compared below
    try:
        sampling = args.sampling()
    except (TypeError, UserError) as error:
        yield f"ppo.generation_kwargs: {error}"
    else:
        if not sampling.temperature > 0:
            yield f"ppo.temperature is {sampling.temperature}; PPO explores by sampling, so it must be positive."
    # The temperature is looked at above.
    yield from out_of_range({key: value for key, value in own.items() if key != "temperature"}, "ppo")
    for name, why in UNUSED.items():
        one = fields.get(name)
        if one is None:  # Not in every version of transformers.
            continue
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        # Some are empty text by default, and an empty list once transformers has read them.
        if (value := getattr(args, name)) not in (default, None) and value != []:
            yield f"ppo.{name} has no meaning in PPO: {why}. Leave it out."
    if args.advantage in ESTIMATORS:
        least = ESTIMATORS[args.advantage].group
        if args.samples_per_prompt < least:
            yield (
                f"ppo.advantage={args.advantage} compares a response with others to the same prompt: set "
                f"samples_per_prompt to at least {least} (it is {args.samples_per_prompt})."
            )
        if not args.has_critic and args.value_warmup_updates:
            method = f"advantage={args.advantage}, loss={args.loss}"
            yield f"ppo.value_warmup_updates with {method}: it has no values. Set it to 0."
        if args.advantage in ("rloo", "grpo") and args.gamma != 1:
            yield f"ppo.gamma={args.gamma} with advantage={args.advantage}: whole responses count. Set it to 1."
        for name in ("value_lam", "lam_alpha"):
            if not args.has_critic and getattr(args, name) is not None:
                yield f"ppo.{name} is of GAE, and there are no values (advantage, loss). Leave it out."
        if not args.has_critic and args.conventions.score_after_last:
            yield f"ppo.parity={args.parity} is of PPO with values; drop it with advantage={args.advantage}."
    if args.loss in ("dpo", "ipo"):
        yield from _of_pairs(args)
    if args.importance_sampling_cap is not None and args.importance_sampling_cap < 1:
        yield (
            f"ppo.importance_sampling_cap is {args.importance_sampling_cap}; below 1 it would shrink the weights "
            f"of tokens that engine and trainer agree on. Use at least 1, or null for no correction."
        )
    if args.generation_engine == "vllm" and args.logprobs_from_sampling:
        yield (
            "ppo.logprobs_from_sampling with generation_engine=vllm: the ratio must compare log-probabilities of "
            "the trainer's own, and vLLM's differ. Set it to false."
        )
    if args.kl_in == "loss" and args.kl_estimator == "k1":
        yield (
            "ppo.kl_in=loss with kl_estimator=k1: as a loss its expected gradient is 0, so it would restrain "
            "nothing (docs/ppo.md, KL). Use k2 or k3 in the loss, or k1 in the reward."
        )
    if args.load_best_model_at_end and "no" in (args.eval_strategy, args.save_strategy):
        yield (
            "ppo.load_best_model_at_end needs evaluations and checkpoints: set eval_strategy and save_strategy to "
            "steps, or load_best_model_at_end=false."
        )
    if args.load_best_model_at_end and args.save_only_model:
        yield "ppo.load_best_model_at_end reads a checkpoint's whole state: set save_only_model=false."
    for name in ("score_bias", "score_length_coef"):
        if not isinstance(getattr(args, name), int | float) and getattr(args, name) != "auto":
            yield f"ppo.{name} is {getattr(args, name)!r}; it must be a number or 'auto'."
    if args.reward_aggregation == "normalize_then_sum" and args.samples_per_prompt < 2:
        yield (
            "ppo.reward_aggregation=normalize_then_sum compares the responses to a prompt: set samples_per_prompt to "
            "at least 2."
        )
    if args.reward_shaping == "par":
        if args.sync_ref_model:
            yield "ppo.reward_shaping=par compares with the reference's responses, and sync_ref_model moves it."
        if args.score_bias != 0:
            yield "ppo.score_bias with reward_shaping=par: a bias cancels in it. Set it to 0."
        if args.reward_aggregation != "sum":
            yield "ppo.reward_shaping=par with reward_aggregation=normalize_then_sum: both give the score its scale."


def _of_pairs(args) -> Iterator[str]:
    """What online DPO cannot do, or has no use for."""
    loss = f"ppo.loss={args.loss}"
    if args.samples_per_prompt < 2:
        yield f"{loss} makes pairs of the responses to a prompt: set samples_per_prompt to at least 2 (it is 1)."
    if args.per_device_train_batch_size < 2:
        yield f"{loss} needs both responses of a pair in one pass: set per_device_train_batch_size to at least 2."
    if args.kl_coef <= 0:
        yield f"{loss} has kl_coef as beta, and it is {args.kl_coef}; it must be positive."
    unused = {
        "advantage": "gae",
        "kl_in": "reward",
        "whiten_rewards": False,
        "value_warmup_updates": 0,
        "entropy_coef": 0.0,
        "loss_average": "tokens",
        "parity": None,
    }
    for name, default in unused.items():
        if getattr(args, name) != default:
            yield f"ppo.{name}={getattr(args, name)} with loss={args.loss}: it has no part in that loss. Leave it out."
