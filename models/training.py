"""What the three stages built on TRL share: arguments, resuming, and saving."""

import contextlib
import importlib.util
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers import trainer as transformers_trainer
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.utils import logging as transformers_logging

from ppo_vs_dpo.artifacts.errors import Complaint, UserError, first_sentence
from ppo_vs_dpo.artifacts.files import atomic_folder
from ppo_vs_dpo.artifacts.guards.refusals import explain
from ppo_vs_dpo.artifacts.resources import parameter_size, part
from ppo_vs_dpo.artifacts.settings import field_names, nearest
from ppo_vs_dpo.artifacts.settings.values import of_another_type, out_of_range
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.callbacks import RunCallback
from ppo_vs_dpo.models.devices import arithmetic
from ppo_vs_dpo.models.loading.adapters import is_peft
from ppo_vs_dpo.models.loading.adapters import merge as merge_adapters
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.prepared import is_halved
from ppo_vs_dpo.models.loading.pretrained import load_policy, load_value_or_reward
from ppo_vs_dpo.models.loading.quantized import in_4bit
from ppo_vs_dpo.models.resuming import readable, resume_point
from ppo_vs_dpo.models.sharding.collectives import gradients_in_buckets
from ppo_vs_dpo.models.sharding.deepspeed import (
    check_settings,
    deepspeed_settings,
    held_bytes,
    named_step,
    start_deepspeed,
    tell_held_bytes,
    unsharded_loading,
)
from ppo_vs_dpo.models.sharding.state import portable_checkpoints
from ppo_vs_dpo.models.sharding.watch import PATIENCE, join_on_cpu, meet

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def training_arguments(cls: type[Arguments], context: StageContext, passed: dict[str, Any]) -> Arguments:
    """TRL's argument class from the keys that the user passed through, with what the run folder asks for.

    The run's ``deepspeed`` section shards the models (`models.sharding.deepspeed`). Where the user says nothing: the
    arithmetic that the device has (`models.devices`), TensorBoard files in the stage's folder, a progress bar on
    terminals only, pinned memory with an accelerator only.

    Raises:
        UserError: a value that the class refuses.
    """
    accelerator = torch.accelerator.is_available() and not passed.get("use_cpu", False)
    defaults = {
        "use_cpu": not accelerator,
        "ddp_timeout": int(PATIENCE),
        "dataloader_pin_memory": accelerator,
        "report_to": "tensorboard",
        "disable_tqdm": not sys.stderr.isatty(),
        "save_total_limit": 2,
        "ddp_find_unused_parameters": False,
    }
    passed = {**passed, **arithmetic(model_settings(context), passed, accelerator)}
    passed = {key: value for key, value in passed.items() if value is not None or key not in defaults}
    sharding = deepspeed_settings(context, passed.get("optim") or cls.__dataclass_fields__["optim"].default)
    if sharding is not None:
        defaults["deepspeed"] = sharding
        start_deepspeed(use_cpu=not accelerator, timeout=passed.get("ddp_timeout"))
    fixed = {"output_dir": str(context.dir / "checkpoints"), "seed": context.seed, "data_seed": context.seed}
    fixed["push_to_hub"] = False  # the finished model is pushed, by `pipeline.running.publish`; checkpoints are not
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(context.dir / "tensorboard")
    check_values({**defaults, **passed}, context.stage)
    wrong = [*of_another_type(passed, cls, context.stage), *out_of_range(passed, context.stage)]
    if wrong:
        raise Complaint(wrong)
    if sharding is None and not accelerator:
        join_on_cpu(passed.get("ddp_timeout", defaults["ddp_timeout"]), passed.get("ddp_backend"))
    try:
        with warnings.catch_warnings():
            # TRL still sets the old name of a setting that transformers renamed; nothing for the user to do.
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated")
            args = cls(**{**defaults, **passed, **fixed})
    except TypeError as error:
        match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        hint = nearest(match.group(1), field_names(cls)) if match else ""
        raise UserError(f"{context.stage}: {error}.{hint}") from error
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{context.stage}: {first_sentence(error)}") from error
    if sharding is not None:
        check_settings(args, context.stage)
    if args.disable_tqdm:
        os.environ["TQDM_DISABLE"] = "1"
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    return args


def check_values(values: dict[str, Any], stage: str) -> None:
    """What transformers finds out only when training starts, or never.

    Raises:
        UserError: settings that contradict each other or this machine.
    """
    workers = ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context")
    for name in workers:
        if values.get(name) and not values.get("dataloader_num_workers"):
            raise UserError(
                f"{stage}.{name} is set and there are no workers: set dataloader_num_workers, or remove it."
            )
    check_order(values, stage)
    if values.get("fp16") and values.get("use_cpu"):
        raise UserError(f"{stage}.fp16 does nothing on a CPU: use bf16=true there, or remove it.")
    if values.get("activation_offloading") and values.get("use_cpu"):
        raise UserError(f"{stage}.activation_offloading moves activations from an accelerator, and there is none.")
    if values.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        raise UserError(f"{stage}.use_liger_kernel needs the package liger-kernel: pip install it, or remove the key.")


