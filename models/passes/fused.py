"""Decoder layers of Llama's kind, written for packed rows: what transformers' own code does, with less of it.

A layer keeps its modules (so adapters, hooks and saved files are as before); its ``forward`` is replaced on the
instance and used where rows are packed (`models.passes.packed`), transformers' own elsewhere. Three things are
cheaper:

- The last layer does queries, output projection and feed-forward only at the places whose states are asked for. Prompt
  tokens are there for their keys and values alone.
- Norms, rotary embeddings and gated units have backward passes of their own, with fewer walks through memory.
- Queries, keys and values stay ``(T, heads * width)``, as the projections give them: nothing is transposed and copied.

Equal to transformers' layers up to rounding (tests/models/passes/test_fused.py).
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ppo_vs_dpo.models.passes.packed import Groups, Packing, Pick, Spread, attend, forward_packed
from ppo_vs_dpo.models.sharding.deepspeed import is_sharded

# Layers that do exactly what `layer_forward` does. Others go packed with transformers' own layers.
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
# Tokens that a CPU reads at once where nothing is differentiated (docs/performance.md).
TOKENS = 1024
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def rms_scale(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which stays with one place."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class RMSNorm(torch.autograd.Function):
    """y = w * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, eq. 4), over the last dimension."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = rms_scale(x, eps)
        normal = x * scale
        ctx.save_for_backward(normal, scale, weight)
        return normal * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        normal, scale, weight = ctx.saved_tensors
        product = grad * normal
        grad_weight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            # dx = s (w g - n mean(w g n)), n = s x
            mean = (product @ weight).unsqueeze(-1).div_(-weight.shape[0])
            grad_x = torch.addcmul(grad * weight, normal, mean).mul_(scale)
        return grad_x, grad_weight, None


class GatedUnit(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, eq. 6)."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        ctx.save_for_backward(sigmoid, silu, up)
        return silu * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        sigmoid, silu, up = ctx.saved_tensors
        # silu' = s + silu (1 - s)
        slope = torch.addcmul(sigmoid, silu, sigmoid, value=-1).add_(silu)
        return slope.mul_(up).mul_(grad), grad * silu


class Rotary(torch.autograd.Function):
    """Pairs ``(x_i, x_{i + d/2})`` of ``(T, H, d)`` turned by their position's angle (Su et al. 2021, eq. 34)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        # The transpose of a rotation turns back.
        return _turn(grad, *ctx.saved_tensors, -1), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """``x`` turned by angles of the first half of ``cos`` and ``sin`` ``(T, 1, d)`` (their halves are equal)."""
    half = x.shape[-1] // 2
    out, sin = x * cos, sin[..., :half]
    out[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return out


def norm_forward(norm: nn.Module, hidden_states: torch.Tensor, packed: bool = False) -> torch.Tensor:
    """A norm's ``forward``: ours for packed rows in fp32; transformers' own else, bit for bit, with its order of
    roundings in half precision."""
    if not packed or hidden_states.dtype != torch.float32 or norm.weight.dtype != torch.float32:
        return type(norm).forward(norm, hidden_states)
    if not torch.is_grad_enabled():
        return (hidden_states * rms_scale(hidden_states, norm.variance_epsilon)).mul_(norm.weight)
    return RMSNorm.apply(hidden_states, norm.weight, norm.variance_epsilon)


def gated_unit(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`GatedUnit`; where nothing is differentiated in one tensor's memory, the same bits."""
    return GatedUnit.apply(gate, up) if torch.is_grad_enabled() else gate.sigmoid().mul_(gate).mul_(up)


