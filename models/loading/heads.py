"""Models that score, with the head they were saved with: nothing drawn at random, nothing guessed.

`models.loading.pretrained.load_value_or_reward` draws a head where one is to be *trained*. Who scores needs the head
that was. Other projects keep it under other names; ``head`` names it:

| made by | what the folder has | ``head`` |
|---|---|---|
| transformers, TRL's ``RewardTrainer`` | ``score.weight`` or ``classifier...`` | nothing |
| TRL's ``AutoModelForCausalLMWithValueHead`` | ``v_head.summary.weight`` | ``v_head`` |
| LLaMA-Factory | ``value_head.safetensors`` with ``v_head.summary.weight`` | ``v_head`` |
| OpenRLHF | ``value_head.weight`` (older) or ``score.weight`` | ``value_head`` or nothing |
| Huang et al. 2024 (N+) | ``scalar_head.weight``, ``lm_backbone...``, ``base_config`` and ``bias`` | nothing |
"""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.adapters import merge, virtual_tokens
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.files import (
    BIAS_KEY,
    FOREIGN_KEY,
    HEAD_KEY,
    check_unwrapped,
    copy_marks,
    ends,
    raw_config,
    restore_bias,
    tensor_of,
    weights_of,
    wrapped,
)
from ppo_vs_dpo.models.loading.prepared import prepare, score_head
from ppo_vs_dpo.models.loading.pretrained import is_adapter, load_scalar_model, refuse_adapter
from ppo_vs_dpo.models.sharding.deepspeed import unsharded_loading, whole

# What a scalar head is called here and there; the last part of the name is weight or bias.
_HEADS = re.compile(
    r"(^|\.)(score|classifier|classification_head|logits_proj|v_head|value_head|scalar_head|reward_head|regression_head)(\.|$)"
)
_OWN = ("score", "classifier", "classification_head", "logits_proj", "sequence_summary")
# Of those that transformers has, the layer whose outputs are the labels.
_LAST = ("score", "classifier", "classifier.out_proj", "classification_head.out_proj", "logits_proj")


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
        with unsharded_loading():  # to be merged it must be whole
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
    copy_marks(model, path, config)
    if head is None:
        restore_bias(model, path, config)
    else:
        _read_at_the_end(model)
    _normalise(model, path, config)
    return prepare(model, trainable, quantization)


def _read_at_the_end(model: PreTrainedModel) -> None:
    """A head that was named is read at the last real token by those who make such: the mark of our own, for whoever
    gets the model as an object or saves it (its head is then transformers' own)."""
    marks = vars(model.config)
    marks.setdefault(BIAS_KEY, 0.0)
    for key in (FOREIGN_KEY, HEAD_KEY):
        marks.pop(key, None)


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
    check_unwrapped(path, known)
    head = head or named_head(path, config)
    if head is not None and not _stems(known, head):
        raise UserError(f"{path} has no head {head}. {_heads_there(known)}")
    own = any(key.split(".")[0] in _OWN for key in known)
    if head is None and known and not own and not is_adapter(path):
        raise UserError(_what_is_missing(path, config, ["score.weight"], []))


def named_head(path: str | Path, config: ModelConfig | None = None) -> str | None:
    """What a folder's own ``config.json`` says about its head."""
    path, config = str(path), config or ModelConfig()
    return raw_config(path, config).get(HEAD_KEY) or ("scalar_head" if wrapped(path, config) else None)


def _check_labels(path: str, config: ModelConfig) -> None:
    """One label, or one sentence."""
    labels = raw_config(path, config).get("id2label")
    if isinstance(labels, dict) and len(labels) > 1:
        names = ", ".join(str(label) for label in list(labels.values())[:4])
        more = ", ..." if len(labels) > 4 else ""
        raise UserError(
            f"{path} has {len(labels)} labels ({names}{more}); a reward model has one. A "
            f"classifier's probabilities can be a reward through a Python function (a judge of kind function, "
            f"reward_funcs)."
        )


def _whole(path: str, config: ModelConfig, quantization: Any) -> tuple[PreTrainedModel, list[str]]:
    known = weights_of(path, config)
    check_unwrapped(path, known)
    for key, shape in known.items():
        if any(key == f"{name}.weight" for name in _LAST) and len(shape) == 2 and shape[0] > 1:
            raise UserError(f"{path} has a head with {shape[0]} labels ({key}); a reward model has one.")
    # What is missing is said by whoever calls this, or is asked for.
    return load_scalar_model(path, config, "a reward model", quantization)


