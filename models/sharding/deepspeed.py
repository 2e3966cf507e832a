"""DeepSpeed: how a stage's models are split over ranks, without compiling anything on a CPU.

The run's ``deepspeed`` section (configs/deepspeed/) is handed to transformers' Trainer. Three things need care: on a
CPU DeepSpeed would compile a communication kernel at its first collective; its engine asks for mpi4py outside of a
launcher; and ZeRO-3 shards whatever is loaded while its configuration is active, also what one rank loads alone.
"""

import contextlib
import copy
import datetime
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError, first_sentence, warn
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.sharding.watch import PATIENCE, not_waiting, watched

# Of DeepSpeed's own keys those that change what is computed, and whose place is a stage's section: a fingerprint holds
# that one, and not how a stage is sharded.
ELSEWHERE = {
    "optimizer": "a stage's optim",
    "scheduler": "a stage's lr_scheduler_type",
    **dict.fromkeys(("curriculum_learning", "data_efficiency", "progressive_layer_drop", "compression_training")),
}


def deepspeed_settings(context: StageContext, optimizer: str | None = None) -> dict[str, Any] | None:
    """The run's ``deepspeed`` section as DeepSpeed's configuration; ``None`` without one.

    Args:
        context: of the stage.
        optimizer: the stage's ``optim``, where it trains.

    Raises:
        UserError: no ZeRO stage, or one that does not exist; a key that changes what is computed; see `settled`.
    """
    section = context.run.config.get("deepspeed")
    settings = OmegaConf.to_container(section, resolve=True) if section else None
    if not settings:
        return None
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed.zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3.")
    if stage < 3 and "offload_param" in settings["zero_optimization"]:
        raise UserError(
            f"deepspeed.zero_optimization.offload_param needs stage 3 (stage is {stage}): below it every rank holds "
            f"all weights. Use deepspeed=zero3_offload, or drop offload_param."
        )
    for key in ELSEWHERE.keys() & settings.keys():
        place = f" Use {ELSEWHERE[key]}." if ELSEWHERE[key] else ""
        raise UserError(
            f"deepspeed.{key}: the section says how a stage is split over ranks, not what it computes.{place}"
        )
    return settled(settings, optimizer)


def settled(settings: dict[str, Any], optimizer: str | None = None) -> dict[str, Any]:
    """The same, with what is ours to decide decided: memory is page-locked where there is a GPU to copy it to, and an
    optimizer whose states are in the CPU's memory is DeepSpeed's CPU Adam where that can be compiled.

    Args:
        settings: DeepSpeed's.
        optimizer: the stage's ``optim``; ``None`` where nothing trains.

    Raises:
        UserError: ``zero_force_ds_cpu_optimizer: true`` with another optimizer than AdamW, or without a compiler.
    """
    settings = copy.deepcopy(settings)
    zero = settings.get("zero_optimization", {})
    for what in ("offload_optimizer", "offload_param"):
        section = zero.get(what)
        if section and section.get("pin_memory") == "auto":
            section["pin_memory"] = torch.cuda.is_available()
    offloads = (zero.get("offload_optimizer") or {}).get("device", "none") == "cpu" and optimizer is not None
    asked, adam = settings.get("zero_force_ds_cpu_optimizer", "auto"), (optimizer or "").startswith("adamw_torch")
    if asked == "auto":
        # Without a GPU nothing is offloaded in truth: torch's own is as good, and there from the start.
        settings["zero_force_ds_cpu_optimizer"] = offloads and adam and torch.cuda.is_available() and not no_cpu_adam()
    elif asked and offloads:
        if not adam:
            raise UserError(
                f"deepspeed.zero_force_ds_cpu_optimizer is true, which would take Adam in the place of "
                f"optim={optimizer}. Set it to auto or false, or optim to adamw_torch_fused."
            )
        if why := no_cpu_adam():
            raise UserError(f"deepspeed.zero_force_ds_cpu_optimizer is true, and {why}. Set it to auto or false.")
    return settings


