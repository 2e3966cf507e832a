"""Many sequences in one row, without padding: the fastest way through a model where lengths differ.

Sequences are ordered by length and laid end to end. An attention function of our own (registered with transformers'
``AttentionInterface``) runs one causal attention for each *length*, on all sequences of that length at once, so no
mask is built and nothing is computed at padding. Equal to the padded pass up to rounding (see tests/models).
On a GPU with flash attention installed transformers does the same by itself from the position ids; there this
module is not used.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "packed_sdpa"


@dataclass
class Packing:
    """How the real tokens of padded rows are laid end to end.

    Attributes:
        order: ``(T,)`` index of each packed token in the flattened ``(B * L)`` padded tensor.
        groups: ``((length, count), ...)`` ascending: that many sequences of that length stand side by side.
        starts: ``(B,)`` where each row's sequence begins in the packed row.
        lengths: ``(B,)``.
    """

    order: torch.Tensor
    groups: tuple[tuple[int, int], ...]
    starts: torch.Tensor
    lengths: torch.Tensor


def pack(attention_mask: torch.Tensor) -> Packing:
    """Lay the real tokens of ``(B, L)`` rows end to end, shortest row first. Empty rows take no room."""
    lengths = attention_mask.sum(-1)
    by_length = lengths.argsort(stable=True)
    rows, columns = attention_mask[by_length].nonzero(as_tuple=True)
    order = by_length[rows] * attention_mask.shape[1] + columns
    ends = lengths[by_length].cumsum(0)
    starts = torch.empty_like(lengths)
    starts[by_length] = ends - lengths[by_length]
    values, counts = lengths[lengths > 0].unique(return_counts=True)
    groups = tuple(zip(values.tolist(), counts.tolist(), strict=True))
    return Packing(order, groups, starts, lengths)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_groups: tuple[tuple[int, int], ...] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of a packed row; transformers' own where no row is packed.

    Args:
        query: ``(1, H, T, D)``; ``key`` and ``value`` ``(1, H_kv, T, D)``.
        packed_groups: `Packing.groups`.

    Returns:
        ``(1, T, H, D)`` and ``None``, as transformers expects.
    """
    if packed_groups is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    share = query.shape[1] // key.shape[1]
    if share > 1:
        key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
    heads = query.shape[1]
    pieces, start = [], 0
    for length, count in packed_groups:
        stop = start + length * count
        parts = [x[0, :, start:stop].reshape(heads, count, length, -1).transpose(0, 1) for x in (query, key, value)]
        out = F.scaled_dot_product_attention(*parts, dropout_p=dropout, is_causal=True, scale=scaling)
        pieces.append(out.permute(0, 2, 1, 3).reshape(count * length, heads, -1))
        start = stop
    return torch.cat(pieces).unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a model's attention can be replaced: it goes through transformers' interface and attends to everything.

    Sliding windows, soft caps and attention sinks need more than a causal mask; such models keep the padded pass.
    """
    if next(model.parameters()).is_cuda:
        return False
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    plain = set(kinds) == {"full_attention"} and not getattr(config, "attn_logit_softcapping", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    known = config.model_type in ("llama", "qwen2", "qwen3", "mistral", "gpt_neox", "olmo2", "smollm3")
    return known and plain and window is None and config._attn_implementation in ("sdpa", NAME)


def forward_packed(
    model: torch.nn.Module, owner: PreTrainedModel, packing: Packing, batch_ids: torch.Tensor, **kwargs
):
    """Call ``model`` (a whole model or its backbone, belonging to ``owner``) on the packed tokens.

    Args:
        batch_ids: padded ``(B, L)`` token ids that ``packing`` was made for.

    Returns:
        The model's output; tensors are ``(1, T, ...)``.
    """
    positions = torch.cat(
        [torch.arange(length, device=batch_ids.device).repeat(count) for length, count in packing.groups]
    )
    # Stays switched (it is transformers' own for all but packed rows): checkpointed layers run again in the backward.
    owner.config.get_text_config()._attn_implementation = NAME
    return model(
        input_ids=batch_ids.flatten()[packing.order].unsqueeze(0),
        # A mask of four dimensions is taken as it is: none is built, and packed_attention does not look at it.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch_ids.device),
        position_ids=positions.unsqueeze(0),
        packed_groups=packing.groups,
        use_cache=False,
        **kwargs,
    )