def _adapter(path: str, config: ModelConfig) -> tuple[PreTrainedModel, list[str]]:
    from peft import PeftConfig, PeftModel

    settings = PeftConfig.from_pretrained(path)
    base = settings.base_model_name_or_path
    if settings.is_prompt_learning:
        raise virtual_tokens(f"{path}: its adapter", settings)
    if settings.task_type != "SEQ_CLS":
        settings.task_type = None  # the adapters of a language model, without what generates
    model, missing = load_scalar_model(base, config, f"the base of the adapter {path}")
    model = merge(PeftModel.from_pretrained(model, path, config=settings), path)
    # Heads that the adapter carries (modules_to_save).
    saved = weights_of(path, config)
    return model, [key for key in missing if not any(name.endswith(key) for name in saved)]


def _named_head(path: str, config: ModelConfig, head: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight ``(1, d)`` and bias ``(1,)`` of a head by its name.

    Raises:
        UserError: there is none of that name, or it has more than one output.
    """
    known = weights_of(path, config)
    stems = _stems(known, head)
    if not stems:
        raise UserError(f"{path} has no head {head}. {_heads_there(known)}")
    tensors = {part: tensor_of(path, config, f"{stems[0]}.{part}") for part in ("weight", "bias")}
    weight, bias = tensors["weight"], tensors["bias"]
    if weight.dim() != 2 or weight.shape[0] != 1:
        raise UserError(
            f"{path}: the head {stems[0]} has the shape {tuple(weight.shape)}; a reward model's gives one."
        )
    return weight, bias


def _stems(known: dict[str, tuple[int, ...]], head: str) -> list[str]:
    """What a head's weights are called: its name, or TRL's layer inside of it."""
    return [stem for stem in (head, f"{head}.summary") if any(ends(key, f"{stem}.weight") for key in known)]


def _put_head(model: PreTrainedModel, path: str, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    head = score_head(model)
    if weight.shape[1] != head.in_features:
        raise UserError(
            f"{path}: the head {name} takes {weight.shape[1]} numbers, and the model gives {head.in_features}."
        )
    with torch.no_grad(), whole(head.parameters()):
        head.weight.copy_(weight)
        if bias is not None:
            head.bias = torch.nn.Parameter(bias.reshape(1).to(head.weight))
        elif head.bias is not None:
            head.bias.zero_()


def _normalise(model: PreTrainedModel, path: str, config: ModelConfig) -> None:
    """(score - mean) / std, in the head, where a folder says so: OpenRLHF's reward models may give both, those of
    Huang et al. 2024 the mean of the reference summaries' scores as ``bias`` (detail 15)."""
    raw = raw_config(path, config)
    if wrapped(path, config) and isinstance(raw.get("bias"), int | float):
        mean, std = float(raw["bias"]), 1.0
    elif raw.get("normalize_reward") and isinstance(raw.get("std"), int | float) and raw["std"] > 0:
        mean, std = float(raw.get("mean", 0.0)), float(raw["std"])
    else:
        return
    head = score_head(model)
    with torch.no_grad(), whole(head.parameters()):
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
    kind = " It is a causal language model." if any(ends(key, "lm_head.weight") for key in known) else ""
    return (
        f"{path} has no head to score with ({', '.join(lost[:2])} would be random).{kind} {_heads_there(known)} A "
        f"head is drawn only where it is trained."
    )


def _heads_there(known: dict[str, tuple[int, ...]]) -> str:
    """What a folder has instead, and how to say it."""
    heads = [key for key in known if _HEADS.search(key) and key.endswith("weight")]
    for key in heads:
        for name, makers in (("v_head", "TRL and LLaMA-Factory"), ("value_head", "OpenRLHF")):
            if name in key.split(".") and key.removesuffix(".weight").removesuffix(".summary").endswith(name):
                return f"It has {key}, as {makers} write it: say head: {name}."
    # A head that nobody here knows: one output, and no name that a transformer has.
    odd = [key for key, shape in known.items() if len(shape) == 2 and shape[0] == 1 and key.endswith("weight")]
    found = heads or odd
    if not found:
        return "It has no other head either."
    stem = found[0].removesuffix(".weight").removesuffix(".summary")
    one = known[found[0]][:1] in ((1,), ())
    return f"It has {', '.join(found[:3])}{f': if that is it, say head: {stem}' if one else ''}."