@functools.cache
def no_cpu_adam() -> str:
    """Why DeepSpeed's CPU Adam cannot be had; empty where it can. It is compiled now, in a minute, if it never was."""
    missing = [name for name in (os.environ.get("CXX", "g++"), "ninja") if shutil.which(name) is None]
    if missing:
        why = f"{' and '.join(missing)} to compile DeepSpeed's CPU Adam with cannot be found"
    else:
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))])
            return ""
        # Whatever a compiler, its flags or a CUDA that is not where it is looked for may come up with.
        except Exception as error:
            causes = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            why = f"DeepSpeed's CPU Adam cannot be compiled ({causes[0]})"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warn(f"{why}: torch's AdamW steps what is offloaded, in several times the time.\n")
    return why


def start_deepspeed(use_cpu: bool, timeout: float | None = None) -> None:
    """Join the ranks before any of TRL's argument classes asks for them.

    On a CPU: gloo, and none of DeepSpeed's own kernels (they would be compiled at the first collective).

    Args:
        timeout: seconds a collective may take; `PATIENCE` where nothing is said (DeepSpeed's own default is a third).

    Raises:
        UserError: DeepSpeed is not installed.
    """
    if use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:
        os.environ.update({key: os.environ.get(key, value) for key, value in alone.items()})
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"the run asks for DeepSpeed, which cannot be imported: {error}") from error
    if use_cpu:
        # An internal name: where a later version drops it, DeepSpeed compiles its kernel once, and still works.
        compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
        if "deepspeed_shm_comm" in compatible:
            compatible["deepspeed_shm_comm"] = False
    patience = datetime.timedelta(seconds=PATIENCE if timeout is None else timeout)
    deepspeed.init_distributed(dist_backend="gloo" if use_cpu else None, verbose=False, timeout=patience)


@contextlib.contextmanager
def named_step(name: Callable[[], str], patience: float = PATIENCE) -> Iterator[None]:
    """What the ranks do together inside the block: one that waits in vain says so under this name.

    gloo's collectives raise when they time out. NCCL's watchdog ends the process from another thread, and no line of
    Python sees it: so a thread of our own says where this rank stands shortly before (`models.sharding.watch`).

    Args:
        name: of what is under way; it changes as the work goes on.
        patience: seconds a collective may take (``ddp_timeout``).

    Raises:
        UserError: in place of the backend's error.
    """
    try:
        with watched(name, patience):
            yield
    except RuntimeError as error:
        # gloo: "Timed out waiting 1800000ms for recv operation"; NCCL: "Watchdog caught collective operation timeout".
        if not re.search(r"timed out|timeout", str(error), re.IGNORECASE):
            raise
        others = "; ".join(not_waiting()[:4])
        blame = f"{others}." if others else "A rank that hangs or is much slower stalls all: look for it in the log."
        raise UserError(
            f"rank {os.environ.get('RANK', '0')} waited in vain for another rank in this step: {name()} "
            f"({first_sentence(error)[-160:]}). {blame} ddp_timeout sets the patience, in seconds."
        ) from error


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 holds this parameter in pieces."""
    return hasattr(parameter, "ds_id")


@contextlib.contextmanager
def whole(parameters: Iterable[torch.nn.Parameter], write: bool = True) -> Iterator[None]:
    """Parameters whole inside the block; with ``write``, what rank 0 writes into them is kept on all ranks."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None):
        yield


