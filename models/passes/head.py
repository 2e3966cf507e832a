"""The language-model head without the logits of all tokens at once.

A head turns each hidden state into as many logits as there are tokens in the vocabulary: at 128,256 of them 64 rows of
1,024 tokens are 34 GB in fp32. Here a piece of some rows at a time is made, read, and let go of; the backward pass
makes it again. With one piece nothing is made twice.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ppo_vs_dpo.artifacts.errors import UserError

# Rows of logits at once, at least.
ROWS = 1024
# Logits at once where the vocabulary is small: one piece is then most often all.
PIECE = 1 << 24
# Logits turned into log-probabilities at once: 1 MiB stays in a core's cache.
CACHED = 1 << 18


def rows_at_once(vocabulary: int) -> int:
    """Rows of logits in one piece."""
    return max(ROWS, PIECE // vocabulary)


class Logprobs(torch.autograd.Function):
    """Log-probabilities of tokens under logits that nothing else needs: their memory becomes the probabilities.

    The backward pass needs these, and turns them into the gradient in place: one ``(N, V)`` tensor in all.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
        ctx.temperature, ctx.dtype, ctx.spent = temperature, logits.dtype, False
        probabilities = logits.detach().float()
        logprobs = _to_probabilities(probabilities, tokens, temperature)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(probabilities, tokens)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        if ctx.spent:
            raise RuntimeError("log-probabilities can be differentiated once: their memory is reused.")
        ctx.spent = True
        gradient, tokens = ctx.saved_tensors
        _to_gradient(gradient, tokens, grad / ctx.temperature)
        return gradient.to(ctx.dtype), None, None


def _to_probabilities(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities ``(N,)`` of tokens; fp32 ``logits`` ``(N, V)`` become probabilities in place."""
    logprobs = logits.new_empty(len(tokens))
    rows = _rows_in_cache(logits)
    for piece, picked, out in zip(logits.split(rows), tokens[:, None].split(rows), logprobs.split(rows), strict=True):
        if temperature != 1:
            piece.div_(temperature)
        top = piece.amax(-1, keepdim=True)
        chosen = piece.gather(-1, picked)
        total = piece.sub_(top).exp_().sum(-1, keepdim=True)
        piece.div_(total)
        out.copy_((chosen - top - total.log()).squeeze(-1))
    return logprobs


def _to_gradient(probabilities: torch.Tensor, tokens: torch.Tensor, share: torch.Tensor) -> None:
    """Probabilities ``(N, V)`` become, in place, the gradient of the logits for that of the log-probabilities."""
    # d log p_t / d logit_j = ([j = t] - p_j) / temperature
    rows = _rows_in_cache(probabilities)
    for piece, picked, part in zip(
        probabilities.split(rows), tokens[:, None].split(rows), share[:, None].split(rows), strict=True
    ):
        piece.mul_(-part).scatter_add_(-1, picked, part)


def _rows_in_cache(logits: torch.Tensor) -> int:
    """Rows handled at once: few enough for the cache on a CPU; all elsewhere, where each step costs a launch."""
    return max(1, CACHED // logits.shape[-1]) if logits.device.type == "cpu" else max(1, len(logits))


def rows_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float):
    """Log-probability of ``tokens`` ``(N,)`` under ``logits`` ``(N, V)``, and the entropy ``(N,)``, in fp32."""
    scaled = logits.float() / temperature
    normaliser = scaled.logsumexp(-1)
    logprobs = scaled.gather(-1, tokens[:, None]).squeeze(-1) - normaliser
    # H = log Z - E[logit]
    return logprobs, normaliser - (scaled.softmax(-1) * scaled).sum(-1)


class _InPieces(torch.autograd.Function):
    """Log-probabilities (and entropies) from hidden states, a piece of rows at a time, in both passes."""

    @staticmethod
    def forward(ctx, states, weight, bias, tokens, temperature: float, with_entropy: bool, dtype: torch.dtype):
        ctx.temperature, ctx.dtype, ctx.with_entropy = temperature, dtype, with_entropy
        # Parameters are kept as they are: under ZeRO-3 they are whole again in the backward pass.
        ctx.save_for_backward(states, weight, bias, tokens)
        logprobs = states.new_empty(len(tokens), dtype=torch.float32)
        entropy = torch.empty_like(logprobs) if with_entropy else None
        half = _Cast(weight, bias, dtype)
        rows = rows_at_once(weight.shape[0])
        for start in range(0, len(tokens), rows):
            here = slice(start, start + rows)
            logits = half.logits(states[here]).float()
            if with_entropy:
                logprobs[here], entropy[here] = rows_logprobs(logits, tokens[here], temperature)
            else:
                logprobs[here] = _to_probabilities(logits, tokens[here], temperature)
            del logits  # before the next piece is made
        return (logprobs, entropy) if with_entropy else logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_entropy=None):
        states, weight, bias, tokens = ctx.saved_tensors
        half = _Cast(weight, bias, ctx.dtype)
        grad_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        # Sums over pieces in fp32, whatever the weights are in.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        has_bias = bias is not None and ctx.needs_input_grad[2]
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if has_bias else None
        rows = rows_at_once(weight.shape[0])
        for start in range(0, len(tokens), rows):
            here = slice(start, start + rows)
            gradient = half.logits(states[here]).float()
            if ctx.with_entropy:
                gradient = _with_entropy(gradient, tokens[here], ctx.temperature, grad[here], grad_entropy[here])
            else:
                _to_probabilities(gradient, tokens[here], ctx.temperature)
                _to_gradient(gradient, tokens[here], grad[here] / ctx.temperature)
            gradient = gradient.to(ctx.dtype)
            if grad_states is not None:
                grad_states[here] = (gradient @ half.weight).to(states.dtype)
            if grad_weight is not None:
                grad_weight += gradient.t() @ states[here].to(ctx.dtype)
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=torch.float32)
            del gradient
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_states, grad_weight, grad_bias, None, None, None, None


class _Cast:
    """A head's weights in the dtype that its products are computed in."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        self.weight, self.bias, self.dtype = weight.to(dtype), None if bias is None else bias.to(dtype), dtype

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.to(self.dtype), self.weight, self.bias)


