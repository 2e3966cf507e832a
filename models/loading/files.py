"""What a folder or a model of the Hub holds, without loading it: configuration, names and shapes of weights."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.sharding.deepspeed import is_sharded

# What a folder's config.json may say of a scalar model, beside what transformers knows: the bias of its scores (this
# project trained it), that others trained it all the same, and the name of its head where others named it.
BIAS_KEY, FOREIGN_KEY, HEAD_KEY = "score_bias", "trained_elsewhere", "score_head"

# Files that hold weights, the small ones with a head alone first.
_FILES = (
    "value_head.safetensors",
    "value_head.bin",
    "adapter_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def revision_of(path: str, config: ModelConfig) -> str | None:
    """The revision belongs to the configured model; later stages load folders, which have none."""
    return config.revision if path == config.path else None


def raw_config(path: str, config: ModelConfig) -> dict[str, Any]:
    """``config.json`` as it stands, without transformers' defaults; ``{}`` where there is none."""
    file = file_of(path, config, "config.json")
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def wrapped(path: str, config: ModelConfig) -> tuple[PretrainedConfig, dict[str, str]] | None:
    """Where a class of its own wraps the model, as Huang et al. 2024 released their reward models (a ``ScalarModel``:
    ``base_config``, weights ``lm_backbone...``, a ``scalar_head``): the model inside, and what its weights are called.

    Returns:
        The configuration of a sequence-classification model with one label, and patterns of the folder's names with
        what they are there; ``None`` for all other models.
    """
    inner = raw_config(path, config).get("base_config")
    if not isinstance(inner, dict) or inner.get("model_type") not in CONFIG_MAPPING:
        return None
    settings = CONFIG_MAPPING[inner["model_type"]].from_dict({**inner, "num_labels": 1})
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(settings), None)
    return None if kind is None else (settings, {r"^lm_backbone\.": f"{kind.base_model_prefix}."})


def check_local(path: str, what: str) -> None:
    """A path that looks local and is not there is the user's slip, not a question for the Hub."""
    local = Path(path)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not local.exists():
        raise UserError(f"model folder {path} does not exist (model.path). Give a folder or a name on the Hub.")
    needed = ("tokenizer_config.json",) if what == "a tokenizer" else ("config.json", "adapter_config.json")
    if local.is_dir() and not any((local / name).exists() for name in needed):
        found = ", ".join(sorted(item.name for item in local.iterdir())[:6]) or "nothing"
        raise UserError(f"{path} does not hold {what}: it has no {needed[0]} (found: {found}).")


