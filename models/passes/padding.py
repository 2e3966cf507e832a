"""What every padded pass takes for granted, looked at once a model: a masked token changes nothing, and no token sees
those that follow it.

Attention reads a mask by construction. A recurrent or convolutional state goes on over padding unless the model's code
resets it, and not every model's does. Encoders that have a language-model head (BERT's) read to both sides: what they
say about the next token has seen it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.pretrained import where_positions_change
from ppo_vs_dpo.models.passes.packed import can_pack
from ppo_vs_dpo.models.sharding.deepspeed import is_sharded

# A padded row's last state against the row's alone, relative to the state's size: rounding is far below.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
LOW_PRECISION = 5e-2


def without_router(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments that keep a mixture of experts from its auxiliary loss, where its configuration asks for one.

    transformers works it out in sampling, too, and fails at the first decoded token. No loss here contains it.
    """
    config = getattr(model, "config", None)
    asks = any(
        getattr(part, "output_router_logits", False)
        for part in (config, getattr(config, "get_text_config", lambda: None)())
    )
    return {"output_router_logits": False} if asks else {}


def check_length(model: torch.nn.Module, longest: int) -> None:
    """No row may reach where a rotary embedding changes for all positions at once (LongRoPE).

    Raises:
        UserError: one does.
    """
    config = getattr(model, "config", None)
    limits = [] if config is None else where_positions_change(config.get_text_config())
    if limits and longest > min(limits):
        raise UserError(
            f"{type(model).__name__} has LongRoPE: beyond {min(limits)} tokens all its positions are embedded in "
            f"another way, and a row of {longest} would change the probabilities of the others in its batch. Keep "
            f"prompt and response within {min(limits)} tokens."
        )


def known_decoder(model: torch.nn.Module) -> bool:
    """Whether a model is of an architecture that is known to leave out what is masked, and what follows.

    Adapters of weights change neither, on or off: a PEFT model is what its base is. Virtual tokens do.
    """
    model = model.policy if getattr(model, "adapters_off", False) else model
    if any(settings.is_prompt_learning for settings in getattr(model, "peft_config", {}).values()):
        return False
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return isinstance(owner, PreTrainedModel) and can_pack(owner)


def check_rows(model: torch.nn.Module, longest: int) -> None:
    """Rows of different lengths, the longest of so many tokens, may share a batch: `check_length` and
    `check_reads_masks`."""
    check_length(model, longest)
    check_reads_masks(model)


def check_reads_masks(model: torch.nn.Module) -> None:
    """A left-padded row must give what the row gives alone.

    Args:
        model: a causal language model, or a transformer without its head; a `known_decoder` is not asked.

    Raises:
        UserError: padding reaches the model's state; it reads to both sides.
    """
    check_causal(model)
    if not getattr(model, "_reads_masks", False):
        if not known_decoder(model) and not _reads_masks(model):
            kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise UserError(
                f"{type(model).__name__} ({kind}) does not leave out what the attention mask masks: rows of different "
                f"lengths would be read with their padding. Its state is recurrent, and its code does not reset it. "
                f"Use another architecture."
            )
        model._reads_masks = True


def check_causal(model: torch.nn.Module) -> None:
    """The states of a row's beginning must not depend on what follows.

    Args:
        model: a causal language model, or a transformer without its head; a `known_decoder` is not asked.

    Raises:
        UserError: they do.
    """
    if getattr(model, "_is_causal", False):
        return
    if not known_decoder(model) and not _is_causal(model):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise UserError(
            f"{type(model).__name__} ({kind}) reads to both sides: what it says about a token has seen those that "
            f"follow, so that it is neither a policy nor a value model. Use a decoder."
        )
    model._is_causal = True


@torch.no_grad()
def _is_causal(model: torch.nn.Module) -> bool:
    parameter = next(model.parameters())
    if is_sharded(parameter):
        return True  # as below
    with _evaluating(model):
        ids = _some_tokens(model, parameter.device)
        whole, cut = (_read(model, part, torch.ones_like(part)) for part in (ids, ids[:, :2]))
    return _agree(whole[:2], cut, parameter.dtype)


@torch.no_grad()
def _reads_masks(model: torch.nn.Module) -> bool:
    parameter = next(model.parameters())
    if is_sharded(parameter):
        # In pieces: the layers are gathered by hooks that count on passes that all ranks make.
        return True
    with _evaluating(model):
        ids = _some_tokens(model, parameter.device)
        padded = torch.cat([ids.flip(1), ids], dim=1)
        mask = torch.tensor([[0] * 4 + [1] * 4], device=parameter.device)
        alone, beside = (
            _read(model, some, attended)[-1] for some, attended in ((ids, torch.ones_like(ids)), (padded, mask))
        )
    return _agree(alone, beside, parameter.dtype)


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _some_tokens(model: torch.nn.Module, device: torch.device) -> torch.Tensor:
    top = int(getattr(model.config.get_text_config(), "vocab_size", 8)) - 1
    return torch.tensor([[top // 2, top // 3, top // 4, top // 5]], device=device)


def _read(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the model gives at each token of a row, ``(L, d)``."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **without_router(model))
    return (out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state)[0].float()


def _agree(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    size = one.abs().max().clamp_min(1e-6)
    return bool((one - other).abs().max() <= TOLERANCE.get(dtype, LOW_PRECISION) * size)
