"""Adapters (PEFT): which kinds can be carried here, and how they are merged into their base.

Adapters that are sums of weights (LoRA and its kin) merge. Virtual tokens (prompt tuning, prefix tuning) do not: they
are further positions of every sequence, and every pass here counts positions.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.files import raw_config, weights_of


def is_peft(model: torch.nn.Module) -> bool:
    """Whether a model carries PEFT adapters."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def kind_of(settings: Any) -> str:
    """PEFT's name for a kind of adapter, as ``LORA``."""
    return str(getattr(settings.peft_type, "value", settings.peft_type))


def check_adapters(model: torch.nn.Module, what: str) -> None:
    """A model's adapters must be held by PEFT, be switched on, and add no positions.

    Raises:
        UserError: they are not; names how.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{what} has adapters that transformers holds (add_adapter, or a folder with an adapter loaded by an "
            f"AutoModel): they could neither be switched off for the reference nor copied. Load the model with PEFT "
            f"instead (peft.AutoPeftModelForCausalLM, get_peft_model), or give the adapter's folder by name."
        )
    if not is_peft(model):
        return
    for name, settings in model.peft_config.items():
        if settings.is_prompt_learning:
            raise virtual_tokens(f"{what}: adapter {name}", settings)
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(layer.disable_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer)):
        raise UserError(
            f"{what} has adapters that are switched off (disable_adapter_layers): nothing of them would be trained or "
            f"read. Switch them on (enable_adapter_layers), or unload them (model.unload())."
        )


def virtual_tokens(what: str, settings: Any) -> UserError:
    """The refusal of adapters that are further positions of every sequence."""
    return UserError(
        f"{what} is {kind_of(settings)}: virtual tokens before every sequence, which log-probabilities, values and "
        f"scores here would not see. Use adapters of weights (LoRA, DoRA, VeRA, IA3 ...)."
    )


def train_active(policy: torch.nn.Module) -> None:
    """Let a PEFT model's active adapters train where they were loaded for reading (``is_trainable=False``)."""
    if is_peft(policy) and not any(parameter.requires_grad for parameter in policy.parameters()):
        policy.set_adapter(policy.active_adapter)


def base_that_trains(model: torch.nn.Module) -> list[str]:
    """Names of trained parameters that are not the adapters': switching adapters off leaves them as they are.

    PEFT keeps what it can switch under the adapter's name; ``bias="all"`` trains the base's own biases.
    """
    adapters = {*getattr(model, "peft_config", {})}
    return [name for name, p in model.named_parameters() if p.requires_grad and not adapters & {*name.split(".")}]


def merge(model: torch.nn.Module, what: str = "the model", names: list[str] | None = None) -> PreTrainedModel:
    """The base of a PEFT model with its adapters added in; ``model`` is used up.

    Where the output layer is the embedding (tied) and one of them has an adapter, they are two afterwards: added into
    the one tensor the adapter would act on both, which is not the model that was trained.

    ``names``: of the adapters; those that are active by default.

    Raises:
        UserError: adapters that are no sum of weights; names their kind.
    """
    settings = next(iter(model.peft_config.values()))
    if settings.is_prompt_learning:
        raise virtual_tokens(f"{what}: its adapter", settings)
    if not callable(getattr(model.base_model, "merge_and_unload", None)):
        raise UserError(f"{what}: adapters of kind {kind_of(settings)} cannot be merged into their base.")
    _part(model.get_base_model())
    merged = model.merge_and_unload(**({} if names is None else {"adapter_names": names}))
    _rejoin(merged)
    return merged


def _ends(model: PreTrainedModel) -> tuple[torch.nn.Module | None, torch.nn.Module | None]:
    """The embedding and the output layer, or what PEFT has put around them."""
    outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return model.get_input_embeddings(), outputs


def check_base(model: torch.nn.Module, path: str, config: ModelConfig) -> torch.nn.Module:
    """What loading an adapter draws at random without a word: embeddings of tokens that its base lacks, and an output
    layer where the base is a backbone or a reward model.

    Returns:
        ``model``.

    Raises:
        UserError: something was drawn.
    """
    base = str(next(iter(model.peft_config.values())).base_model_name_or_path)
    known, saved, inner = weights_of(base, config), weights_of(path, config), model.get_base_model()
    inputs, outputs = _ends(inner)
    names = {id(module): name.rpartition(".")[2] for name, module in inner.named_modules()}
    size, before = getattr(inputs, "num_embeddings", None), raw_config(base, config).get("vocab_size")
    if size and before and size > before and not any(names[id(inputs)] in key for key in saved):
        raise UserError(
            f"the adapter {path} comes with a tokenizer of {size} tokens, its base {base} has {before}, and the "
            f"adapter does not hold the new ones' embeddings: they would be random. Save it with them "
            f"(save_embedding_layers=True, or modules_to_save), or give the base that it was trained on."
        )
    tied = any(getattr(c, "tie_word_embeddings", False) for c in (inner.config, inner.config.get_text_config()))
    head = None if outputs is None or tied else names[id(outputs)]
    if head and known and not any(head in key.split(".") for key in (*known, *saved)):
        raise UserError(f"{base}, the base of the adapter {path}, lacks {head}: it would be random. Is it a backbone?")
    return model


def _tied_and_adapted(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The two layers that hold one tensor, where an adapter sits on one of them; else none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = _ends(model)
    if None in ends or not any(isinstance(end, BaseTunerLayer) for end in ends):
        return []
    inner = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    return inner if getattr(inner[0], "weight", None) is getattr(inner[1], "weight", False) else []


def adapts_tied(model: torch.nn.Module) -> bool:
    """Whether an adapter sits on an embedding that is the output layer, too (or on that)."""
    return is_peft(model) and bool(_tied_and_adapted(model.get_base_model()))


def _part(model: PreTrainedModel) -> None:
    for layer in _tied_and_adapted(model)[1:]:
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)


def _rejoin(model: PreTrainedModel) -> None:
    """One tensor again where both are equal; else the configuration says that they are two."""
    inputs, outputs = _ends(model)
    parts = {id(one): one for one in (model.config, model.config.get_text_config())}.values()
    if outputs is None or not any(getattr(one, "tie_word_embeddings", False) for one in parts):
        return
    if inputs.weight is outputs.weight:
        return
    if inputs.weight.shape == outputs.weight.shape and torch.equal(inputs.weight, outputs.weight):
        outputs.weight = inputs.weight
        return
    for one in parts:
        one.tie_word_embeddings = False
