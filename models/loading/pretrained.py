"""Loading tokenizers, policies, and reward or value models from the Hub, a folder, or an architecture."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ppo_vs_dpo.artifacts.errors import UserError, first_sentence, not_the_file
from ppo_vs_dpo.artifacts.resources import part
from ppo_vs_dpo.models.loading.adapters import check_base, merge
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.files import (
    check_complete,
    check_layers,
    check_local,
    copy_marks,
    of_another_kind,
    restore_bias,
    revision_of,
    unreadable,
    wrapped,
)
from ppo_vs_dpo.models.loading.prepared import prepare, score_head
from ppo_vs_dpo.models.sharding.deepspeed import unsharded_loading, whole


def _load(loader: Any, path: str, what: str, **kwargs: Any) -> Any:
    check_local(path, what)
    try:
        if kwargs.get("trust_remote_code") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            fetch_code(path, kwargs.get("revision"))
        return loader(path, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        first = first_sentence(error)
        advice = "Check the name, log in for a gated model (`hf auth login`), or give a local folder in model.path."
        if "custom code" in first:
            advice = "It runs only if you ask for it: read it, and set model.trust_remote_code=true."
        elif isinstance(error, ImportError):
            advice = "Install what it needs, or take the model in another form."
        elif "Unrecognized configuration class" in first:
            first, advice = of_another_kind(path, kwargs), f"Give {what}."
        raise UserError(f"could not load {what} from {path}: {first} {advice}") from error
    except SafetensorError as error:
        raise unreadable(path, error) from error
    except RuntimeError as error:
        if not_the_file(error):
            raise
        # What torch says about weights of other shapes: the first lines name them.
        lines = [line.strip() for line in str(error).strip().splitlines()]
        raise UserError(
            f"could not load {what} from {path}: {' '.join(lines[:2])} The weights do not fit its configuration (an "
            f"adapter of another base or vocabulary, a changed config.json)."
        ) from error


def fetch_code(path: str, revision: str | None = None) -> None:
    """Put the code that comes with a model where transformers imports it from, one process of a machine at a time.

    transformers writes these files without a lock: of several ranks that load at once one may import half a file.
    Afterwards they are there, and nobody writes them again.
    """
    from filelock import FileLock
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.utils import HF_MODULES_CACHE

    Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(HF_MODULES_CACHE) / ".ppo_vs_dpo.lock"):
        config, _ = PretrainedConfig.get_config_dict(path, revision=revision)
        for reference in (config.get("auto_map") or {}).values():
            for name in reference if isinstance(reference, list | tuple) else [reference]:
                if name:
                    get_class_from_dynamic_module(name, path, revision=revision)


def _kwargs(config: ModelConfig, quantization: Any = None) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "dtype": config.dtype}
    if config.attn_implementation:
        kwargs["attn_implementation"] = config.attn_implementation
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    return kwargs


@part("loading")
def load_tokenizer(
    path: str | Path, config: ModelConfig | None = None, writes: bool = True
) -> PreTrainedTokenizerBase:
    """Load a tokenizer and make sure that it can pad.

    Example::

        from ppo_vs_dpo import load_tokenizer

        tokenizer = load_tokenizer("my_model")
        batch = tokenizer(["the film", "a much longer story"], padding=True)
        print(tokenizer.pad_token, batch["attention_mask"])

    Where it has no padding token, or pads with the end-of-sequence token, an existing special token takes the
    place if there is one (the vocabulary, and with it every model, stays as it is); else padding stays the
    end-of-sequence token. Both are safe here: masks, never ids, decide what is real.

    Args:
        writes: its model writes responses, which must be able to end; encoders that only score need no such token.

    Raises:
        UserError: not found, or it has no end-of-sequence token.
    """
    config = config or ModelConfig()
    path = str(path)
    tokenizer = _load(
        AutoTokenizer.from_pretrained,
        path,
        "a tokenizer",
        revision=revision_of(path, config),
        trust_remote_code=config.trust_remote_code,
    )
    let_pad(tokenizer, f"the tokenizer of {path}", writes)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = spare_special_token(tokenizer) or tokenizer.eos_token
    tokenizer.padding_side = "right"
    if config.chat_template:
        template = Path(config.chat_template)
        is_file = "{" not in config.chat_template
        if is_file and not template.is_file():
            raise UserError(f"model.chat_template: {template} is neither a template nor a file.")
        tokenizer.chat_template = template.read_text(encoding="utf-8") if is_file else config.chat_template
    return tokenizer


def let_pad(tokenizer: PreTrainedTokenizerBase, what: str, writes: bool = True) -> None:
    """Give a tokenizer without a padding token a spare special one, or its end-of-sequence token.

    ``writes``: its model writes responses, which must end.

    Raises:
        UserError: it has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None and writes:
        raise UserError(
            f"{what} has no end-of-sequence token: a response could never end. Set tokenizer.eos_token to the token "
            f"that the policy ends its responses with."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = spare_special_token(tokenizer) or tokenizer.eos_token


def spare_special_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A special token that is neither end nor beginning of anything and can serve as padding, or ``None``."""
    ends = {tokenizer.eos_token, tokenizer.bos_token}
    named = [token for token in tokenizer.all_special_tokens if token not in ends]
    likely = [token for token in named if "pad" in token.lower() or token in ("<unk>", "<|endoftext|>")]
    if likely:
        return likely[0]
    return tokenizer.unk_token if tokenizer.unk_token not in ends else None


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: the tokenizer's and those of the generation config, sorted."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    configured = ids if isinstance(ids, list) else [ids]
    return sorted({tokenizer.eos_token_id, *(i for i in configured if i is not None)})


@part("loading")
def build_policy(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A causal language model from ``config.architecture``, its weights drawn from torch's current seed.

    Raises:
        UserError: no ``model_type``, or an argument that the architecture does not have.
    """
    architecture = dict(config.architecture)
    model_type = architecture.pop("model_type", None)
    if model_type is None:
        raise UserError("model.path is not set and model.architecture has no model_type: there is no model to train.")
    try:
        model_config = AutoConfig.for_model(
            model_type,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **architecture,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"model.architecture: {error}") from error
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter instead of a whole model."""
    return (Path(path) / "adapter_config.json").is_file()


@part("loading")
def load_policy(
    path: str | Path,
    config: ModelConfig | None = None,
    trainable: bool = False,
    quantization: Any = None,
) -> PreTrainedModel:
    """Load a causal language model; an adapter folder is loaded onto its base and merged into it.

    Example::

        from ppo_vs_dpo import load_policy, load_tokenizer

        policy = load_policy("my_model")  # a folder, an adapter's folder, or a name on the Hub
        tokenizer = load_tokenizer("my_model")
        policy.save_pretrained("copy")
        tokenizer.save_pretrained("copy")

    Args:
        path: Hub name or folder (whole model or PEFT adapter).
        trainable: parameters require gradients. Dropout is off in either case.
        quantization: a transformers quantisation config (`models.loading.quantized`); the weights are then frozen.

    Raises:
        UserError: not found, weights that the folder lacks or the model has no place for, or an adapter on a base
            that is to be quantised.
    """
    config, path = config or ModelConfig(), str(path)
    if is_adapter(path):
        refuse_adapter(path, quantization)
        from peft import AutoPeftModelForCausalLM

        with unsharded_loading():  # to be merged it must be whole
            model = _load(AutoPeftModelForCausalLM.from_pretrained, path, "an adapter", **_kwargs(config))
            model = merge(check_base(model, path, config), path)
    else:
        model, report = _load(
            AutoModelForCausalLM.from_pretrained,
            path,
            "a causal language model",
            revision=revision_of(path, config),
            output_loading_info=True,
            **_kwargs(config, quantization),
        )
        check_complete(model, path, report["missing_keys"])
        check_layers(model, path, report["unexpected_keys"])
    return prepare(model, trainable, quantization)


def load_sampler(
    path: str | Path, config: ModelConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]]:
    """A policy on the accelerator where there is one, its tokenizer, and the tokens that end its completions."""
    model, tokenizer = load_policy(path, config), load_tokenizer(path, config)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model, tokenizer, eos_token_ids(model, tokenizer)


@part("loading")
def load_value_or_reward(
    path: str | Path,
    config: ModelConfig | None = None,
    trainable: bool = False,
    quantization: Any = None,
) -> PreTrainedModel:
    """Load a model with a scalar head (``AutoModelForSequenceClassification``, one label).

    Example::

        from ppo_vs_dpo import load_tokenizer, load_value_or_reward

        model, tokenizer = load_value_or_reward("my_reward_model"), load_tokenizer("my_reward_model")
        ids = tokenizer("the film was good", return_tensors="pt")["input_ids"]
        print(model(ids).logits.shape)  # (1, 1); RewardScorer reads scores of texts

    From a causal language model's folder the backbone is taken and the head is new: its weights are drawn from
    N(0, 1/sqrt(d+1)) (Huang et al. 2024, detail 11), so seed torch first. An adapter folder is merged into its base.
    The arguments are those of `load_policy`.
    """
    config = config or ModelConfig()
    path = str(path)
    if is_adapter(path):
        refuse_adapter(path, quantization)
        from peft import AutoPeftModelForSequenceClassification

        with unsharded_loading():
            loader = AutoPeftModelForSequenceClassification.from_pretrained
            merged = merge(_load(loader, path, "an adapter", num_labels=1, **_kwargs(config)), path)
        copy_marks(merged, path, config)
        return prepare(restore_bias(merged, path, config), trainable)
    model, missing = load_scalar_model(path, config, "a reward or value model", quantization)
    head = score_head(model)
    check_complete(model, path, [key for key in missing if key.startswith(f"{model.base_model_prefix}.")])
    if any(key.split(".")[0] in ("score", "classifier") for key in missing):
        with whole([head.weight]):
            torch.nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    return prepare(restore_bias(model, path, config), trainable, quantization)


def load_scalar_model(
    path: str, config: ModelConfig, what: str, quantization: Any = None
) -> tuple[PreTrainedModel, list[str]]:
    """A sequence-classification model with one label, and the names of the weights that its folder lacks, sorted.

    transformers draws those at random and warns of it; whether that is what is wanted is for the caller to say.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    inside = wrapped(path, config)
    form = {"num_labels": 1} if inside is None else {"config": inside[0], "key_mapping": inside[1]}
    try:
        model, report = _load(
            AutoModelForSequenceClassification.from_pretrained,
            path,
            what,
            **form,
            revision=revision_of(path, config),
            output_loading_info=True,
            **_kwargs(config, quantization),
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if inside is not None:
        vars(model).pop("_weight_conversions", None)  # else it is saved under those names again
    check_layers(model, path, report["unexpected_keys"])
    return model, sorted(report["missing_keys"])


def refuse_adapter(path: str, quantization: Any) -> None:
    """An adapter brings its base with it, which is not loaded in 4 bits.

    Raises:
        UserError: that is asked for.
    """
    if quantization is not None:
        raise UserError(
            f"{path} holds an adapter alone, and lora.load_in_4bit starts from a whole model: train the stage before "
            f"with merge_lora=true."
        )


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence the model takes, in tokens, where its config says.

    With LongRoPE (Phi-3's 128k models) that is the length it was trained on first: beyond it the embedding of *all*
    positions changes, so that what a token's probability is would depend on the longest row of its batch, and keys in
    a cache would be of another embedding than those that follow.
    """
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return min([value - _positions_before_the_first(model), *where_positions_change(config)])
    return None


def where_positions_change(config: Any) -> list[int]:
    """The lengths beyond which a rotary embedding is another one for all positions (transformers' ``longrope``)."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # One for all layers, or one for each kind of layer.
    kinds = [rope, *(one for one in rope.values() if isinstance(one, dict))]
    found = [
        kind.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for kind in kinds
        if (kind.get("rope_type") or kind.get("type")) in ("longrope", "su")
    ]
    return [int(length) for length in found if length]


def _positions_before_the_first(model: torch.nn.Module) -> int:
    """RoBERTa and its kin number positions from their padding token's on: so many of the table are never a token's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.padding_idx + 1
    return 0


def check_response_budget(model: PreTrainedModel, max_prompt: int, max_new_tokens: int, where: str) -> None:
    """Prompt and response must fit into the context.

    Raises:
        UserError: they do not; names the three numbers.
    """
    limit = context_length(model)
    if limit is not None and max_prompt + max_new_tokens > limit:
        raise UserError(
            f"{where}: a prompt of {max_prompt} tokens and a response budget of {max_new_tokens} need "
            f"{max_prompt + max_new_tokens} positions, and the model has {limit}. "
            f"Lower the budget or the prompt length."
        )
