"""``docs/settings.md``: what every field of the argument classes does in each stage.

python -m ppo_vs_dpo.pipeline.composing.settings_page docs/settings.md
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.card import table
from ppo_vs_dpo.artifacts.errors import say
from ppo_vs_dpo.artifacts.files import write_text
from ppo_vs_dpo.artifacts.run import TRAINED
from ppo_vs_dpo.artifacts.settings.rules import RULES, Rule
from ppo_vs_dpo.pipeline.composing.schema import SECTIONS, load_class

GOING_ON = """## A setting that changes while a run stands still

One rule for the four stages of the command: a setting that changes a result makes the stage begin anew. It says which
setting that was, keeps what it had beside it, and brings that back when the setting is put back; a checkpoint of
other settings is never gone on from. What changes only how a result is made (`artifacts.guards.fingerprints.COSMETIC`)
does not count. `PPOTrainer` in Python, which has no run folder, compares every setting that counts with the
checkpoint's, refuses by name, and adopts in whole, listed and logged, what `resume_with` names."""
# Fields that act where a tiny training in one process on a CPU cannot show it: where they do. A name may be of one
# stage ("ppo.gradient_accumulation_steps"). All others are shown to act, by `test_settings_effects.py`.
UNSEEN: dict[str, str] = {
    **dict.fromkeys(
        ("accelerator_config", "average_tokens_across_devices", "ddp_backend", "ddp_broadcast_buffers")
        + ("ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout", "log_on_each_node")
        + ("log_level_replica", "save_on_each_node", "ds3_gather_for_generation"),
        "several processes or machines",
    ),
    **dict.fromkeys(
        ("bf16_full_eval", "fp16", "fp16_full_eval", "tf32", "activation_offloading", "dataloader_pin_memory")
        + ("liger_kernel_config", "use_liger_kernel", "torch_empty_cache_steps"),
        "an accelerator",
    ),
    **dict.fromkeys(
        ("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing", "use_cache")
        + ("gradient_checkpointing_kwargs", "padding_free", "precompute_ref_batch_size", "precompute_ref_log_probs")
        + ("pad_to_multiple_of", "full_determinism", "local_rollout_forward_batch_size", "generation_kwargs")
        + ("dpo.per_device_eval_batch_size", "ppo.gradient_accumulation_steps", "ppo.per_device_train_batch_size")
        + ("ppo.micro_batch_tokens", "ppo.logprobs_from_sampling"),
        "memory and time; the figures stay the same, up to rounding",
    ),
    **dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_revision", "push_to_hub"), "the Hub"),
    **dict.fromkeys(
        ("trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "project", "run_name", "report_to"),
        "trackers",
    ),
    **dict.fromkeys(
        ("dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_num_workers")
        + ("dataloader_persistent_workers", "dataloader_prefetch_factor"),
        "worker processes",
    ),
    **dict.fromkeys(
        ("debug", "logging_nan_inf_filter", "check_first_ratio", "diagnose"),
        "what goes wrong: an overflow, a run that turns bad",
    ),
    **dict.fromkeys(("ignore_data_skip", "restore_callback_states_from_checkpoint"), "going on from a checkpoint"),
    **dict.fromkeys(("optim_args", "optim_target_modules"), "optimizers that take them (GaLore, APOLLO, ...)"),
    "router_aux_loss_coef": "mixtures of experts",
    **dict.fromkeys(("reward_ensemble", "reward_ensemble_coef"), "several reward models"),
    "cast_lm_head_to_fp32": "bf16",
    **dict.fromkeys(("log_level", "logging_first_step", "num_eval_samples", "disable_tqdm"), "what is shown"),
    **dict.fromkeys(
        ("generation_engine", "vllm_mode", "vllm_server_base_url", "vllm_gpu_memory_utilization")
        + ("importance_sampling", "importance_sampling_cap", "vllm_enable_sleep_mode", "vllm_weight_transfer"),
        "vLLM",
    ),
    **dict.fromkeys(("ptx_coef", "ptx_batch_size", "ptx_max_length"), "pretraining texts beside the prompts"),
    "remove_unused_columns": "columns that a stage's data do not have",
    "use_cpu": "machines with an accelerator",
}
HEAD = """# What every setting does

A stage's section holds its own keys (`ppo-vs-dpo show experiment=...` prints each with its comment) and any field of
the argument class it passes through to: `trl.SFTConfig`, `trl.RewardConfig`, `trl.DPOConfig`,
`ppo_vs_dpo.PPOConfig`. Each of these fields **acts**, is **refused** (at once, with the reason, where it is set to
another value than its default), or means **nothing** there: it may stand in a configuration that serves other
programs, too, and changes nothing. `-`: the class has no such field.

Written by `python -m ppo_vs_dpo.pipeline.composing.settings_page docs/settings.md`, held by
`tests/pipeline/composing/test_settings_page.py`, which sets every field to another value.
"""


def argument_classes() -> dict[str, type]:
    """The argument class of each stage."""
    return {stage: load_class(SECTIONS[stage][1]) for stage in TRAINED}


def rules() -> dict[str, dict[str, Rule]]:
    """The rules of each stage; PPO's with what its loop does not read."""
    from ppo_vs_dpo.ppo.config import UNUSED

    ppo = {name: Rule("refused", f"has no meaning in PPO: {why}.") for name, why in UNUSED.items()}
    return {stage: {**RULES[stage], **(ppo if stage == "ppo" else {})} for stage in TRAINED}


def kinds() -> dict[str, dict[str, str]]:
    """Field -> stage -> ``acts``, ``refused``, ``nothing`` or ``-``; fields sorted by name."""
    classes, ruled = argument_classes(), rules()
    fields = {stage: {f.name for f in dataclasses.fields(cls) if f.init} for stage, cls in classes.items()}
    table: dict[str, dict[str, str]] = {}
    for name in sorted(set().union(*fields.values())):
        table[name] = {
            stage: (ruled[stage][name].kind if name in ruled[stage] else "acts") if name in fields[stage] else "-"
            for stage in TRAINED
        }
    return table


def page() -> str:
    """The page as Markdown."""
    every, ruled, why = kinds(), rules(), []
    for name, row in every.items():
        reasons: dict[str, list[str]] = {}
        for stage in TRAINED:
            if row[stage] in ("refused", "nothing"):
                reasons.setdefault(ruled[stage][name].why, []).append(stage)
        why += [[f"`{name}`", ", ".join(stages), reason] for reason, stages in reasons.items()]
    unseen = [
        [words, ", ".join(f"`{name}`" for name, said in sorted(UNSEEN.items()) if said == words)]
        for words in dict.fromkeys(UNSEEN.values())
    ]
    parts = [
        HEAD.rstrip(),
        table(("field", *TRAINED), [[f"`{name}`", *map(row.get, TRAINED)] for name, row in every.items()]),
        "## Why",
        table(("field", "stages", "why"), why),
        "## Acts, where one process on a CPU does not show it",
        "Every other field that acts is set to another value in a tiny training and must end, log or save otherwise\n"
        "(`tests/pipeline/composing/test_settings_effects.py`). These are proven as carried to where they act:",
        table(("shows with", "fields"), unseen),
        GOING_ON,
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str]) -> Any:
    """Write the page into a file, or print it."""
    if arguments:
        write_text(Path(arguments[0]), page())
    else:
        say(page())


if __name__ == "__main__":
    main(sys.argv[1:])