def of_another_kind(path: str, kwargs: dict[str, Any]) -> str:
    """What a folder's model is, where it is not of the class that was asked for."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=kwargs.get("trust_remote_code", False))
    kind = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "a model"
    return f"it is {kind} of the type {config.model_type}, which transformers does not know as such."


# What stands before every name in the state of a model that was saved from inside of a wrapper -> the wrapper.
_WRAPPERS = {
    "module.": "DistributedDataParallel (or DataParallel)",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
}


def check_unwrapped(path: str, names: Iterable[str]) -> None:
    """The weights must be those of a model, not of what was around it in training.

    Args:
        path: from where.
        names: of all weights there.

    Raises:
        UserError: every name begins with a wrapper's.
    """
    names = list(names)
    for prefix, wrapper in _WRAPPERS.items():
        if names and all(name.startswith(prefix) for name in names):
            raise UserError(
                f"{path}: the name of every weight begins with {prefix}: it was saved from inside of {wrapper}, and "
                f"no model has such names. Save the model itself (accelerator.unwrap_model(model).save_pretrained, or "
                f"the Trainer's save_model), or take {prefix} off the names in its weights."
            )


def check_complete(model: PreTrainedModel, path: str, missing: Iterable[str]) -> None:
    """A loaded model must be the one that its folder holds: no weight drawn at random.

    Args:
        missing: the names of weights that ``from_pretrained(output_loading_info=True)`` did not find.

    Raises:
        UserError: there are any.
    """
    missing = sorted(missing)
    if missing:
        check_unwrapped(path, weights_of(path))
        head = model.get_output_embeddings()
        names = {name for name, module in model.named_modules() if head is not None and module is head}
        only = all(key.rpartition(".")[0] in names for key in missing)
        kind = " Is it a reward model, or a backbone alone?" if only else ""
        raise UserError(
            f"{path} lacks {len(missing)} weights of the model that its config.json describes "
            f"({', '.join(missing[:2])}): they would be random, and so would what it answers.{kind} (Where they are "
            f"tied, config.json must say so: tie_word_embeddings.)"
        )


def check_layers(model: PreTrainedModel, path: str, unexpected: Iterable[str]) -> None:
    """No layer of a folder may be left out: one with a number that the configuration does not count up to.

    Other weights that a model has no place for (a value head, an encoder of images) are not its own.

    Raises:
        UserError: one is.
    """
    own = {_unnumbered(key) for key in model.state_dict()}
    if is_sharded(next(model.parameters())):  # transformers does not say so of what ZeRO-3 splits
        unexpected = set(weights_of(path)) - set(model.state_dict())
    over = sorted(key for key in unexpected if re.search(r"\.\d+\.", key) and _unnumbered(key) in own)
    if over:
        raise UserError(
            f"{path} has {len(over)} weights that the model of its config.json has no place for ({over[0]}, ...): "
            f"the configuration describes a smaller model than the one that was saved."
        )


def _unnumbered(key: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", key)


def unreadable(path: str, error: Exception) -> UserError:
    """The refusal of weights that are no safetensors file."""
    return UserError(f"the weights in {path} cannot be read ({error}): a download that broke off? Get them again.")


def copy_marks(model: PreTrainedModel, path: str, config: ModelConfig) -> None:
    """What a folder says of a scalar model, into the model's own configuration: an adapter's is not a part of it."""
    found = raw_config(path, config)
    for key in (BIAS_KEY, FOREIGN_KEY):
        if key in found:
            setattr(model.config, key, found[key])


def restore_bias(model: PreTrainedModel, path: str, config: ModelConfig) -> PreTrainedModel:
    """The saved bias of a scalar head whose class has none: transformers would drop it, and with it a part of V or r.

    Returns:
        ``model``.
    """
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, torch.nn.Linear) and head.bias is None:
            saved = tensor_of(path, config, f"{name}.bias")
            if saved is not None and saved.numel() == head.out_features:
                head.bias = torch.nn.Parameter(saved.reshape(-1).to(head.weight))
    return model


def file_of(path: str, config: ModelConfig, name: str) -> str | None:
    """A file of a folder or of the Hub, ``None`` where it is not there."""
    local = Path(path)
    if local.is_dir():
        return str(local / name) if (local / name).is_file() else None
    try:
        return cached_file(
            path,
            name,
            revision=revision_of(path, config),
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no folder and no name that the Hub can have: whoever loads it says so
        return None


def weights_of(path: str, config: ModelConfig | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a folder or a model of the Hub, without reading them.

    Shapes are ``()`` where the format does not tell them apart from the weights.
    """
    config = config or ModelConfig()
    found: dict[str, tuple[int, ...]] = {}
    for name in _FILES:
        file = file_of(path, config, name)
        if file is None:
            continue
        if name.endswith(".safetensors"):
            try:
                with safe_open(file, "pt") as content:
                    found |= {key: tuple(content.get_slice(key).get_shape()) for key in content.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise unreadable(path, error) from error
        elif name.endswith(".json"):
            found |= {key: found.get(key, ()) for key in weight_map(file)}
        else:
            found |= {key: tuple(value.shape) for key, value in _unpickled(file).items()}
    return found


def weight_map(index: str | Path) -> dict[str, str]:
    """Which file each weight is in, as an index (``model.safetensors.index.json``) says.

    Raises:
        UserError: it is none.
    """
    content = read_json(index)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{index}: no index of weights (it has no weight_map).")
    return found


def tensor_of(path: str, config: ModelConfig, name: str) -> torch.Tensor | None:
    """One tensor by the end of its name, ``None`` where no file has it."""
    files = [(item, file_of(path, config, item)) for item in _FILES if not item.endswith(".json")]
    for item in _FILES:
        index = file_of(path, config, item) if item.endswith(".json") else None
        if index is not None:
            mapping = weight_map(index)
            parts = sorted({file for key, file in mapping.items() if ends(key, name)})
            files += [(part, file_of(path, config, part)) for part in parts]
    for item, file in files:
        if file is None:
            continue
        if item.endswith(".safetensors"):
            with safe_open(file, "pt") as content:
                key = next((key for key in content.keys() if ends(key, name)), None)  # noqa: SIM118
                if key is not None:
                    return content.get_tensor(key)
        else:
            content = _unpickled(file)
            key = next((key for key in content if ends(key, name)), None)
            if key is not None:
                return content[key]
    return None


def ends(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _unpickled(file: str) -> dict[str, torch.Tensor]:
    """Weights of a ``.bin`` file: tensors alone, no code."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