# Of accelerate's settings those that would draw another order, or cut batches that nobody asked for; with the reason.
ORDERS = {
    (
        "use_seedable_sampler",
        False,
    ): "draws an order that no checkpoint holds, so that the stage could not go on where it stopped",
    ("dispatch_batches", True): "lets the first process draw for all, in an order that no checkpoint holds",
    ("split_batches", True): "makes per_device_train_batch_size the batch of all processes together, and an update "
    "smaller than the run says",
}


def check_order(values: dict[str, Any], stage: str) -> None:
    """That going on from a checkpoint goes on in the order of the rows, and that an update has the rows it should.

    Raises:
        UserError: a setting by which it would not.
    """
    order = values.get("train_sampling_strategy")
    if order == "group_by_length":
        raise UserError(
            f"{stage}.train_sampling_strategy=group_by_length draws an order that no checkpoint holds, so that the "
            f"stage could not go on where it stopped. Padding is skipped without it; take random."
        )
    if order == "batch_rebalance" and stage != "sft":
        raise UserError(
            f"{stage}.train_sampling_strategy=batch_rebalance reads one length a row, and a pair has two. Take random."
        )
    loading = values.get("accelerator_config")
    for (key, value), why in ORDERS.items() if isinstance(loading, dict) and stage != "ppo" else ():
        if loading.get(key) is value:
            raise UserError(f"{stage}.accelerator_config.{key}={str(value).lower()} {why}. Remove it.")


def model_settings(context: StageContext) -> ModelConfig:
    """The run's ``model`` section.

    Raises:
        UserError: an unknown key or a wrong type.
    """
    section = context.run.config.get("model") or {}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), section))
    except OmegaConfBaseException as error:
        raise UserError(f"model.{error.full_key or ''}: {first_sentence(error.msg or error)}") from error


class LogBeforeSaving(TrainerCallback, ExportableState):
    """Logs at every checkpoint, and counts tokens and loss on after a resume.

    A log line averages over the steps since the last one; if a checkpoint lay between two lines, a resumed run would
    average over fewer steps than one that was never interrupted. The Trainer's ``train_loss`` is the sum of the lines'
    losses over all steps; of that sum it forgets at a resume what went before, so it travels with the checkpoint.
    """

    def __init__(self):
        self.trainer: Trainer | None = None
        self.resumed_at = 0

    def state(self) -> dict[str, Any]:
        """What ``trainer_state.json`` keeps of it."""
        return {"args": {}, "attributes": {"total_loss": getattr(self.trainer, "_total_loss_scalar", 0.0)}}

    def on_train_begin(self, args, state, control, **kwargs):
        kept = state.stateful_callbacks.get(type(self).__name__)
        self.resumed_at = state.global_step
        if state.global_step and isinstance(kept, dict):
            self.trainer._total_loss_scalar = kept["attributes"]["total_loss"]
            self.trainer._initial_global_step = 0  # the mean is over the steps of that sum: all of them
        counted = [row["num_tokens"] for row in state.log_history if "num_tokens" in row]
        if counted:
            self.trainer._total_train_tokens = int(counted[-1])

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            control.should_log = True
        return control

    on_epoch_end = on_step_end

    def on_log(self, args, state, control, logs=None, **kwargs):
        # Of the summary only the mean is of the whole run; rates are of the steps that took its time.
        if logs and "train_runtime" in logs and self.resumed_at:
            for name in ("train_samples_per_second", "train_steps_per_second"):
                if name in logs:
                    logs[name] *= (state.global_step - self.resumed_at) / max(state.global_step, 1)


class StopOnDivergence(TrainerCallback):
    """Ends a run whose loss is no longer a number, with an explanation."""

    def __init__(self, stage: str):
        self.stage = stage

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm"):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                raise UserError(
                    f"training diverged: {name} is {logs[name]} at step {state.global_step}. Lower "
                    f"{self.stage}.learning_rate (now {args.learning_rate}) or {self.stage}.max_grad_norm, then "
                    f"start the same command again."
                )


class Ended(Exception):
    """The checkpoint that is gone on from is that of the last step."""


