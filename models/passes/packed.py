"""Many sequences in one row, without padding: the fastest way through a model where lengths differ.

Everything but attention runs on the real tokens alone, ordered by the length of their sequence and laid end to end.
Attention (registered with transformers' ``AttentionInterface``) runs on a few groups of sequences of similar length,
padded on the right, where a causal mask needs nothing else; where all of a group are equally long, nothing is copied.
On a GPU in half precision torch's own flash attention for sequences of different lengths does the same in one call
(`torch.nn.attention.varlen`). Equal to the padded pass up to rounding (see tests/models).

What is where is worked out on the host, from the lengths, and goes to the device in one copy.
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ppo_vs_dpo.models.devices import has_flash

NAME = "packed_sdpa"
# Groups of sequences by length: more waste less at padding, fewer cost less in calls. Four was fastest at 64 to 128
# rows (docs/performance.md).
GROUPS = 4


class Spread(torch.autograd.Function):
    """Rows ``(T, d)`` put at distinct places of ``(size, d)`` zeros; the backward pass picks them up again."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(size, rows.shape[-1]).index_copy_(0, places, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class Pick(torch.autograd.Function):
    """Rows at distinct places; cheaper than indexing, whose backward pass must expect places to repeat."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.size = rows.shape[0]
        return rows.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        return grad.new_zeros(ctx.size, grad.shape[-1]).index_copy_(0, ctx.saved_tensors[0], grad), None


@dataclass
class Group:
    """Sequences of similar length: tokens ``start`` to ``stop`` of the packed row.

    Attributes:
        start, stop: where they stand.
        rows: how many sequences.
        longest: tokens of the longest.
        places: ``(stop - start,)`` where the tokens stand in ``(rows, longest)`` right-padded rows, flattened;
            ``None`` where all are equally long.
    """

    start: int
    stop: int
    rows: int
    longest: int
    places: torch.Tensor | None


@dataclass
class Packing:
    """How the real tokens of padded ``(B, L)`` rows are laid end to end.

    Attributes:
        order: ``(T,)`` index of each packed token in the flattened ``(B * L)`` rows, shortest row first.
        positions: ``(T,)`` number of each token in its row, from 0.
        groups: for attention.
        starts: ``(B,)`` where each row's sequence begins in the packed row.
        lengths: ``(B,)``.
    """

    order: torch.Tensor
    positions: torch.Tensor
    groups: "Groups"
    starts: torch.Tensor
    lengths: torch.Tensor

    def to(self, device: torch.device, *more: torch.Tensor) -> tuple["Packing", list[torch.Tensor]]:
        """The same on a device, and ``more`` whole numbers of the host, by one copy of all. No token is shared."""
        places = [group.places for group in self.groups if group.places is not None]
        tensors = [self.order, self.positions, self.starts, self.lengths, self.groups.bounds, *more, *places]
        order, positions, starts, lengths, bounds, *rest = upload(tensors, device)
        also, moved = rest[: len(more)], iter(rest[len(more) :])
        groups = [g if g.places is None else dataclasses.replace(g, places=next(moved)) for g in self.groups]
        packing = Packing(order, positions, Groups(groups, bounds.int(), self.groups.longest), starts, lengths)
        return packing, also

    def pieces(self, tokens: int) -> Iterator[tuple[int, "Packing"]]:
        """Sequences, as many at a time as have ``tokens`` tokens (a longer one goes alone): the packed place where
        each piece begins, and its own packing."""
        lengths = self.groups.bounds.diff()
        first, start = 0, 0
        while first < len(lengths):
            count = max(1, int((lengths[first:].cumsum(0) <= tokens).sum()))
            own = lengths[first : first + count]
            groups, positions = _grouped(own)
            stop = start + len(positions)
            yield start, Packing(self.order[start:stop], positions, groups, groups.bounds[:-1], own)
            first, start = first + count, stop


class Groups(list):
    """The `Group` s of a packed row, and where its sequences stand for a kernel that takes them as they are.

    Attributes:
        bounds: ``(number of sequences + 1,)`` where each sequence begins in the packed row, and where the last ends.
        longest: tokens of the longest sequence.
        shared: where tokens stand for two sequences that begin alike (`share`): ``(S,)`` the packed token meant at
            each place of the whole sequences laid end to end, and ``(T,)`` where each packed token stands there first.
    """

    def __init__(
        self,
        groups: list[Group],
        bounds: torch.Tensor,
        longest: int,
        shared: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        super().__init__(groups)
        self.bounds, self.longest, self.shared = bounds, longest, shared


def upload(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Whole numbers of the host on a device, by one copy of all."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    if torch.cuda.is_available():
        flat = flat.pin_memory()
    moved = flat.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(moved, tensors, strict=True)]


def pack(attention_mask: torch.Tensor) -> Packing:
    """Lay the real tokens of ``(B, L)`` rows end to end, shortest row first. Empty rows take no room.

    The result is on the mask's device; a mask on the host never makes one wait for the device.
    """
    packing = _layout(attention_mask.cpu())
    return packing if attention_mask.device.type == "cpu" else packing.to(attention_mask.device)[0]


def share(packing: Packing, width: int, alike: torch.Tensor) -> Packing:
    """The same rows, of which the second half begins like the first half: what is alike stands there once.

    A token after the same tokens has the same state in both rows: everything but attention runs once on it.

    Args:
        packing: of ``(2B, width)`` right-padded rows, on the host.
        alike: ``(B,)`` leading tokens that row ``B + i`` has in common with row ``i``.
    """
    if not alike.any():
        return packing
    order, half = packing.order, len(alike) * width
    row = (order - half).clamp(min=0) // width
    double = (order >= half) & ((order - half) % width < alike[row])
    place = torch.empty(2 * half, dtype=torch.long)
    place[order] = torch.arange(len(order))
    number = (~double).long().cumsum(0) - 1
    meant = torch.where(double, place[(order - half).clamp(min=0)], torch.arange(len(order)))
    first = (~double).nonzero().squeeze(-1)
    groups = Groups(packing.groups, packing.groups.bounds, packing.groups.longest, (number[meant], first))
    return dataclasses.replace(packing, order=order[first], positions=packing.positions[first], groups=groups)


def _layout(attention_mask: torch.Tensor) -> Packing:
    lengths = attention_mask.sum(-1)
    by_length = lengths.argsort(stable=True)
    rows, columns = attention_mask[by_length].nonzero(as_tuple=True)
    order = by_length[rows] * attention_mask.shape[1] + columns
    ends = lengths[by_length].cumsum(0)
    starts = torch.empty_like(lengths)
    starts[by_length] = ends - lengths[by_length]
    filled = lengths[by_length]
    groups, positions = _grouped(filled[filled > 0])
    return Packing(order, positions, groups, starts, lengths)


def _grouped(lengths: torch.Tensor) -> tuple[Groups, torch.Tensor]:
    """Groups of sequences of these ascending ``lengths``, and the number of each token in its sequence."""
    groups, positions, start = [], [], 0
    for sizes in _chunks(lengths):
        longest, count = int(sizes[-1]), len(sizes)
        if int(sizes[0]) == longest:
            places, number = None, torch.arange(longest, device=sizes.device).repeat(count)
        else:
            real = torch.arange(longest, device=sizes.device) < sizes[:, None]
            places = real.flatten().nonzero().squeeze(-1)
            number = places % longest
        groups.append(Group(start, start + len(number), count, longest, places))
        positions.append(number)
        start += len(number)
    bounds = F.pad(lengths.cumsum(0), (1, 0))
    return Groups(groups, bounds, int(lengths[-1]) if len(lengths) else 0), torch.cat([lengths[:0], *positions])


def _chunks(lengths: torch.Tensor) -> list[torch.Tensor]:
    """Ascending ``lengths`` in at most `GROUPS` runs of similar ones; equal lengths are never parted."""
    if not len(lengths):
        return []
    if lengths[0] == lengths[-1]:
        return [lengths]
    return list(lengths.chunk(GROUPS))


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_groups: Groups | None = None,
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
    heads, width = query.shape[1], query.shape[-1]
    flat = [x[0].transpose(0, 1).reshape(x.shape[2], -1) for x in (query, key, value)]
    return attend(*flat, width, packed_groups, dropout, scaling).view(1, -1, heads, width), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    width: int,
    groups: Groups,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence to itself.

    Args:
        query: ``(T, H * width)``; ``key`` and ``value`` ``(T, H_kv * width)``.
        groups: `Packing.groups`.
        scaling: of the products; ``1 / sqrt(width)`` by default.

    Returns:
        ``(T, H * width)``.
    """
    if groups.shared is not None:
        meant, first = groups.shared
        whole = Groups(groups, groups.bounds, groups.longest)
        # Where a token is asked for twice, its answer is taken once: no question there.
        query = Spread.apply(query, first, len(meant))
        key, value = key.index_select(0, meant), value.index_select(0, meant)
        return Pick.apply(attend(query, key, value, width, whole, dropout, scaling), first)
    if torch.is_autocast_enabled(query.device.type):
        # What autocast does to attention, done before its kernel is chosen: rotary embeddings leave fp32 behind.
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    if uses_varlen(query, width) and not dropout and groups:
        return _varlen(query, key, value, width, groups, scaling)
    sizes = [group.stop - group.start for group in groups]
    # Split once: the backward pass of a split is one concatenation, that of a slice a tensor of zeros each.
    flat = [x.split(sizes) for x in (query, key, value)]
    pieces = []
    for group, *parts in zip(groups, *flat, strict=True):
        if group.places is not None:
            parts = [Spread.apply(x, group.places, group.rows * group.longest) for x in parts]
        padded = [x.view(group.rows, group.longest, -1, width).transpose(1, 2) for x in parts]
        out = F.scaled_dot_product_attention(
            *padded, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        out = out.transpose(1, 2).reshape(-1, query.shape[1])
        pieces.append(out if group.places is None else Pick.apply(out, group.places))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@functools.cache
def varlen_kernel():
    """torch's flash attention for sequences of different lengths, called as 2.13 has it; ``None`` before 2.11.

    2.11 has it without ``enable_gqa``: keys and values are then repeated for the queries that share them.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= takes.keys():
        return None
    return varlen_attn if "enable_gqa" in takes else functools.partial(_repeated, varlen_attn)


def _repeated(kernel, query, key, value, *bounds, enable_gqa: bool, **options):
    """A kernel that wants as many heads of keys and values as of queries."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return kernel(query, key, value, *bounds, **options)


def uses_varlen(query: torch.Tensor, width: int) -> bool:
    """Whether that kernel is there for these values: flash attention's conditions.

    On CUDA from Ampere on, in half precision, heads of a width of up to 256 that is a multiple of 8.
    """
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and width % 8 == 0
        and width <= 256
        and has_flash(query.device)
        and varlen_kernel() is not None
    )


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    width: int,
    groups: Groups,
    scaling: float | None,
) -> torch.Tensor:
    """`attend` in one call."""
    heads = [x.view(len(x), -1, width) for x in (query, key, value)]
    out = varlen_kernel()(
        *heads,
        groups.bounds,
        groups.bounds,
        groups.longest,
        groups.longest,
        scale=scaling,
        # Everything before, nothing after: causal.
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.reshape(len(query), -1)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a model's attention can be replaced: it goes through transformers' interface and attends to everything.

    Sliding windows, soft caps and attention sinks need more than a causal mask; such models keep the padded pass.
    """
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
    # Stays switched (it is transformers' own for all but packed rows): checkpointed layers run again in the backward.
    owner.config.get_text_config()._attn_implementation = NAME
    return model(
        input_ids=batch_ids.flatten()[packing.order].unsqueeze(0),
        # A mask of four dimensions is taken as it is: none is built, and packed_attention does not look at it.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch_ids.device),
        position_ids=packing.positions.unsqueeze(0),
        packed_groups=packing.groups,
        use_cache=False,
        **kwargs,
    )
