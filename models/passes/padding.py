"""What every padded pass takes for granted: a masked token changes nothing. Looked at once a model.

Attention reads a mask by construction. A recurrent or convolutional state goes on over padding unless the model's code
resets it, and not every model's does.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from ppo_vs_dpo.artifacts.errors import UserError
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


def check_reads_masks(model: torch.nn.Module) -> None:
    """A left-padded row must give what the row gives alone.

    Args:
        model: a causal language model, or a transformer without its head; one that can be packed is not asked.

    Raises:
        UserError: padding reaches the model's state.
    """
    if not getattr(model, "_reads_masks", False):
        if not (isinstance(model, PreTrainedModel) and can_pack(model)) and not _reads_masks(model):
            kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise UserError(
                f"{type(model).__name__} ({kind}) does not leave out what the attention mask masks: rows of different "
                f"lengths would be read with their padding. Its state is recurrent, and its code does not reset it. "
                f"Use another architecture."
            )
        model._reads_masks = True


@torch.no_grad()
def _reads_masks(model: torch.nn.Module) -> bool:
    parameter = next(model.parameters())
    if is_sharded(parameter):
        # In pieces: the layers are gathered by hooks that count on passes that all ranks make.
        return True
    was_training, device = model.training, parameter.device
    model.eval()
    try:
        top = int(getattr(model.config.get_text_config(), "vocab_size", 8)) - 1
        ids = torch.tensor([[top // 2, top // 3, top // 4, top // 5]], device=device)
        padded = torch.cat([ids.flip(1), ids], dim=1)
        mask = torch.tensor([[0] * 4 + [1] * 4], device=device)
        alone, beside = (
            _last(model, some, attended) for some, attended in ((ids, torch.ones_like(ids)), (padded, mask))
        )
    finally:
        model.train(was_training)
    size = alone.abs().max().clamp_min(1e-6)
    return bool((alone - beside).abs().max() <= TOLERANCE.get(parameter.dtype, LOW_PRECISION) * size)


def _last(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the model gives at the last token."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **without_router(model))
    value = out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state
    return value[0, -1].float()
