"""Log-probabilities, entropies, exact KL, values and scores of given tokens.

One layout everywhere: prompts left-padded, responses right-padded, so that the response stands in the same columns of
every row and logits are computed at response positions only. Masks, never pad ids, decide what is real. Where the
model allows it the rows go through packed, without padding (`models.passes.packed`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ppo_vs_dpo.models.loading.pretrained import score_head
from ppo_vs_dpo.models.passes.fused import packed_states
from ppo_vs_dpo.models.passes.packed import can_pack, forward_packed, pack

# Logits turned into log-probabilities at once: bounds the extra memory, and 1 MiB stays in a core's cache.
PIECE = 1 << 18
# Rows of logits whose entropy has gradients at once: bounds the extra memory to ROWS x vocabulary.
ROWS = 1024


@dataclass
class Batch:
    """Prompts and responses as tensors.

    Attributes:
        input_ids: ``(B, P + R)``.
        attention_mask: ``(B, P + R)``, 1 where real.
        position_ids: ``(B, P + R)``.
        response_ids: ``(B, R)``.
        response_mask: ``(B, R)`` bool, True where real.
        prompt_length: ``P``, padding included.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    response_ids: torch.Tensor
    response_mask: torch.Tensor
    prompt_length: int

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.__dict__.items()}
        return Batch(**moved)


def pad_batch(
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device | str = "cpu",
) -> Batch:
    """Put prompts (left-padded) and responses (right-padded) side by side.

    Args:
        prompt_ids: ``B`` prompts, none empty.
        response_ids: ``B`` responses; empty ones give a row without real response tokens.
        pad_id: fills the gaps; any token will do, also EOS.
    """
    longest_prompt = max(map(len, prompt_ids))
    longest_response = max(1, *map(len, response_ids))
    ids, mask, response, response_mask = [], [], [], []
    for prompt, answer in zip(prompt_ids, response_ids, strict=True):
        before, after = longest_prompt - len(prompt), longest_response - len(answer)
        padded = [*answer, *[pad_id] * after]
        real = [1] * len(answer) + [0] * after
        ids.append([*[pad_id] * before, *prompt, *padded])
        mask.append([0] * before + [1] * len(prompt) + real)
        response.append(padded)
        response_mask.append(real)
    attention_mask = torch.tensor(mask, device=device)
    return Batch(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(-1) - 1).clamp_min(0),
        response_ids=torch.tensor(response, device=device),
        response_mask=torch.tensor(response_mask, device=device, dtype=torch.bool),
        prompt_length=longest_prompt,
    )


