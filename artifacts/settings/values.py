"""Values that cannot be meant: of another type than the field's, no number, or outside of what the field can be.

The argument classes of TRL and transformers take nearly anything and fail, or do nothing, when training starts.
"""

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

# Field -> the interval it must lie in. A name means the same in every section; `BY_SECTION` has the exceptions.
_COUNTS = "[1,)"
_FIELDS = {
    _COUNTS: (
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps save_total_limit "
        "max_length eval_accumulation_steps max_new_tokens generation_batch_size scoring_batch_size batch_size "
        "workers batch rounds sft_examples train_prompts heldout_prompts pairs test_pairs max_pairs "
        "max_prompt_tokens max_response_tokens prompts_per_step pairs_per_prompt rollout_batch_size total_episodes "
        "max_prompt_length response_length samples_per_prompt par_references ensemble num_ppo_epochs "
        "num_mini_batches local_rollout_forward_batch_size micro_batch_tokens ptx_batch_size ptx_max_length "
        "ref_model_sync_steps score_bias_samples requests_at_once n_prompts samples baseline_draws "
        "sample_max_new_tokens precompute_ref_batch_size r processes nodes threads"
    ),
    "(0,)": (
        "logging_steps save_steps eval_steps num_train_epochs ddp_timeout adam_epsilon beta temperature kl_target "
        "kl_horizon rso_beta cliprange cliprange_value score_clip early_stop_kl max_growth timeout "
        "requests_per_minute alpha near_duplicate lam_alpha stalled_after"
    ),
    "[0,)": (
        "learning_rate value_learning_rate weight_decay max_grad_norm warmup_steps dataloader_num_workers eval_delay "
        "neftune_noise_alpha top_k pool_size kl_coef vf_coef entropy_coef ptx_coef value_warmup_updates "
        "validation_prompts num_eval_samples retries reasks enumerate_up_to check_pairs min_score_ratio price_in "
        "price_out max_cost missing_eos_penalty center_rewards_coefficient reward_ensemble_coef rpo_alpha sft_weight "
        "ld_alpha"
    ),
    "[0,1]": "warmup_ratio gamma lam value_lam ref_model_mixup_alpha",
    "[0,1)": "adam_beta1 adam_beta2 dropout test_fraction heldout_fraction",
    "(0,1]": "top_p vllm_gpu_memory_utilization",
    "[0,0.5)": "label_smoothing label_noise",
    "[1,256]": "concurrency",
    "[0.5,1)": "confidence",
    "[100,)": "resamples",
}
LIMITS = {name: interval for interval, names in _FIELDS.items() for name in names.split()}
BY_SECTION: dict[str, dict[str, str]] = {
    "compare": {"other_temperatures": "[0,)", "temperature": "[0,)"},
    "data": {"samples": "[2,)", "test_prompts": "[0,)", "label_clamp": "(0.5,1]"},
    "judge": {"temperature": "[0,)", "repeats": _COUNTS, "max_completion_tokens": _COUNTS},
    "reward_model": {},
}
# -1 stands for "not set" in transformers.
UNSET = {"max_steps": -1, "warmup_steps": -1}


def out_of_range(section: dict[str, Any], where: str, kind: str = "") -> list[str]:
    """One sentence for each number that is none, or lies outside of what its field can be.

    Args:
        section: as a plain dict; nested ones (``lora``) are looked at, too.
        where: its name, for messages.
        kind: which of `BY_SECTION` counts; the section's name where not given.
    """
    limits = {**LIMITS, **BY_SECTION.get(kind or where, {})}
    found = []
    for key, value in section.items():
        if isinstance(value, dict) and key not in ("sweep", "architecture", "columns", "inline", "policies"):
            found += out_of_range(value, f"{where}.{key}", key if key in BY_SECTION else kind or where)
            continue
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not math.isfinite(number):
                found.append(f"{where}.{key} is {number}; it must be a finite number.")
            elif key in limits and UNSET.get(key) != number and not inside(number, limits[key]):
                found.append(f"{where}.{key} is {number}; it must {in_words(limits[key])}.")
    steps = section.get("max_steps")
    if isinstance(steps, int) and steps != -1 and steps < 1:
        found.append(f"{where}.max_steps is {steps}; it must be at least 1 (or -1: as many as num_train_epochs).")
    if isinstance(steps, int) and steps > 0:  # epochs are then not looked at
        found = [one for one in found if not one.startswith(f"{where}.num_train_epochs ")]
    return found


def inside(number: float, interval: str) -> bool:
    """Whether a number lies in an interval such as ``"[0,1)"`` or ``"(0,)"``."""
    low, high = interval[1:-1].split(",")
    above = number > float(low) if interval[0] == "(" else number >= float(low)
    return above and (not high or (number < float(high) if interval[-1] == ")" else number <= float(high)))


def in_words(interval: str) -> str:
    """``"[1,)"`` -> ``"be at least 1"``."""
    low, high = interval[1:-1].split(",")
    if high:
        return f"lie in {interval[0]}{low}, {high}{interval[-1]}"
    return f"be at least {low}" if interval[0] == "[" else f"be above {low}"


def of_another_type(section: dict[str, Any], cls: type, where: str) -> list[str]:
    """One sentence for each value that its field's annotation does not allow."""
    hints = _hints(cls)
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    found = []
    for key, value in section.items():
        hint = hints.get(key)
        # A switch that is null is decided by the stage: by the device, or by what else is asked for.
        unset = value is None and (defaults.get(key) is None or hint is bool)
        if hint is None or unset or allows(hint, value):
            continue
        found.append(f"{where}.{key} is {value!r}; it must be {' or '.join(dict.fromkeys(_names(hint)))}.")
    return found


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError):  # annotations that exist for type checkers only
        return {field.name: field.type for field in dataclasses.fields(cls) if not isinstance(field.type, str)}


def allows(hint: Any, value: Any) -> bool:
    """Whether an annotation allows a value as YAML gives it; annotations that YAML has no values for allow all."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(allows(one, value) for one in arguments)
    if origin is typing.Literal:
        return value in arguments and not (
            isinstance(value, bool) and True not in arguments and False not in arguments
        )
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if origin in (list, tuple) or hint in (list, tuple):
        inner = [one for one in arguments if one is not Ellipsis]
        return isinstance(value, list | tuple) and all(not inner or allows(inner[0], item) for item in value)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [one.value for one in hint] or isinstance(value, hint)
    return True


def _names(hint: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    if origin in (typing.Union, types.UnionType):
        for one in arguments:
            yield from _names(one)
    elif origin is typing.Literal:
        yield from map(str, arguments)
    elif hint in plain:
        yield plain[hint]
    elif origin in (list, tuple) or hint in (list, tuple):
        yield "a list" + (f" of {' or '.join(_names(arguments[0]))}" if arguments else "")
    elif origin is dict or hint is dict:
        yield "a mapping"
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        yield from (str(one.value) for one in hint)
