"""What each field of the argument classes does in a stage: it acts, it is refused, or it means nothing there.

The stages pass keys through to TRL's and transformers' argument classes, and those have fields that a stage does not
read: it loads the model itself, tokenises itself, resumes by itself. A field without a rule here *acts*. A refused
one is refused wherever it has another value than the class's own default. ``docs/settings.md`` is the whole table.
"""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Rule:
    """What becomes of a field.

    Attributes:
        kind: ``refused``, or ``nothing``: it may stand there, and changes nothing.
        why: the reason, as it stands behind the key's name in a message.
        defaults: values that are no wish of the user's, beside ``None`` and ``False``.
    """

    kind: Literal["refused", "nothing"]
    why: str
    defaults: tuple[Any, ...] = ()


def _refused(why: str, *defaults: Any) -> Rule:
    return Rule("refused", why, defaults)


def _nothing(why: str) -> Rule:
    return Rule("nothing", why)


_OURS = "set by the stage itself; remove it."
_KEY = "a token would be written into the run folder; remove it, and set HF_TOKEN or use `hf auth login`."
_FINISHED = "the finished model is what push_to_hub pushes; remove it."
_MODEL = "the stage loads the model and its tokenizer; the section model is the place for it. Remove it."
_TOKENS = "the stage turns the data into tokens itself (docs/data.md); remove it."
_NO_METRICS = "the stage computes no metrics of predictions"
_WORKERS = "data are tokenised before training and read from memory"

EVERYWHERE: dict[str, Rule] = {
    **dict.fromkeys(("output_dir", "logging_dir", "seed", "data_seed"), _refused(_OURS)),
    **dict.fromkeys(("hub_token", "push_to_hub_token"), _refused(_KEY)),
    **dict.fromkeys(("hub_strategy", "hub_always_push"), _refused(_FINISHED, "every_save")),
    "deepspeed": _refused("sharding is one section for all stages: deepspeed=zero2, zero3 (docs/cluster.md)."),
    "fsdp": _refused("models are sharded by DeepSpeed here (deepspeed=zero2 or zero3); remove it.", "", []),
    "fsdp_config": _refused("models are sharded by DeepSpeed here (deepspeed=zero2 or zero3); remove it."),
    "parallelism_config": _refused("models are sharded by DeepSpeed here (deepspeed=zero2 or zero3); remove it."),
    "resume_from_checkpoint": _refused("a stage goes on from its own newest checkpoint; remove it."),
    "enable_jit_checkpoint": _refused(
        "on SIGTERM it ends training, and a stage that ends is done; here SIGTERM ends the stage, and the same "
        "command goes on from its last checkpoint (save_steps). Remove it."
    ),
    "torch_compile": _refused(
        "passes without padding have another shape each time, and compiling them did not pay (docs/performance.md); "
        "remove it."
    ),
    "torch_compile_backend": _refused("models are not compiled here; remove it."),
    "torch_compile_mode": _refused("models are not compiled here; remove it."),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _nothing("for example scripts of transformers")),
    "local_rank": _nothing("the launcher sets it"),
    **dict.fromkeys(("eval_use_gather_object", "eval_do_concat_batches", "label_names"), _nothing(_NO_METRICS)),
    "length_column_name": _nothing("lengths are known from the tokens"),
}
TRL: dict[str, Rule] = {
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code", "chat_template_path"), _refused(_MODEL)),
    **dict.fromkeys(("eos_token", "pad_token"), _refused(_MODEL)),
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs"), _refused(_TOKENS, "text")),
    "dataset_num_proc": _nothing("the stage turns the data into tokens itself, in batches, once"),
    **dict.fromkeys(("include_for_metrics", "batch_eval_metrics", "prediction_loss_only"), _nothing(_NO_METRICS)),
    "eval_accumulation_steps": _nothing(_NO_METRICS),
    "auto_find_batch_size": _refused(
        "its updates would have fewer rows than the settings say, and the report; where memory is short, halve "
        "per_device_train_batch_size and double gradient_accumulation_steps. Remove it."
    ),
    "truncation_mode": _refused("rows over max_length are left out, not cut; remove it.", "keep_start"),
}
_NO_EVALUATION = "the stage has no evaluation set; remove it (its report is on held-out pairs, after training)."
NO_EVALUATION: dict[str, Rule] = {
    "eval_strategy": _refused(_NO_EVALUATION, "no"),
    **dict.fromkeys(("eval_on_start", "load_best_model_at_end", "metric_for_best_model"), _refused(_NO_EVALUATION)),
    "greater_is_better": _refused(_NO_EVALUATION),
    **dict.fromkeys(
        ("eval_steps", "eval_delay", "per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval"),
        _nothing("the stage has no evaluation set"),
    ),
    "eval_packing": _refused(_NO_EVALUATION),
}
RULES: dict[str, dict[str, Rule]] = {
    "sft": {
        **EVERYWHERE,
        **TRL,
        **NO_EVALUATION,
        "assistant_only_loss": _refused(
            "the loss is on the assistant's words already, also in answers of several turns; remove it."
        ),
    },
    "reward_model": {
        **EVERYWHERE,
        **TRL,
        **NO_EVALUATION,
        "label_smoothing_factor": _refused(
            "the loss is Bradley-Terry's; label noise is reward_model.label_noise. Remove it.", 0, 0.0
        ),
    },
    "dpo": {
        **EVERYWHERE,
        **TRL,
        "label_smoothing_factor": _refused("DPO's own is dpo.label_smoothing; remove it.", 0, 0.0),
        "neftune_noise_alpha": _refused(
            "noise on embeddings would make the policy another than the reference before the first step; remove it."
        ),
    },
    # What else PPO's loop does not read: `ppo.config.UNUSED`.
    "ppo": {
        **EVERYWHERE,
        "resume_with": _refused(
            "a stage whose settings change begins anew, and what it had is kept beside it; it is for PPOTrainer in "
            "Python. Remove it."
        ),
        "per_device_eval_batch_size": _nothing("evaluations take local_rollout_forward_batch_size rows at once"),
        **dict.fromkeys(
            ("dataloader_pin_memory", "dataloader_in_order", "remove_unused_columns"),
            _nothing("prompts are tokenised before training and read from memory, with all their columns"),
        ),
        **dict.fromkeys(
            ("average_tokens_across_devices", "include_num_input_tokens_seen", "logging_nan_inf_filter"),
            _nothing("the loop counts real tokens over all ranks, and logs every figure as it is"),
        ),
        **dict.fromkeys(("use_cache", "skip_memory_metrics"), _nothing("read by transformers' own loop alone")),
    },
}


def refused_keys(section: dict[str, Any], where: str) -> list[str]:
    """One sentence for each key of a stage's section that is refused and is not at its default.

    Args:
        section: the section as a plain dict.
        where: the stage, ``"sft"`` and so on; of another one the rules of all stages hold.
    """
    rules = RULES.get(where, EVERYWHERE)
    found = []
    for key, value in section.items():
        rule = rules.get(key)
        if rule is None or rule.kind != "refused":
            continue
        ours = rule.why == _OURS
        if ours or not (value is None or value is False or value in rule.defaults):
            found.append(f"{where}.{key}: {rule.why}")
    return found