def response_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits ``(N, V)`` that predict the ``N`` real response tokens, row by row; no others are computed."""
    if can_pack(model):
        packing = pack(batch.attention_mask)
        before = _positions_before_response(batch, packing.starts, packing.lengths)
        if not isinstance(base(model), PreTrainedModel):
            # A wrapper that must be called as a whole.
            return forward_packed(model, model, packing, batch.input_ids, logits_to_keep=before).logits[0]
        states = packed_states(backbone(model), base(model), packing, batch.input_ids, before)
        return base(model).get_output_embeddings()(states)
    length = batch.response_ids.shape[1]
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=length + 1,
        use_cache=False,
    ).logits
    return logits[:, -length - 1 : -1][batch.response_mask]


def _positions_before_response(batch: Batch, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """``(N,)`` packed position of the token before each real response token, row by row."""
    answers = batch.response_mask.sum(-1)
    first = starts + lengths - answers - 1
    offsets = batch.response_mask.long().cumsum(-1) - 1
    return (first[:, None] + offsets)[batch.response_mask]


class _Logprobs(torch.autograd.Function):
    """Log-probabilities of tokens under logits that nothing else needs: their memory becomes the probabilities.

    The backward pass needs these, and turns them into the gradient in place: one ``(N, V)`` tensor in all.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
        ctx.temperature, ctx.dtype, ctx.spent = temperature, logits.dtype, False
        probabilities = logits.detach().float()
        logprobs = probabilities.new_empty(len(tokens))
        rows = max(1, PIECE // logits.shape[-1])
        for piece, picked, out in zip(
            probabilities.split(rows), tokens[:, None].split(rows), logprobs.split(rows), strict=True
        ):
            if temperature != 1:
                piece.div_(temperature)
            top = piece.amax(-1, keepdim=True)
            chosen = piece.gather(-1, picked)
            total = piece.sub_(top).exp_().sum(-1, keepdim=True)
            piece.div_(total)
            out.copy_((chosen - top - total.log()).squeeze(-1))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(probabilities, tokens)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        # d log p_t / d logit_j = ([j = t] - p_j) / temperature
        if ctx.spent:
            raise RuntimeError("log-probabilities can be differentiated once: their memory is reused.")
        ctx.spent = True
        gradient, tokens = ctx.saved_tensors
        rows = max(1, PIECE // gradient.shape[-1])
        for piece, picked, share in zip(
            gradient.split(rows),
            tokens[:, None].split(rows),
            (grad / ctx.temperature)[:, None].split(rows),
            strict=True,
        ):
            piece.mul_(-share).scatter_add_(-1, picked, share)
        return gradient.to(ctx.dtype), None, None


def rows_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float):
    """Log-probability of ``tokens`` ``(N,)`` under ``logits`` ``(N, V)``, and the entropy ``(N,)``, in fp32."""
    scaled = logits.float() / temperature
    normaliser = scaled.logsumexp(-1)
    logprobs = scaled.gather(-1, tokens[:, None]).squeeze(-1) - normaliser
    # H = log Z - E[logit]
    return logprobs, normaliser - (scaled.softmax(-1) * scaled).sum(-1)


def response_logprobs(
    model: PreTrainedModel, batch: Batch, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities (and entropies) of the response tokens at a sampling temperature.

    Args:
        model: a causal language model.
        batch: from `pad_batch`.
        temperature: logits are divided by it, so that these are the probabilities the tokens were drawn with.
        with_entropy: also the entropy of each next-token distribution, in nats.

    Returns:
        ``(logprobs, entropy)``, each ``(B, R)`` fp32, 0 at padding; entropy is ``None`` unless asked for.
    """
    mask = batch.response_mask
    logits, tokens = response_logits(model, batch), batch.response_ids[mask]
    zeros = torch.zeros(mask.shape, device=mask.device, dtype=torch.float32)
    if not with_entropy:
        return zeros.masked_scatter(mask, _Logprobs.apply(logits, tokens, temperature)), None
    # With gradients, pieces are computed again in the backward pass: the fp32 copy of the logits is never kept.
    again = torch.is_grad_enabled() and len(tokens) > ROWS
    rows = ROWS if torch.is_grad_enabled() else max(1, PIECE // logits.shape[-1])
    pieces = [
        checkpoint(rows_logprobs, *piece, temperature, use_reentrant=False)
        if again
        else rows_logprobs(*piece, temperature)
        for piece in zip(logits.split(rows), tokens.split(rows), strict=True)
    ]
    logprobs, entropy = (torch.cat(both) for both in zip(*pieces, strict=True))
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)


@torch.no_grad()
def full_kl(
    model: PreTrainedModel, reference: PreTrainedModel, batch: Batch, temperature: float = 1.0
) -> torch.Tensor:
    """Exact KL(policy || reference) of every next-token distribution along the response, ``(B, R)`` in nats.

    Its sum over a sampled response is an unbiased estimate of the sequence KL (chain rule, papers.md 3.1.9), with the
    sum over the vocabulary done exactly at each sampled prefix. 0 at padding.
    """
    mask = batch.response_mask
    ours, theirs = response_logits(model, batch), response_logits(reference, batch)
    pieces = []
    for start in range(0, len(ours), ROWS):
        p = (ours[start : start + ROWS].float() / temperature).log_softmax(-1)
        q = (theirs[start : start + ROWS].float() / temperature).log_softmax(-1)
        pieces.append((p.exp() * (p - q)).sum(-1))
    zeros = torch.zeros(mask.shape, device=mask.device, dtype=torch.float32)
    return zeros.masked_scatter(mask, torch.cat(pieces)) if pieces else zeros


def backbone(model: PreTrainedModel) -> torch.nn.Module:
    """The transformer without its head (through a PEFT wrapper too)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, inner.base_model_prefix)


def base(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def score_head_of(model: torch.nn.Module) -> torch.nn.Module:
    """The scalar head, also where PEFT has wrapped it in ``ModulesToSaveWrapper``."""
    head = getattr(model, "score", None)
    return head if head is not None else score_head(model)


def response_values(value_model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Values ``(B, R)`` of the states before each response token, s_t = (prompt, response[:t]); 0 at padding."""
    mask = batch.response_mask
    if can_pack(value_model):
        packing = pack(batch.attention_mask)
        before = _positions_before_response(batch, packing.starts, packing.lengths)
        states = packed_states(backbone(value_model), base(value_model), packing, batch.input_ids, before)
    else:
        length = batch.response_ids.shape[1]
        states = _padded_states(value_model, batch.input_ids, batch.attention_mask)[:, -length - 1 : -1][mask]
    values = score_head_of(base(value_model))(states).squeeze(-1).float()
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def sequence_scores(
    reward_model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """The scalar head read at the last real token of each row, ``(B,)`` fp32; either padding side.

    Which tokens are real is the mask's word, so that a padding token equal to EOS changes nothing
    (Huang et al. 2024, detail 12). Equal for left and right padding up to rounding.
    """
    if can_pack(reward_model):
        packing = pack(attention_mask)
        last = packing.starts + packing.lengths - 1
        picked = packed_states(backbone(reward_model), base(reward_model), packing, input_ids, last)
    else:
        columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (attention_mask * columns).argmax(-1)
        states = _padded_states(reward_model, input_ids, attention_mask)
        picked = states[torch.arange(len(states), device=states.device), last]
    return score_head_of(base(reward_model))(picked).squeeze(-1).float()


def _padded_states(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Last hidden states ``(B, L, d)`` of the backbone on padded rows."""
    positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    return backbone(model)(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
    ).last_hidden_state