def whole_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A deep copy that is whole on this rank, also where ZeRO-3 holds ``model`` in pieces."""
    with whole(model.parameters(), write=False):
        return copy.deepcopy(model)


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """A deep copy; in pieces where ZeRO-3 holds ``model`` in pieces. Parameters are whole one at a time."""
    twin = copy.deepcopy(model)  # what is in pieces is empty
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        if is_sharded(theirs):
            with whole([theirs], write=False):
                mine.data = theirs.data.clone()
            theirs.convert_to_zero_parameters([mine])
    return twin


@contextlib.contextmanager
def alike(one: torch.nn.Parameter, other: torch.nn.Parameter) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What this rank holds of two parameters of one shape: under ZeRO-3 a piece, the same of both."""
    if is_sharded(one) and is_sharded(other) and not getattr(one, "ds_persist", False):
        yield one.ds_tensor, other.ds_tensor
        return
    with whole([one, other]):
        yield one.data, other.data


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Put the weights of one module into another that has the same, each rank its pieces of them."""
    theirs, kept = dict(source.named_parameters()), target.state_dict().keys()
    for name, parameter in target.named_parameters():
        with alike(parameter, theirs[name]) as (mine, other):
            mine.copy_(other)
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        if name in kept:
            buffer.copy_(buffers[name])


def whole_state(model: torch.nn.Module, keep: bool, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """The state dict of a model in pieces, on the CPU: parameters are gathered one at a time.

    Args:
        model: a module of this rank; all ranks must call this.
        keep: whether this rank wants it. The others get an empty dict and never hold more than one parameter.
        trained_only: leave out what does not require gradients (the base under adapters).
    """
    state: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if trained_only and not parameter.requires_grad:
            continue
        if id(parameter) not in seen:
            with whole([parameter], write=False):
                seen[id(parameter)] = parameter.detach().to("cpu", copy=True) if keep else torch.empty(0)
        # Tied weights stay one tensor, as safetensors wants to know.
        state[name] = seen[id(parameter)]
    saved = model.state_dict().keys()
    state.update((name, buffer.detach().cpu()) for name, buffer in model.named_buffers() if name in saved)
    return state if keep else {}


@contextlib.contextmanager
def gathered(engine: torch.nn.Module, module: torch.nn.Module) -> Iterator[None]:
    """The weights of ``module``, a part of ``engine``, whole inside the block: for generation.

    ZeRO-3 gathers a layer whenever it runs, on all ranks at once: decoding would gather every layer for every token,
    and ranks whose responses end early would leave the others waiting. Here all is gathered once, and the engine's
    hooks are out of the way until the block ends (as in TRL's ``unwrap_model_for_generation``).
    """
    if not any(is_sharded(parameter) for parameter in module.parameters()):
        yield
        return
    from trl.models.utils import add_hooks, remove_hooks

    with whole(module.parameters(), write=False):
        remove_hooks(engine)
        try:
            yield
        finally:
            add_hooks(engine)


@contextlib.contextmanager
def unsharded_loading() -> Iterator[None]:
    """Models loaded inside the block are whole, on the rank that loads them, also while ZeRO-3 is configured."""
    from transformers.integrations import deepspeed as integration

    active = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = active


def held_bytes(model: torch.nn.Module | Iterable[torch.nn.Parameter]) -> int:
    """Bytes of parameters that this rank holds by itself: a shard's size where ZeRO-3 has split a parameter."""
    total = 0
    for parameter in model.parameters() if isinstance(model, torch.nn.Module) else model:
        piece = getattr(parameter, "ds_tensor", None)
        total += (parameter if piece is None else piece).numel() * parameter.element_size()
    return total


def tell_held_bytes(rank: int, held: dict[str, int]) -> None:
    """One line: how many bytes this rank holds of each role's weights, and of what belongs to training."""
    warn(f"rank {rank} holds {', '.join(f'{what} {size:,} bytes' for what, size in held.items())}\n")


def check_settings(args: Any, stage: str) -> None:
    """Hold DeepSpeed's configuration against the stage's own keys; to be called before any engine is made.

    Args:
        args: ``transformers.TrainingArguments`` with a ``deepspeed`` configuration.

    Raises:
        UserError: a value contradicts a key; names both.
    """
    found = "\n".join(getattr(args.hf_deepspeed_config, "mismatches", []))
    wrong = re.findall(r"- ds (\S+) vs hf (.+)", found)
    if wrong:
        raise UserError(
            f"the deepspeed section contradicts the section {stage}: "
            f"{'; '.join(f'deepspeed.{ours} against {stage}.{theirs}' for ours, theirs in wrong)}. "
            f"Set the deepspeed value to auto: the stage's own key decides."
        )
