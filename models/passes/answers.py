"""Whether a model is what its role takes, and still the one that was given: by what it answers, not by its settings.

Adapters are meant to leave their base alone, so that the base is the reference. Some initialisations rewrite it
(PiSSA, OLoRA, CorDA, LoftQ put a part of each weight into the adapter), and a policy may come with trained adapters.
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.adapters import check_adapters
from ppo_vs_dpo.models.loading.vocabulary import check_tokens
from ppo_vs_dpo.models.passes.padding import check_causal
from ppo_vs_dpo.models.sharding.deepspeed import is_sharded

# Largest difference of log-probabilities that is rounding; an initialisation by singular values has some.
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
ROUNDING_LOW = 0.05
# Of `init_lora_weights`: these leave the base as it is.
LEAVE_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


def check_language_model(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None, what: str) -> None:
    """A policy or a reference: next-token logits of a decoder, for every token of its tokenizer.

    ``what`` names it in messages; without a ``tokenizer`` (not known here) its tokens are not looked at.

    Raises:
        UserError: it is something else; names what.
    """
    check_adapters(model, what)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = f"{type(inner).__name__} ({getattr(getattr(inner, 'config', None), 'model_type', 'no config')})"
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise UserError(f"{what} is a {kind}: an encoder-decoder. A decoder is needed, a causal language model.")
    if not callable(getattr(inner, "get_output_embeddings", None)) or inner.get_output_embeddings() is None:
        raise UserError(f"{what} is a {kind}, without a language-model head. Give a causal language model.")
    if any(parameter.is_meta for parameter in inner.parameters()):
        raise UserError(
            f"parts of {what} are not in memory (device_map offloads them): load it whole, or shard it by DeepSpeed."
        )
    if tokenizer is not None:
        check_tokens(inner, tokenizer, what)
    check_causal(model)


@torch.no_grad()
def answers(model: torch.nn.Module) -> torch.Tensor | None:
    """Log-probabilities ``(T, V)`` after each token of a fixed short text; ``None`` where weights are in pieces.

    Args:
        model: a causal language model, or a wrapper that is called as one.
    """
    parameter = next(model.parameters())
    if is_sharded(parameter):
        return None
    was_training, vocabulary = model.training, model.config.get_text_config().vocab_size
    model.eval()
    try:
        ids = torch.arange(1, 13, device=parameter.device)[None] * 7919 % vocabulary
        ones = torch.ones_like(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        logits = model(input_ids=ids, attention_mask=ones, position_ids=positions, use_cache=False).logits[0]
    finally:
        model.train(was_training)
    return logits.float().log_softmax(-1)


def same_answers(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two `answers` differ by rounding alone, in the arithmetic of a dtype."""
    return bool((one - other).abs().max() <= ROUNDING.get(dtype, ROUNDING_LOW))


def rewriting_init(policy: PreTrainedModel) -> str | None:
    """The initialisation of a PEFT model's adapters that may have rewritten its base, by its name."""
    for config in getattr(policy, "peft_config", {}).values():
        init = getattr(config, "init_lora_weights", None)
        if init not in LEAVE_THE_BASE:
            return str(init)
    return None
