"""Models that score, with the head they were saved with: nothing drawn at random, nothing guessed.

`models.loading.pretrained.load_value_or_reward` draws a head where one is to be *trained*. Who scores needs the head
that was. Other projects keep it under other names; ``head`` names it:

| made by | what the folder has | ``head`` |
|---|---|---|
| transformers, TRL's ``RewardTrainer`` | ``score.weight`` or ``classifier...`` | nothing |
| TRL's ``AutoModelForCausalLMWithValueHead`` | ``v_head.summary.weight`` | ``v_head`` |
| LLaMA-Factory | ``value_head.safetensors`` with ``v_head.summary.weight`` | ``v_head`` |
| OpenRLHF | ``value_head.weight`` (older) or ``score.weight`` | ``value_head`` or nothing |
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.prepared import prepare, score_head
from ppo_vs_dpo.models.loading.pretrained import is_adapter, load_scalar_model, refuse_adapter, revision_of

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
# What a scalar head is called here and there; the last part of the name is weight or bias.
_HEADS = re.compile(
    r"(^|\.)(score|classifier|classification_head|logits_proj|v_head|value_head|reward_head|regression_head)(\.|$)"
)
_OWN = ("score", "classifier", "classification_head", "logits_proj", "sequence_summary")
# Of those that transformers has, the layer whose outputs are the labels.
_LAST = ("score", "classifier", "classifier.out_proj", "classification_head.out_proj", "logits_proj")


# In a folder's config.json: the head to read, where it is not transformers' own.
HEAD_KEY = "score_head"


def load_reward(
    path: str | Path,
    config: ModelConfig | None = None,
    head: str | None = None,
    trainable: bool = False,
    quantization: Any = None,
) -> PreTrainedModel:
    """Load a model that scores sequences, with the head that its folder holds.

    Args:
        path: Hub name or folder, a whole model or an adapter.
        config: how to load it.
        head: the name of a head that other projects made; see the table above. By default what ``score_head`` in the
            folder's ``config.json`` says (`reward_model.train.take_given` writes it).
        trainable: parameters require gradients: a value model that starts as this reward model.
        quantization: as in `models.loading.pretrained.load_policy`.

    Returns:
        A sequence-classification model with one label; its head is the one that was saved.

    Raises:
        UserError: the folder has no head, or another one (names those that it has); more than one label; weights that
            the folder lacks.
    """
    config, path = config or ModelConfig(), str(path)
    _check_labels(path, config)
    head = head or named_head(path, config)
    if is_adapter(path):
        refuse_adapter(path, quantization)
        model, missing = _adapter(path, config)
    else:
        model, missing = _whole(path, config, quantization)
    if head is not None:
        weight, bias = _named_head(path, config, head)
        _put_head(model, path, head, weight, bias)
        missing = [key for key in missing if not _HEADS.search(key)]
    lost = [key for key in missing if _HEADS.search(key)]
    if lost or missing:
        raise UserError(_what_is_missing(path, config, lost, missing))
    _normalise(model, path, config)
    return prepare(model, trainable, quantization)


def check_reward(path: str | Path, config: ModelConfig | None = None, head: str | None = None) -> None:
    """What `load_reward` would refuse, as far as a folder's configuration and the names of its weights tell.

    No weights are read. Of a model on the Hub only the configuration is looked at.

    Raises:
        UserError: more than one label, no head, or none of that name.
    """
    config, path = config or ModelConfig(), str(path)
    _check_labels(path, config)
    if not Path(path).is_dir():
        return
    known = weights_of(path, config)
    head = head or named_head(path, config)
    if head is not None and not _stems(known, head):
        raise UserError(f"{path} has no head {head}. {_heads_there(known)}")
    own = any(key.split(".")[0] in _OWN for key in known)
    if head is None and known and not own and not is_adapter(path):
        raise UserError(_what_is_missing(path, config, ["score.weight"], []))


def named_head(path: str | Path, config: ModelConfig | None = None) -> str | None:
    """What a folder's own ``config.json`` says about its head."""
    return _raw_config(str(path), config or ModelConfig()).get(HEAD_KEY)


def _raw_config(path: str, config: ModelConfig) -> dict[str, Any]:
    """``config.json`` as it stands, without transformers' defaults; ``{}`` where there is none."""
    file = _file(path, config, "config.json")
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _file(path: str, config: ModelConfig, name: str) -> str | None:
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


def _check_labels(path: str, config: ModelConfig) -> None:
    """One label, or one sentence."""
    labels = _raw_config(path, config).get("id2label")
    if isinstance(labels, dict) and len(labels) > 1:
        names = ", ".join(str(label) for label in list(labels.values())[:4])
        more = ", ..." if len(labels) > 4 else ""
        raise UserError(
            f"{path} has {len(labels)} labels ({names}{more}); a reward model has one. A "
            f"classifier's probabilities can be a reward through a Python function (a judge of kind function, "
            f"reward_funcs)."
        )


def _whole(path: str, config: ModelConfig, quantization: Any) -> tuple[PreTrainedModel, list[str]]:
    for key, shape in weights_of(path, config).items():
        if any(key == f"{name}.weight" for name in _LAST) and len(shape) == 2 and shape[0] > 1:
            raise UserError(f"{path} has a head with {shape[0]} labels ({key}); a reward model has one.")
    # What is missing is said by whoever calls this, or is asked for.
    return load_scalar_model(path, config, "a reward model", quantization)


