"""The exact state of a run, in files without pickle: tensors as safetensors, everything else as JSON.

A checkpoint is written into a temporary folder and renamed when it is complete, so that a kill at any moment leaves
the previous one valid and no half one.
"""

import contextlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, write_json
from ppo_vs_dpo.artifacts.guards.refusals import explain
from ppo_vs_dpo.models.sharding.collectives import barrier

STATE = "ppo_state"


def save_state(folder: Path, name: str, state: Any) -> None:
    """Write nested dicts, lists, numbers, strings and tensors as ``<name>.json`` and ``<name>.safetensors``."""
    tensors: dict[str, torch.Tensor] = {}
    write_json(folder / f"{name}.json", _detach(state, tensors))
    # Clones: safetensors refuses tensors that share memory.
    save_file(
        {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()},
        folder / f"{name}.safetensors",
    )


def load_state(folder: Path, name: str) -> Any:
    """Read what `save_state` wrote.

    Raises:
        UserError: a file is missing or torn.
    """
    try:
        tensors = load_file(folder / f"{name}.safetensors")
    except Exception as error:
        raise UserError(
            f"{folder} is not a complete checkpoint of ppo ({name}.safetensors: {error}). Delete this folder: the run "
            f"then goes on from the one before."
        ) from error
    return _attach(read_json(folder / f"{name}.json"), tensors)


def _detach(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, dict):
        # A list of pairs: JSON would turn the optimizer's integer keys into strings.
        return {"dict": [[key, _detach(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_detach(item, tensors) for item in value]}
    if isinstance(value, list):
        return {"list": [_detach(item, tensors) for item in value]}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _attach(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _attach(item, tensors) for key, item in content}
    items = [_attach(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def rng_state() -> dict[str, Any]:
    """The states of all random number generators of this rank."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "python": [version, torch.tensor(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue the generators of this rank."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.random.set_rng_state(state["cuda"])


class RandomStreams:
    """The random number generators of this rank, as something that a checkpoint can hold.

    Prompts, samples and minibatches do not draw from them: they depend on the seed and the update alone.
    """

    def state_dict(self) -> dict[str, Any]:
        """See `rng_state`."""
        return rng_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `set_rng_state`."""
        set_rng_state(state)


@contextlib.contextmanager
def complete_folder(path: Path, is_main: bool) -> Iterator[Path]:
    """A temporary folder that all ranks write into, renamed to ``path`` when all have finished.

    Raises:
        UserError: a file cannot be written (the disk is full); what was there before stays as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    try:
        yield temporary
    except (OSError, SafetensorError) as error:
        # What is half written would only fill the disk further.
        shutil.rmtree(temporary, ignore_errors=True)
        reason = explain(error) or f"{error}. Mend that and start the same command again."
        raise UserError(f"could not write {path}: {reason} The checkpoint before it is complete.") from error
    barrier()
    if is_main:
        # A checkpoint of the same step is from before a resume, and equal.
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    barrier()


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint in a folder, or ``None``."""
    found = [p for p in Path(folder).glob("checkpoint-*") if (p / f"{STATE}.json").is_file() and p.name[11:].isdigit()]
    return str(max(found, key=lambda p: int(p.name[11:]))) if found else None