def _with_entropy(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float, grad: torch.Tensor, grad_entropy: torch.Tensor
) -> torch.Tensor:
    """Gradient ``(N, V)`` of the logits for those of log-probabilities and entropies ``(N,)``."""
    logp = (logits / temperature).log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp).sum(-1, keepdim=True)
    # dH / d logit_j = -p_j (log p_j + H) / temperature
    gradient = p * (-grad[:, None] - grad_entropy[:, None] * (logp + entropy))
    return gradient.scatter_add_(-1, tokens[:, None], grad[:, None]).div_(temperature)


def _head_forward(
    head: nn.Linear,
    states: torch.Tensor,
    tokens: torch.Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
):
    """A head's ``forward``: logits, or with ``tokens`` their log-probabilities (and entropies) in pieces."""
    kind, exact = states.device.type, getattr(head, "in_fp32", False)
    if tokens is None:
        if not exact:
            return type(head).forward(head, states)
        with torch.autocast(kind, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            return F.linear(states.float(), head.weight.float(), bias)
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    dtype = torch.float32 if exact else dtype
    return _InPieces.apply(states, head.weight, head.bias, tokens, temperature, with_entropy, dtype)


def compute_in_fp32(model: nn.Module) -> None:
    """Let a causal language model compute its logits in fp32, whatever the rest computes in: in sampling, too.

    In bfloat16 logits near 16 have steps of 0.125. MiniMax-M1 (2506.13585, section 3.2) found sampling and training
    apart by that alone.

    Raises:
        UserError: the head is no plain linear layer (adapters on it, 4 bits).
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise UserError(
            f"ppo.cast_lm_head_to_fp32 needs a plain output layer, and this model's is {type(head).__name__}: leave "
            f"it out, or take it out of lora.target_modules."
        )
    head.in_fp32 = True
    head.forward = functools.partial(_head_forward, head)


def head_logprobs(
    head: nn.Module, states: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of tokens (and entropies) from the states before them.

    The head is called as a module, and once: hooks (adapters, ZeRO-3) act as always, and ranks with different numbers
    of tokens make the same number of calls.

    Args:
        states: ``(N, d)``.
        tokens: ``(N,)``.
        with_entropy: also the entropy of each distribution, in nats, with its gradient.

    Returns:
        ``(N,)`` each, fp32; ``None`` for entropies that were not asked for.
    """
    plain = type(head) is nn.Linear
    if plain and len(tokens) > rows_at_once(head.out_features):
        if getattr(head.forward, "func", None) is not _head_forward:
            head.forward = functools.partial(_head_forward, head)
        out = head(states, tokens=tokens, temperature=temperature, with_entropy=with_entropy)
        return out if with_entropy else (out, None)
    return logits_logprobs(head(states), tokens, temperature, with_entropy)


def logits_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`head_logprobs` from logits ``(N, V)`` that are there already and of no more use afterwards."""
    if not with_entropy:
        return Logprobs.apply(logits, tokens, temperature), None
    # With gradients, pieces are computed again in the backward pass: the fp32 copy of the logits is never kept.
    from torch.utils.checkpoint import checkpoint

    again = torch.is_grad_enabled() and len(tokens) > ROWS
    rows = ROWS if torch.is_grad_enabled() else _rows_in_cache(logits)
    pieces = [
        checkpoint(rows_logprobs, *piece, temperature, use_reentrant=False)
        if again
        else rows_logprobs(*piece, temperature)
        for piece in zip(logits.split(rows), tokens.split(rows), strict=True)
    ]
    logprobs, entropy = (torch.cat(both) for both in zip(*pieces, strict=True))
    return logprobs, entropy