def _adapter(path: str, config: ModelConfig) -> tuple[PreTrainedModel, list[str]]:
    from peft import PeftConfig, PeftModel

    settings = PeftConfig.from_pretrained(path)
    base = settings.base_model_name_or_path
    if settings.task_type != "SEQ_CLS":
        settings.task_type = None  # the adapters of a language model, without what generates
    model, missing = load_scalar_model(base, config, f"the base of the adapter {path}")
    model = PeftModel.from_pretrained(model, path, config=settings).merge_and_unload()
    # Heads that the adapter carries (modules_to_save).
    saved = weights_of(path, config)
    return model, [key for key in missing if not any(name.endswith(key) for name in saved)]


def weights_of(path: str, config: ModelConfig | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a folder or a model of the Hub, without reading them.

    Shapes are ``()`` where the format does not tell them apart from the weights.
    """
    config = config or ModelConfig()
    found: dict[str, tuple[int, ...]] = {}
    for name in _FILES:
        file = _file(path, config, name)
        if file is None:
            continue
        if name.endswith(".safetensors"):
            with safe_open(file, "pt") as content:
                found |= {key: tuple(content.get_slice(key).get_shape()) for key in content.keys()}  # noqa: SIM118
        elif name.endswith(".json"):
            names = json.loads(Path(file).read_text(encoding="utf-8")).get("weight_map", {})
            found |= {key: found.get(key, ()) for key in names}
        else:
            found |= {key: tuple(value.shape) for key, value in _unpickled(file).items()}
    return found


def _unpickled(file: str) -> dict[str, torch.Tensor]:
    """Weights of a ``.bin`` file: tensors alone, no code."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _named_head(path: str, config: ModelConfig, head: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight ``(1, d)`` and bias ``(1,)`` of a head by its name.

    Raises:
        UserError: there is none of that name, or it has more than one output.
    """
    known = weights_of(path, config)
    stems = _stems(known, head)
    if not stems:
        raise UserError(f"{path} has no head {head}. {_heads_there(known)}")
    tensors = {part: _tensor(path, config, f"{stems[0]}.{part}") for part in ("weight", "bias")}
    weight, bias = tensors["weight"], tensors["bias"]
    if weight.dim() != 2 or weight.shape[0] != 1:
        raise UserError(
            f"{path}: the head {stems[0]} has the shape {tuple(weight.shape)}; a reward model's gives one."
        )
    return weight, bias


def _stems(known: dict[str, tuple[int, ...]], head: str) -> list[str]:
    """What a head's weights are called: its name, or TRL's layer inside of it."""
    return [stem for stem in (head, f"{head}.summary") if any(_ends(key, f"{stem}.weight") for key in known)]


def _ends(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _tensor(path: str, config: ModelConfig, name: str) -> torch.Tensor | None:
    """One tensor by the end of its name, ``None`` where no file has it."""
    files = [(item, _file(path, config, item)) for item in _FILES if not item.endswith(".json")]
    for item in _FILES:
        index = _file(path, config, item) if item.endswith(".json") else None
        if index is not None:
            mapping = json.loads(Path(index).read_text(encoding="utf-8")).get("weight_map", {})
            parts = sorted({file for key, file in mapping.items() if _ends(key, name)})
            files += [(part, _file(path, config, part)) for part in parts]
    for item, file in files:
        if file is None:
            continue
        if item.endswith(".safetensors"):
            with safe_open(file, "pt") as content:
                key = next((key for key in content.keys() if _ends(key, name)), None)  # noqa: SIM118
                if key is not None:
                    return content.get_tensor(key)
        else:
            content = _unpickled(file)
            key = next((key for key in content if _ends(key, name)), None)
            if key is not None:
                return content[key]
    return None


def _put_head(model: PreTrainedModel, path: str, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    head = score_head(model)
    if weight.shape[1] != head.in_features:
        raise UserError(
            f"{path}: the head {name} takes {weight.shape[1]} numbers, and the model gives {head.in_features}."
        )
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias = torch.nn.Parameter(bias.reshape(1).to(head.weight))
        elif head.bias is not None:
            head.bias.zero_()


def _normalise(model: PreTrainedModel, path: str, config: ModelConfig) -> None:
    """OpenRLHF's reward models may say the mean and deviation of their scores: (score - mean) / std, in the head."""
    raw = _raw_config(path, config)
    if not (raw.get("normalize_reward") and isinstance(raw.get("std"), int | float) and raw["std"] > 0):
        return
    head, mean, std = score_head(model), float(raw.get("mean", 0.0)), float(raw["std"])
    with torch.no_grad():
        if head.bias is None:
            head.bias = torch.nn.Parameter(head.weight.new_zeros(1))
        head.weight.div_(std)
        head.bias.sub_(mean).div_(std)


def _what_is_missing(path: str, config: ModelConfig, lost: list[str], missing: list[str]) -> str:
    if not lost:
        return (
            f"{path} lacks {len(missing)} weights of the model that its config.json describes ({missing[0]}, ...): "
            f"they would be random, and so would its scores."
        )
    known = weights_of(path, config)
    kind = " It is a causal language model." if any(_ends(key, "lm_head.weight") for key in known) else ""
    return (
        f"{path} has no head to score with ({', '.join(lost[:2])} would be random).{kind} {_heads_there(known)} A "
        f"head is drawn only where it is trained."
    )


def _heads_there(known: dict[str, tuple[int, ...]]) -> str:
    """What a folder has instead, and how to say it."""
    heads = [key for key in known if _HEADS.search(key) and key.endswith("weight")]
    for key in heads:
        for name, makers in (("v_head", "TRL and LLaMA-Factory"), ("value_head", "OpenRLHF")):
            if name in key.split("."):
                return f"It has {key}, as {makers} write it: say head: {name}."
    return f"It has {', '.join(heads[:3])}." if heads else "It has no other head either."