def attention(
    module: nn.Module,
    normal: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    groups: Groups,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """Self-attention of packed tokens.

    ``normal`` is ``(1, T, d)``, normalised; ``position_embeddings`` are cosines and sines ``(1, T, width of a
    head)``; ``keep`` ``(N,)`` are the places whose states are wanted, ``None`` for all.

    Returns:
        ``(1, N, d)``.
    """
    tokens, width = normal.shape[1], module.head_dim
    cos, sin = (angles[0].unsqueeze(1) for angles in position_embeddings)
    asking = normal[0] if keep is None else Pick.apply(normal[0], keep)
    angles = (cos, sin) if keep is None else (cos[keep], sin[keep])
    query, key, value = module.q_proj(asking), module.k_proj(normal[0]), module.v_proj(normal[0])
    # Said in full: where no place is asked for, -1 has no meaning.
    query, key = (x.view(len(x), x.shape[1] // width, width) for x in (query, key))
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query, packed=True), module.k_norm(key, packed=True)
    query, key = Rotary.apply(query, *angles).flatten(1), Rotary.apply(key, cos, sin).flatten(1)
    if keep is not None:
        query = Spread.apply(query, keep, tokens)
    dropout = module.attention_dropout if module.training else 0.0
    out = attend(query, key, value, width, groups, dropout, module.scaling)
    if keep is not None:
        out = Pick.apply(out, keep)
    return module.o_proj(out).unsqueeze(0)


def layer_forward(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    packed_groups: Groups | None = None,
    packed_keep: torch.Tensor | None = None,
    last: bool = False,
    **kwargs,
) -> torch.Tensor:
    """A layer's ``forward``: ours for packed rows, transformers' own for others.

    States ``(1, T, d)``; ``packed_groups`` are `Packing.groups`, ``None`` where rows are not packed;
    ``packed_keep`` ``(N,)`` are the places whose states are wanted from the ``last`` layer.

    Returns:
        ``(1, N, d)`` from the last layer where places are given, else ``(1, T, d)``.
    """
    if packed_groups is None:
        return type(layer).forward(layer, hidden_states, **kwargs)
    angles, keep = kwargs["position_embeddings"], packed_keep if last else None
    if checkpoints(layer):
        # Hidden states first, as transformers hands them over: what a reentrant checkpoint differentiates.
        again = functools.partial(_packed_layer, layer, angles=angles, groups=packed_groups, keep=keep)
        return layer._gradient_checkpointing_func(again, hidden_states)
    return _packed_layer(layer, hidden_states, angles, packed_groups, keep)


def checkpoints(layer: nn.Module) -> bool:
    """Whether a layer's activations are to be computed again, and its class's ``forward`` would see to that.

    transformers does so in that ``forward`` (5.20 and later), which packed rows go past; before, in ``__call__``.
    """
    wrapped = hasattr(type(layer).forward, "__wrapped__") and "__call__" not in vars(GradientCheckpointingLayer)
    return wrapped and layer.training and layer.gradient_checkpointing


def _packed_layer(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    groups: Groups,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """One layer on a packed row; ``keep`` are the places whose states are wanted from it."""
    attended = attention(layer.self_attn, layer.input_layernorm(hidden_states, packed=True), angles, groups, keep)
    residual = hidden_states if keep is None else Pick.apply(hidden_states[0], keep).unsqueeze(0)
    hidden_states = residual + attended
    normal, mlp = layer.post_attention_layernorm(hidden_states, packed=True), layer.mlp
    if type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation"):
        inner = gated_unit(mlp.gate_proj(normal), mlp.up_proj(normal))
        return hidden_states + mlp.down_proj(inner)
    return hidden_states + mlp(normal)


def fuse(backbone: nn.Module) -> bool:
    """Give the layers and norms of a transformer their new ``forward``, once.

    Returns:
        Whether they have it: other kinds of layers keep theirs.
    """
    layers = getattr(backbone, "layers", ())
    if not len(layers) or not all(type(layer).__name__ in LAYERS for layer in layers):
        return False
    if getattr(layers[-1].forward, "func", None) is not layer_forward:
        for layer in layers:
            layer.forward = functools.partial(layer_forward, layer, last=layer is layers[-1])
            for module in layer.modules():
                if type(module).__name__ in NORMS:
                    module.forward = functools.partial(norm_forward, module)
    return True


def packed_states(
    backbone: nn.Module,
    owner: PreTrainedModel,
    packing: Packing,
    batch_ids: torch.Tensor,
    keep: torch.Tensor | None = None,
    call: Callable | None = None,
) -> torch.Tensor:
    """Last hidden states of packed rows.

    Args:
        backbone: the transformer without its head.
        owner: the model whose configuration it follows.
        packing: of the rows.
        batch_ids: padded ``(B, L)`` token ids that ``packing`` was made for.
        keep: ``(N,)`` distinct packed places whose states are wanted; ``None`` for all.
        call: what runs the backbone, where that is not itself.

    Returns:
        ``(N, d)``.
    """
    call, fused = call or backbone, fuse(backbone)
    if not reads_in_pieces(backbone, packing):
        return _states(call, owner, packing, batch_ids, keep, fused)
    places = torch.arange(len(packing.order)) if keep is None else keep
    states = None
    for start, piece in packing.pieces(TOKENS):
        here = ((places >= start) & (places < start + len(piece.order))).nonzero().squeeze(-1)
        if len(here):
            own = _states(call, owner, piece, batch_ids, None if keep is None else places[here] - start, fused)
            states = own.new_empty(len(places), own.shape[-1]) if states is None else states
            states.index_copy_(0, here, own)
    return _states(call, owner, packing, batch_ids, keep, fused) if states is None else states


def reads_in_pieces(backbone: nn.Module, packing: Packing) -> bool:
    """Whether packed rows go through a piece at a time: on a CPU, whose caches hold the states of `TOKENS` tokens and
    not those of many more, where nothing is differentiated and no rank must gather weights as often as the others."""
    many = not torch.is_grad_enabled() and packing.order.device.type == "cpu" and len(packing.order) > TOKENS
    return many and packing.groups.shared is None and not any(map(is_sharded, backbone.parameters()))


def _states(
    call: Callable,
    owner: PreTrainedModel,
    packing: Packing,
    batch_ids: torch.Tensor,
    keep: torch.Tensor | None,
    fused: bool,
) -> torch.Tensor:
    kwargs = {"packed_keep": keep} if fused else {}
    states = forward_packed(call, owner, packing, batch_ids, **kwargs).last_hidden_state[0]
    return states if fused or keep is None else Pick.apply(states, keep)
