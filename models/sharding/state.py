"""The exact state of a training engine, in files that any number of ranks can read.

DeepSpeed's own checkpoints hold each rank's slices, pickled: another number of ranks or another ZeRO stage cannot read
them without a conversion. Here every trained tensor is written whole (fp32 weights and the optimizer's moments), each
by one rank in turn, as safetensors. Memory stays at 1/N a rank, nothing is pickled, and a state written on 2 ranks
under ZeRO-3 goes on under ZeRO-2, on 1 rank or on 4; on the same ranks to the last bit.

The flat partitions that DeepSpeed keeps are its internals; they are reached in `_partitions` alone.
"""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ppo_vs_dpo.artifacts.errors import UserError, first_sentence
from ppo_vs_dpo.artifacts.files import read_json, write_json
from ppo_vs_dpo.models.sharding.deepspeed import is_sharded, whole

INDEX = "trained.json"
WEIGHT = "weight"
# Bytes of one file, which a rank holds on the host until it is written (a larger tensor has a file of its own).
PART = 8 * 2**30


def check_sharding(checkpoint: Path, sharded: bool) -> None:
    """Whether a run, sharded by DeepSpeed or not, can go on from a checkpoint of PPO or of one of TRL's trainers.

    Raises:
        UserError: the optimizer's state in it is of the other kind. transformers' Trainer would go on without it, and
            with a new one.
    """
    written = any(checkpoint.glob(INDEX)) or any(checkpoint.glob(f"global_step*/{INDEX}"))
    if written != sharded:
        here, there = ("with", "without") if sharded else ("without", "with")
        raise UserError(
            f"{checkpoint} was written {there} DeepSpeed and this run is {here} it. Set deepspeed as it was (stages "
            f"2 and 3, and any number of processes, go on from each other)."
        )


def _partitions(engine: torch.nn.Module) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """The optimizer under ZeRO's, and this rank's flat fp32 partitions that it steps."""
    zero = engine.optimizer
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    return zero.optimizer, zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups


def _link_moments(engine: torch.nn.Module) -> None:
    """Let ZeRO-2 find each parameter's moments: it links them after the first group's first step, when the other
    groups have none yet."""
    zero = engine.optimizer
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _trained(engine: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def _full(parameter: torch.nn.Parameter, key: str | None = None) -> torch.Tensor:
    """An fp32 weight, or the state ``key`` of its optimizer, put together from all ranks."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)


def save_trained(engine: torch.nn.Module, folder: Path, rank: int, ranks: int) -> None:
    """Write the trained weights in fp32 and the optimizer's state; all ranks must call this.

    ``folder`` exists, and takes ``trained.json`` and safetensors files of each rank.
    """
    optimizer, flat = _partitions(engine)
    _link_moments(engine)
    # Entries of the flat partition's shape are moments; the others (Adam's step) are the same for every parameter.
    state = optimizer.state.get(flat[0], {})
    moments = sorted(key for key, value in state.items() if torch.is_tensor(value) and value.shape == flat[0].shape)
    scalars = {key: float(value) for key, value in state.items() if key not in moments and value is not None}
    index: dict[str, Any] = {"ranks": ranks, "moments": moments, "scalars": scalars, "parameters": {}}
    index["groups"] = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    mine: dict[str, torch.Tensor] = {}
    # Of each rank: bytes of the file that is being filled, and its number. All ranks count alike.
    sizes, parts = [0] * ranks, [0] * ranks
    for number, (name, parameter) in enumerate(_trained(engine).items()):
        owner, size = number % ranks, 4 * _shape(parameter).numel() * (1 + len(moments))
        if sizes[owner] and sizes[owner] + size > PART:
            if owner == rank:
                save_file(mine, folder / _file(rank, parts[rank]))
                mine.clear()
            sizes[owner], parts[owner] = 0, parts[owner] + 1
        sizes[owner] += size
        index["parameters"][name] = {"file": _file(owner, parts[owner]), "shape": list(_shape(parameter))}
        for key in (None, *moments):
            tensor = _full(parameter, key)
            if owner == rank:
                mine[f"{name}:{key or WEIGHT}"] = tensor.detach().to("cpu", torch.float32).clone().contiguous()
    save_file(mine, folder / _file(rank, parts[rank]))
    if rank == 0:
        write_json(folder / INDEX, index)


def _file(rank: int, part: int) -> str:
    return f"trained-{rank}{f'-{part}' if part else ''}.safetensors"


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


class Saved:
    """The files of a saved state; tensors are read when they are asked for, and no more of them than is needed.

    Raises:
        UserError: a file is missing or torn (its size is not what its header says), or lacks a tensor.
    """

    def __init__(self, folder: Path, index: dict[str, Any]):
        self.folder, self.index = folder, index
        self.files: dict[str, Any] = {}
        for name, entry in index["parameters"].items():
            with self._named(entry["file"]):
                if entry["file"] not in self.files:
                    self.files[entry["file"]] = safe_open(folder / entry["file"], "pt")
                for key in (WEIGHT, *index["moments"]):
                    self.files[entry["file"]].get_slice(f"{name}:{key}")

    @contextlib.contextmanager
    def _named(self, file: str) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            rank = re.findall("[0-9]+", file)[0]
            raise UserError(
                f"{self.folder} is not complete: {file}, the part of rank {rank} of {self.index['ranks']}, "
                f"cannot be read ({first_sentence(error)}). If ranks write to disks of their own, bring their "
                f"files together. Else delete this checkpoint: the run goes on from the one before."
            ) from error

    def whole(self, name: str, key: str) -> torch.Tensor:
        """A parameter's weight, or one of its moments."""
        file = self.index["parameters"][name]["file"]
        with self._named(file):
            return self.files[file].get_tensor(f"{name}:{key}")

    def piece(self, name: str, key: str, start: int, size: int) -> torch.Tensor:
        """``(size,)`` entries of one from ``start`` on, in its flat order; zeros after its end."""
        entry = self.index["parameters"][name]
        shape = entry["shape"] or [1]
        width = math.prod(shape[1:])
        stop = min(start + size, math.prod(shape))
        if start >= stop:
            return torch.zeros(size)
        with self._named(entry["file"]):
            # Whole rows of the first dimension: what lies between is all that is read.
            tensor = self.files[entry["file"]].get_slice(f"{name}:{key}")
            rows = tensor[start // width : -(-stop // width)] if entry["shape"] else tensor[:]
        rows = rows.flatten()[start % width :][: stop - start]
        return torch.nn.functional.pad(rows, (0, size - len(rows)))


def check_trained(engine: torch.nn.Module, folder: Path) -> "Saved":
    """A saved state, found to be of this engine's model and complete.

    Raises:
        UserError: a file is missing or torn, or another model was trained.
    """
    index = read_json(folder / INDEX)
    here = {name: list(_shape(p)) for name, p in _trained(engine).items()}
    there = {name: entry["shape"] for name, entry in index["parameters"].items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise UserError(
                f"{folder} is a checkpoint of another model: {name} is {there.get(name) or 'not'} there and "
                f"{here.get(name) or 'not'} here (shapes of trained parameters). Start in an empty folder, or go on "
                f"with the model it was made with."
            )
    return Saved(folder, index)


@torch.no_grad()
def load_trained(engine: torch.nn.Module, folder: Path, optimizer_too: bool = True) -> None:
    """Put a saved state into an engine, whatever the numbers of ranks and the ZeRO stages of the two.

    ``folder`` is from `save_trained`; without ``optimizer_too`` weights only.

    Raises:
        UserError: see `check_trained`; nothing has been changed then.
    """
    saved = check_trained(engine, folder)
    index = saved.index
    optimizer, flat = _partitions(engine)
    moments = index["moments"] if optimizer_too else []
    if moments:
        for partition in flat:
            optimizer.state[partition] = empty_state(optimizer.param_groups[0], partition, index)
            if type(optimizer).__name__ == "DeepSpeedCPUAdam":
                # Its kernel takes the number of the step as it is.
                optimizer.state[partition] |= {key: int(value) for key, value in index["scalars"].items()}
        _link_moments(engine)
    if optimizer_too:
        for group, there in zip(optimizer.param_groups, index["groups"], strict=True):
            group.update({k: tuple(v) if isinstance(v, list) else v for k, v in there.items()})
    for number, (name, parameter) in enumerate(_trained(engine).items()):
        in_pieces = is_sharded(parameter) and not getattr(parameter, "ds_persist", False)
        if in_pieces:
            # Each rank reads its own piece, and the weights are whole nowhere.
            size = parameter.ds_tensor.numel()
            place = (size * torch.distributed.get_rank(), size)
            weight = saved.piece(name, WEIGHT, *place)
            parameter.ds_tensor.copy_(weight)
            for key in (None, *moments):
                _put_piece(parameter, weight if key is None else saved.piece(name, key, *place), key)
            continue
        # Each is read by one rank, and the others get it from there.
        weight = _shared(engine, saved, name, WEIGHT, number)
        with whole([parameter]):
            parameter.copy_(weight)
        for key in (None, *moments):
            _put(parameter, weight if key is None else _shared(engine, saved, name, key, number), key)


def _shared(engine: torch.nn.Module, saved: Saved, name: str, key: str, number: int) -> torch.Tensor:
    """A whole tensor of a saved state on this rank's device, read by the rank whose turn ``number`` is."""
    ranks, shape = torch.distributed.get_world_size(), saved.index["parameters"][name]["shape"]
    if torch.distributed.get_rank() == number % ranks:
        value = saved.whole(name, key).view(shape).to(engine.device)
    else:
        value = torch.empty(shape, dtype=torch.float32, device=engine.device)
    if ranks > 1:
        torch.distributed.broadcast(value, number % ranks)
    return value


def empty_state(group: dict[str, Any], partition: torch.Tensor, index: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The optimizer's state of a partition: moments of zeros, and saved scalars where the optimizer reads them.

    A fused or capturable step reads its number on the device; torch moves it there when it loads a state itself, and
    nobody does when it is put in by hand. The others keep it on the host.
    """
    on_device = group.get("fused") or group.get("capturable")
    place = partition.device if on_device else torch.device("cpu")
    scalars = {k: torch.tensor(v, dtype=torch.float32, device=place) for k, v in index["scalars"].items()}
    return {**scalars, **{key: torch.zeros_like(partition) for key in index["moments"]}}


def keep_written(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Bring what was written into trained parameters to their fp32 copies, which the next step writes back."""
    for parameter in parameters:
        if parameter.requires_grad:
            with whole([parameter], write=False):
                value = parameter.detach().float().clone()
            _put(parameter, value, None)


def _put(parameter: torch.nn.Parameter, value: torch.Tensor, key: str | None) -> None:
    """This rank's piece of a whole fp32 weight or moment."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if not is_sharded(parameter):
        arguments = (parameter, value) if key is None else (parameter, value, key)
        (safe_set_full_fp32_param if key is None else safe_set_full_optimizer_state)(*arguments)
        return
    _put_piece(parameter, piece_of(parameter, value), key)


def piece_of(parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """This rank's piece of a whole value, as ZeRO-3 cuts a parameter; the last one's is filled up with zeros."""
    rank, size = torch.distributed.get_rank(), parameter.ds_tensor.numel()
    flat = torch.nn.functional.pad(value.flatten(), (0, size * torch.distributed.get_world_size() - value.numel()))
    return flat[size * rank : size * (rank + 1)]


def _put_piece(parameter: torch.nn.Parameter, piece: torch.Tensor, key: str | None) -> None:
    """A piece of an fp32 weight or moment, where ZeRO-3 keeps this rank's."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    if key is None:
        safe_set_local_fp32_param(parameter, piece)
    else:
        safe_set_local_optimizer_state(parameter, piece, key)


def state_bytes(engine: torch.nn.Module) -> dict[str, int]:
    """Bytes that this rank holds for training: ``master`` (fp32 weights) and ``optimizer`` (its moments)."""
    optimizer, flat = _partitions(engine)
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    size = {"master": flat, "optimizer": tensors}
    return {name: sum(t.numel() * t.element_size() for t in held) for name, held in size.items()}


@contextlib.contextmanager
def portable_checkpoints() -> Iterator[None]:
    """Inside the block DeepSpeed's engines save and load their checkpoints in this module's form.

    For transformers' Trainer, which calls the engine's own methods. It looks for a folder ``global_step*``.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    def save(engine: torch.nn.Module, save_dir: str, **_: Any) -> bool:
        folder = Path(save_dir) / f"global_step{engine.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(engine, folder, torch.distributed.get_rank(), torch.distributed.get_world_size())
        return True

    def load(engine: torch.nn.Module, load_dir: str, load_optimizer_states: bool = True, **_: Any) -> tuple[str, dict]:
        (folder,) = Path(load_dir).glob("global_step*")
        load_trained(engine, folder, load_optimizer_states)
        return str(folder), {}

    theirs = DeepSpeedEngine.save_checkpoint, DeepSpeedEngine.load_checkpoint
    DeepSpeedEngine.save_checkpoint, DeepSpeedEngine.load_checkpoint = save, load
    try:
        yield
    finally:
        DeepSpeedEngine.save_checkpoint, DeepSpeedEngine.load_checkpoint = theirs
