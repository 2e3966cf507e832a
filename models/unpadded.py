"""TRL's trainers without the padding: the model is taught to skip it by itself.

TRL hands padded rows to the model. `skip_padding` changes what happens behind that call, on the instance only (its
class, its config and what is saved stay as they are): everything but attention runs on the real tokens, laid end to
end; attention runs on a few groups of rows of similar length, padded on the right, where a causal mask needs nothing
else; the language-model head sees only the positions that carry loss, and a scalar head only the last token of each
row. Equal to the padded pass up to rounding (tests/models/test_unpadded.py).
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, SequenceClassifierOutputWithPast

from models.logprobs import backbone, base, score_head_of, sequence_scores
from models.packed import can_pack

NAME = "grouped_sdpa"
# Groups of rows by length: more waste less at padding, fewer cost less in calls. Four was fastest at 64 to 128 rows.
GROUPS = 4


class _Spread(torch.autograd.Function):
    """Rows ``(T, d)`` put at distinct places of ``(size, d)`` zeros; the backward pass picks them up again."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(size, rows.shape[-1]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Pick(torch.autograd.Function):
    """Rows at distinct places; cheaper than indexing, whose backward pass must expect places to repeat."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.size = rows.shape[0]
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad.new_zeros(ctx.size, grad.shape[-1]).index_copy_(0, ctx.saved_tensors[0], grad), None


@dataclass
class Group:
    """Rows of similar length: tokens ``start`` to ``stop`` of the packed row.

    ``places`` ``(stop - start,)`` is where these stand in ``(rows, longest)`` rows padded on the right, flattened.
    """

    start: int
    stop: int
    places: torch.Tensor
    rows: int
    longest: int


def group_rows(attention_mask: torch.Tensor) -> tuple[torch.Tensor, list[Group], torch.Tensor]:
    """Lay out the real tokens of ``(B, L)`` rows.

    Returns:
        ``order`` ``(T,)``: index of each packed token in the flattened ``(B * L)`` rows, shortest row first;
        the groups; ``positions`` ``(T,)``: number of each token in its row, from 0.
    """
    lengths = attention_mask.sum(-1)
    by_length = lengths.argsort(stable=True)
    by_length = by_length[lengths[by_length] > 0]
    rows, columns = attention_mask[by_length].nonzero(as_tuple=True)
    order = by_length[rows] * attention_mask.shape[1] + columns
    groups, positions, start = [], [], 0
    for members in by_length.chunk(GROUPS):
        sizes = lengths[members]
        longest = int(sizes[-1])
        real = torch.arange(longest, device=sizes.device) < sizes[:, None]
        places = real.flatten().nonzero().squeeze(-1)
        groups.append(Group(start, start + len(places), places, len(members), longest))
        positions.append(places % longest)
        start += len(places)
    return order, groups, torch.cat(positions)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    row_groups: list[Group] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row on itself; transformers' own where no groups are given.

    Args:
        query: ``(1, H, T, D)``; ``key`` and ``value`` ``(1, H_kv, T, D)``.
        row_groups: from `group_rows`.

    Returns:
        ``(1, T, H, D)`` and ``None``, as transformers expects.
    """
    if row_groups is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    heads, width = query.shape[1], query.shape[-1]
    flat = [x[0].transpose(0, 1).reshape(x.shape[2], -1) for x in (query, key, value)]
    pieces = []
    for group in row_groups:
        padded = [
            _Spread.apply(x[group.start : group.stop], group.places, group.rows * group.longest)
            .view(group.rows, group.longest, -1, width)
            .transpose(1, 2)
            for x in flat
        ]
        out = F.scaled_dot_product_attention(
            *padded, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=heads != key.shape[1]
        )
        pieces.append(_Pick.apply(out.transpose(1, 2).reshape(-1, heads * width), group.places))
    return torch.cat(pieces).view(1, -1, heads, width), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

# Arguments of a backbone that mean nothing here.
_IGNORED = {"use_cache", "position_ids", "return_dict"}