class EndAtOnce(TrainerCallback):
    """Where a stage was killed between its last step and its end: no further step.

    The Trainer looks at ``max_steps`` after a step only, so one that begins there takes another one.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps > 0:
            raise Ended


def callbacks(context: StageContext) -> list[TrainerCallback]:
    """The callbacks of every stage: metrics and progress, logs at checkpoints, an end to diverged runs."""
    return [LogBeforeSaving(), RunCallback(context), StopOnDivergence(context.stage), EndAtOnce()]


def train(trainer: Trainer, context: StageContext) -> dict[str, float]:
    """Train, from the last checkpoint where there is one.

    Returns:
        The Trainer's summary (``train_loss``, ``train_runtime``, ...).

    Raises:
        UserError: the checkpoint is of another model; training ended before its last step.
    """
    rows, ranks = len(trainer.train_dataset), trainer.args.world_size
    if rows < ranks:
        raise UserError(
            f"{context.stage}: {rows} rows for {ranks} processes. Start at most {rows} (launch.processes)."
        )
    gradients_in_buckets(trainer.accelerator)
    checkpoint = resume_point(context, trainer.args.output_dir, trainer.is_deepspeed_enabled)
    steps = next(one for one in trainer.callback_handler.callbacks if isinstance(one, RunCallback))
    # One line a log is written by the progress bar where there is one, by metrics.jsonl always: no second printout.
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, LogBeforeSaving):
            callback.trainer = trainer
    trainer._save_checkpoint = part("saving")(trainer._save_checkpoint)
    try:
        portable = portable_checkpoints() if trainer.is_deepspeed_enabled else contextlib.nullcontext()
        name, patience = lambda: f"{context.stage}, step {trainer.state.global_step + 1}", trainer.args.ddp_timeout
        reading = readable(checkpoint, context, lambda: steps.stepped)
        with portable, reading, rotated_by_callback(), named_step(name, patience):
            try:
                with part("training"):
                    summary = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
            except Ended:
                summary = trainer._finalize_training(None, 0, time.time()).metrics
        check_ended(context, trainer.state.global_step, trainer.state.max_steps)
        if trainer.is_deepspeed_enabled:
            _tell_held_bytes(trainer)
        return summary
    except SafetensorError as error:
        reason = explain(error) or f"{error}. Start the same command again."
        raise UserError(
            f"{context.stage}: a checkpoint could not be written or read: {reason} The last complete one stays."
        ) from error


def check_ended(context: StageContext, step: int, last: int) -> None:
    """That training went to its last step: what ended before, whoever asked for it, is no result.

    Raises:
        UserError: it did not.
    """
    if step < last:
        raise UserError(
            f"{context.stage}: training ended at step {step} of {last}, and nothing asked for that. The same command "
            f"goes on from the last checkpoint; see the log for who stopped it."
        )


@contextlib.contextmanager
def rotated_by_callback() -> Iterator[None]:
    """Inside the block the Trainer deletes no checkpoint: `RunCallback` does, when the new one can be gone on from."""
    theirs = transformers_trainer.rotate_checkpoints
    transformers_trainer.rotate_checkpoints = lambda **_: None
    try:
        yield
    finally:
        transformers_trainer.rotate_checkpoints = theirs


def _tell_held_bytes(trainer: Trainer) -> None:
    roles = {"policy": trainer.model, "reference": getattr(trainer, "ref_model", None)}
    held = {role: held_bytes(model) for role, model in roles.items() if model is not None}
    tell_held_bytes(trainer.args.process_index, held)


def parameter_counts(trainer: Trainer) -> dict[str, int]:
    """``parameters`` and ``trainable_parameters`` of the model, shards of other ranks counted too."""
    sizes = [(parameter_size(p), p.requires_grad) for p in trainer.model.parameters()]
    return {
        "parameters": sum(size for size, _ in sizes),
        "trainable_parameters": sum(size for size, trainable in sizes if trainable),
    }


@part("saving")
def save_model(
    trainer: Trainer, context: StageContext, tokenizer: PreTrainedTokenizerBase, merge: bool = True
) -> Path:
    """Save the trained model and its tokenizer by `write_model`, on the main process; all processes must call this.

    The trainer's model may be wrapped (DDP, DeepSpeed, PEFT). Returns its folder.
    """
    weights = None
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        # A collective: the shards meet on the main process.
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.args.should_save:
        write_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, context, weights, merge)
    # The main process may have merged and saved for longer than a collective waits.
    meet()
    return context.dir / "model"


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: StageContext,
    weights: dict[str, torch.Tensor] | None = None,
    merge: bool = True,
    adapters: list[str] | None = None,
) -> None:
    """Write a model and its tokenizer as ``<stage>/model``, whole or not at all.

    Of a model with adapters ``model`` is the merged one, and ``adapter`` the adapter; without ``merge`` ``model`` is
    that. ``weights`` are the model's where it is in pieces itself; ``adapters`` are its own, where it has others, too.
    """
    target = context.dir / "model"
    first = context.dir / "adapter" if is_peft(model) and merge else target
    with atomic_folder(first) as folder:
        model.save_pretrained(folder, state_dict=weights, **({"selected_adapters": adapters} if adapters else {}))
        tokenizer.save_pretrained(folder)
    if first == target:
        return
    if weights is not None or in_4bit(model) or is_halved(model):
        # Merged from the files, into the base as it was saved: the model in memory is in pieces, in 4 or in 16 bits.
        # What the adapter was made for says it: a policy's config may have ``num_labels: 1``, too.
        scalar = model.peft_config[model.active_adapter].task_type == "SEQ_CLS"
        load = load_value_or_reward if scalar else load_policy
        with unsharded_loading():
            merged = load(first, model_settings(context))
    else:
        merged = merge_adapters(model, str(first), adapters)
    with atomic_folder(target) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
