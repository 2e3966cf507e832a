"""What makes a run what it is: a checkpoint of other settings is refused by name, or what changes is adopted in whole.

Every setting counts but those in `FREE`, so that a new one counts from its first day.
"""

import dataclasses
import hashlib
import json
import warnings
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.utils import logging

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.settings import nearest
from ppo_vs_dpo.ppo.checkpoints.loop import LoopState
from ppo_vs_dpo.ppo.config import UNUSED, PPOConfig

logger = logging.get_logger(__name__)

# Settings that change nothing of what a run computes but rounding: where it writes, what it shows, how work is cut up.
FREE = frozenset(
    (
        *UNUSED,
        # where, and what is shown
        "output_dir", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level",
        "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
        "trackio_bucket_id", "trackio_static_space_id", "num_eval_samples", "diagnose", "check_first_ratio",
        "skip_memory_metrics", "include_num_input_tokens_seen", "logging_nan_inf_filter",
        # evaluating and saving
        "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size", "bf16_full_eval",
        "fp16_full_eval", "eval_do_concat_batches", "eval_use_gather_object", "save_only_model", "save_strategy",
        "save_steps", "save_on_each_node", "save_total_limit", "enable_jit_checkpoint", "load_best_model_at_end",
        "metric_for_best_model", "greater_is_better", "restore_callback_states_from_checkpoint", "push_to_hub",
        "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
        # how the work is cut up, and on what
        "per_device_train_batch_size", "gradient_accumulation_steps", "local_rollout_forward_batch_size",
        "micro_batch_tokens", "average_tokens_across_devices", "activation_checkpointing",
        "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs", "use_cpu",
        "tf32", "full_determinism", "accelerator_config", "parallelism_config", "dataloader_pin_memory",
        "dataloader_in_order", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
        "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "local_rank",
        "ds3_gather_for_generation", "logprobs_from_sampling", "coalesce_grad_reduction", "vllm_mode",
        "vllm_server_base_url", "vllm_weight_transfer", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization",
        "use_cache",
        # no settings of PPO
        "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "resume_with", "data_seed",
        "remove_unused_columns", "length_column_name", "torch_compile_backend", "torch_compile_mode",
        "liger_kernel_config",
        # in rollout_size and updates below
        "rollout_batch_size", "max_steps", "num_train_epochs", "total_episodes",
    )
)  # fmt: skip
# Other names of what is compared.
ALSO = {
    "max_steps": "updates", "num_train_epochs": "updates", "total_episodes": "updates",
    "rollout_batch_size": "rollout_size", "train_dataset": "prompts",
}  # fmt: skip
# What a checkpoint's tensors or figures were made for: no new value can be taken up halfway.
FIXED = ("optim", "optim_args", "optim_target_modules", "score_bias", "score_bias_samples", "bf16", "fp16")
SCHEDULE = (
    "learning_rate",
    "value_learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "updates",
)
# Setting -> its name in an optimizer's groups.
IN_GROUPS = {"weight_decay": "weight_decay", "adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}


def identity(args: PPOConfig, size: int, updates: int, prompt_ids: list[list[int]]) -> dict[str, Any]:
    """What must be equal for going on from a checkpoint."""
    names = (one.name for one in dataclasses.fields(args) if one.init and one.name not in FREE)
    mine = {name: getattr(args, name) for name in names}
    content = hashlib.sha256(json.dumps(prompt_ids).encode()).hexdigest()[:16]
    mine = {**mine, "rollout_size": size, "updates": updates, "prompts": f"{len(prompt_ids)} ({content})"}
    # As JSON gives it back: enumerations as their values, tuples as lists.
    return json.loads(json.dumps(mine, default=lambda value: getattr(value, "value", str(value))))


def changed(saved: dict[str, Any], current: dict[str, Any], allowed: list[str] | None, where: str) -> set[str]:
    """The settings that differ and may.

    Args:
        saved: `identity` that a checkpoint holds. What an older version did not write is not compared.

    Raises:
        UserError: one that may not; names all of them, with both values.
    """
    may = {ALSO.get(name, name) for name in allowed or ()}
    for name in may:
        if name not in current:
            raise UserError(f"ppo.resume_with: {name} is no setting that is compared.{nearest(name, list(current))}")
        if name in FIXED:
            raise UserError(
                f"ppo.resume_with: {name} cannot change halfway: what the checkpoint holds was made with it. Start in "
                f"an empty folder."
            )
    # The number alone is what was written up to version 0.1.0.
    old = {**saved, "prompts": current["prompts"]} if saved.get("prompts") == _count(current) else saved
    different = {name for name, value in current.items() if name in old and old[name] != value}
    said = {name: f"{name} was {old[name]!r} and is {current[name]!r}" for name in sorted(different)}
    if different - may:
        raise UserError(
            f"{where} belongs to another run: {'; '.join(said[name] for name in sorted(different - may))}. Go on with "
            f"the settings it was made with, start in an empty folder, or name what is meant to change in "
            f"ppo.resume_with."
        )
    for name in said:
        logger.warning("going on from %s with another setting: %s", where, said[name])
    return different


def _count(current: dict[str, Any]) -> int:
    return int(current["prompts"].split()[0])


def adopt(
    different: set[str],
    args: PPOConfig,
    loop: LoopState,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    fresh: list[dict[str, Any]],
) -> None:
    """Let settings that changed act from now on, where the checkpoint's state would go on with the old ones.

    Args:
        different: their names.
        args: with the new values.
        loop: as the checkpoint left it.
        optimizer: likewise.
        scheduler: new, made with the new values, if one of `SCHEDULE` changed; else as the checkpoint left it.
        fresh: the optimizer's groups as they were made, without parameters.
    """
    if "kl_coef" in different:
        loop.kl.coef = args.kl_coef
    for group, made in zip(optimizer.param_groups, fresh, strict=True):
        for name in {IN_GROUPS[one] for one in different & IN_GROUPS.keys()} & made.keys():
            group[name] = made[name]
    if different & set(SCHEDULE):
        for group, made, rate in zip(optimizer.param_groups, fresh, scheduler.base_lrs, strict=True):
            group["initial_lr"], group["lr"] = made.get("initial_lr", rate), rate
        # Where the new schedule would be by now.
        scheduler.last_epoch = loop.step - 1
        with warnings.catch_warnings():
            # It wants an optimizer step before it: that was in the run before.
            warnings.simplefilter("ignore")
            scheduler.step()