def _teach_backbone(owner: PreTrainedModel) -> None:
    """The backbone takes ``keep``, flat positions of the padded rows, and gives their states ``(1, N, d)``."""
    inner = backbone(owner)
    plain = inner.forward

    @functools.wraps(plain)
    def forward(input_ids=None, attention_mask=None, keep=None, **kwargs):
        padded = input_ids is not None and attention_mask is not None and attention_mask.dim() == 2
        others = {key for key, value in kwargs.items() if value is not None and value is not False} - _IGNORED
        if keep is None and (not padded or kwargs.get("use_cache") or others):
            return plain(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        order, groups, positions = group_rows(attention_mask)
        # Stays switched (it is transformers' own for all other calls): checkpointed layers run again in the backward.
        owner.config.get_text_config()._attn_implementation = NAME
        states = plain(
            input_ids=input_ids.flatten()[order].unsqueeze(0),
            # A mask of four dimensions is taken as it is: none is built, and grouped_attention does not look at it.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
            position_ids=positions.unsqueeze(0),
            row_groups=groups,
            use_cache=False,
        ).last_hidden_state[0]
        if keep is None:
            rows = _Spread.apply(states, order, input_ids.numel())
            return BaseModelOutputWithPast(last_hidden_state=rows.view(*input_ids.shape, -1))
        packed_index = torch.zeros(input_ids.numel(), dtype=torch.long, device=order.device)
        packed_index[order] = torch.arange(len(order), device=order.device)
        kept = _Pick.apply(states, packed_index[keep])
        return BaseModelOutputWithPast(last_hidden_state=kept.unsqueeze(0))

    inner.forward = forward


def skip_padding(model: PreTrainedModel) -> bool:
    """Let a causal language model that a TRL trainer holds (a PEFT wrapper is looked through) run without padding.

    TRL's fused head (``model(..., labels=..., fused_lm_head=True)``) then works on the positions with a label alone.
    Call it after the trainer was built. Calls with a cache, as in generation, go the plain way.

    Returns:
        Whether it does: not every architecture's attention can be replaced (`models.packed.can_pack`).
    """
    owner = base(model)
    if getattr(owner.forward, "skips_padding", False):
        return True
    if not can_pack(owner):
        return False
    _teach_backbone(owner)
    fused = owner.forward

    @functools.wraps(fused)
    def forward(*args, fused_lm_head=False, input_ids=None, attention_mask=None, labels=None, **kwargs):
        if not fused_lm_head or args or input_ids is None or attention_mask is None or labels is None:
            extra = {"fused_lm_head": True} if fused_lm_head else {}
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            return fused(*args, **{k: v for k, v in given.items() if v is not None}, **extra, **kwargs)
        mask = labels[:, 1:] != -100
        rows, columns = mask.nonzero(as_tuple=True)
        # The token at column t is predicted from the state at column t - 1, and `mask` starts at column 1.
        keep = rows * labels.shape[1] + columns
        output = fused(
            input_ids=input_ids,
            attention_mask=attention_mask,
            shift_labels=labels[:, 1:][mask].unsqueeze(0),
            keep=keep,
            fused_lm_head=True,
            **kwargs,
        )
        for name, value in list(output.items()):
            if isinstance(value, torch.Tensor) and value.dim() == 2:
                output[name] = value.new_zeros(mask.shape).masked_scatter(mask, value[0])
        return output

    forward.skips_padding = True
    owner.forward = forward
    return True


def score_at_last_token(model: PreTrainedModel) -> None:
    """Let a sequence-classification model read its score at the last real token by the mask, without padding.

    transformers finds that token by comparing with the pad id: where padding is the end-of-sequence token, it reads
    one token too early and the score of a finished response is never trained (Huang et al. 2024, detail 12).
    """
    owner = base(model)
    packable = can_pack(owner)
    if packable:
        _teach_backbone(owner)

    @functools.wraps(type(owner).forward)
    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if packable:
            columns = torch.arange(mask.shape[1], device=mask.device)
            last = (mask * columns).argmax(-1) + torch.arange(len(mask), device=mask.device) * mask.shape[1]
            states = backbone(owner)(input_ids=input_ids, attention_mask=mask, keep=last).last_hidden_state[0]
            scores = score_head_of(owner)(states)
        else:
            scores = sequence_scores(owner, input_ids, mask).unsqueeze(-1)
        return SequenceClassifierOutputWithPast(logits=scores)

    owner.forward = forward
