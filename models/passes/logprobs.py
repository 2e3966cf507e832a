"""Log-probabilities, entropies, exact KL, values and scores of given tokens.

One layout everywhere: prompts left-padded, responses right-padded, so that the response stands in the same columns of
every row and logits are computed at response positions only. Masks, never pad ids, decide what is real. Where the
model allows it the rows go through packed, without padding (`models.passes.packed`).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ppo_vs_dpo.models.loading.prepared import ScalarHead, score_head
from ppo_vs_dpo.models.passes.fused import packed_states
from ppo_vs_dpo.models.passes.head import head_logprobs, logits_logprobs, rows_at_once
from ppo_vs_dpo.models.passes.packed import Packing, can_pack, forward_packed, pack
from ppo_vs_dpo.models.passes.padding import check_length, check_reads_masks, check_rows, without_router
from ppo_vs_dpo.models.sharding.deepspeed import whole


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
        on_host: the two masks on the host, where they are known there: with them no pass waits for the device.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    response_ids: torch.Tensor
    response_mask: torch.Tensor
    prompt_length: int
    on_host: tuple[torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
        return Batch(**moved)

    @functools.cached_property
    def places(self) -> "Places":
        """Where its tokens are; worked out once for all models that read the batch."""
        masks = self.on_host or (self.attention_mask.cpu(), self.response_mask.cpu())
        return Places.of(*masks, self.input_ids.device)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values ``(N,)`` of the real response tokens in their places of ``(B, R)``; 0 at padding."""
        size = self.response_mask.shape
        return values.new_zeros(size.numel()).index_copy(0, self.places.real, values).view(size)


@dataclass
class Places:
    """Where the tokens of a `Batch` are.

    Attributes:
        packing: of all its tokens.
        real: ``(N,)`` the real response tokens in the flattened ``(B, R)``, row by row.
        before: ``(N,)`` the packed position of the token before each of them.
    """

    packing: Packing
    real: torch.Tensor
    before: torch.Tensor

    @classmethod
    def of(cls, attention_mask: torch.Tensor, response_mask: torch.Tensor, device: torch.device) -> "Places":
        """The places by masks ``(B, P + R)`` and ``(B, R)`` of the host, on a device."""
        packing = pack(attention_mask)
        real = response_mask.flatten().nonzero().squeeze(-1)
        first = packing.starts + packing.lengths - response_mask.sum(-1) - 1
        offsets = response_mask.long().cumsum(-1) - 1
        before = (first[:, None] + offsets)[response_mask]
        if device.type != "cpu":
            packing, (real, before) = packing.to(device, real, before)
        return cls(packing, real, before)


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
    attention_mask, real = torch.tensor(mask), torch.tensor(response_mask, dtype=torch.bool)
    return Batch(
        input_ids=torch.tensor(ids),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(-1) - 1).clamp_min(0),
        response_ids=torch.tensor(response),
        response_mask=real,
        prompt_length=longest_prompt,
        on_host=(attention_mask, real),
    ).to(device)


def response_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor | None:
    """States ``(N, d)`` before the real response tokens, row by row; ``None`` where the model's head cannot be called
    on its own."""
    owner = base(model)
    if not isinstance(owner, PreTrainedModel) or not can_pack(owner):
        return None
    places = batch.places
    check_length(owner, places.packing.groups.longest)
    return packed_states(backbone(model), owner, places.packing, batch.input_ids, places.before)


def response_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits ``(N, V)`` that predict the ``N`` real response tokens, row by row; no others are computed."""
    states = response_states(model, batch)
    if states is not None:
        return base(model).get_output_embeddings()(states)
    if can_pack(model):
        # A wrapper that must be called as a whole.
        places = batch.places
        return forward_packed(model, model, places.packing, batch.input_ids, logits_to_keep=places.before).logits[0]
    length = batch.response_ids.shape[1]
    check_rows(model, batch.places.packing.groups.longest)
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=length + 1,
        use_cache=False,
        **without_router(model),
    ).logits
    return logits[:, -length - 1 : -1].flatten(0, 1).index_select(0, batch.places.real)


def response_logprobs(
    model: PreTrainedModel, batch: Batch, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities (and entropies) of the response tokens at a sampling temperature.

    Example::

        from ppo_vs_dpo import load_policy, load_tokenizer, response_logprobs
        from ppo_vs_dpo.models.passes.logprobs import pad_batch

        model, tokenizer = load_policy("my_model"), load_tokenizer("my_model")
        prompt, response = (tokenizer(text)["input_ids"] for text in ("the film", " was good"))
        batch = pad_batch([prompt], [response], tokenizer.pad_token_id)
        logprobs, _ = response_logprobs(model, batch)
        print(logprobs.shape)  # (1, tokens of the longest response)

    Args:
        batch: from `pad_batch`.
        temperature: logits are divided by it, so that these are the probabilities the tokens were drawn with.
        with_entropy: also the entropy of each next-token distribution, in nats.

    Returns:
        ``(logprobs, entropy)``, each ``(B, R)`` fp32, 0 at padding; entropy is ``None`` unless asked for.
    """
    if getattr(model, "adapters_off", False):
        # The policy itself, the way it always goes: a head in pieces, nothing on prompts in the last layer.
        with model.switched_off():
            return response_logprobs(model.policy, batch, temperature, with_entropy)
    tokens = batch.response_ids.flatten().index_select(0, batch.places.real)
    states = response_states(model, batch)
    if states is None:
        logprobs, entropy = logits_logprobs(response_logits(model, batch), tokens, temperature, with_entropy)
    else:
        head = base(model).get_output_embeddings()
        logprobs, entropy = head_logprobs(head, states, tokens, temperature, with_entropy)
    return batch.spread(logprobs), None if entropy is None else batch.spread(entropy)


@torch.no_grad()
def logits_in_pieces(
    models: Sequence[PreTrainedModel], batch: Batch, rows: int | None = None
) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Logits of several models at the same response tokens, a piece of rows at a time.

    Args:
        models: causal language models with one vocabulary.
        rows: of a piece; by default as many as `models.passes.head.rows_at_once` says.

    Yields:
        Which of the ``N`` real response tokens, and each model's logits ``(n, V)`` of them.
    """
    heads, sources = zip(*[_head_and_states(model, batch) for model in models], strict=True)
    rows = rows or rows_at_once(models[0].config.get_text_config().vocab_size)
    # Whole for all pieces, and no module called: ranks with different numbers of tokens must not gather at each.
    with whole([p for head in heads if head is not None for p in head.parameters()], write=False):
        for start in range(0, len(batch.places.real), rows):
            here = slice(start, start + rows)
            pairs = zip(heads, sources, strict=True)
            yield here, [x[here] if h is None else F.linear(x[here], h.weight, h.bias) for h, x in pairs]


def _head_and_states(model: PreTrainedModel, batch: Batch) -> tuple[torch.nn.Linear | None, torch.Tensor]:
    """A model's head and the states it reads; ``None`` and the logits where it is more than a linear layer."""
    if getattr(model, "adapters_off", False):
        with model.switched_off():
            return _head_and_states(model.policy, batch)
    owner = base(model)
    head = owner.get_output_embeddings() if isinstance(owner, PreTrainedModel) else None
    states = response_states(model, batch) if type(head) is torch.nn.Linear else None
    return (None, response_logits(model, batch)) if states is None else (head, states)


def token_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL of each next-token distribution from log-probabilities ``(..., V)`` of both, ``(...)`` in nats.

    A KL is never negative (Gibbs); the rounding of two models that are nearly one would be.
    """
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


@torch.no_grad()
def full_kl(
    model: PreTrainedModel, reference: PreTrainedModel, batch: Batch, temperature: float = 1.0
) -> torch.Tensor:
    """Exact KL(policy || reference) of every next-token distribution along the response, ``(B, R)`` in nats.

    Its sum over a sampled response is an unbiased estimate of the sequence KL (chain rule, papers.md 3.1.9), with the
    sum over the vocabulary done exactly at each sampled prefix. 0 at padding.
    """
    pieces = []
    for _, both in logits_in_pieces((model, reference), batch):
        p, q = ((logits.float() / temperature).log_softmax(-1) for logits in both)
        pieces.append(token_kl(p, q))
    zeros = torch.zeros(batch.response_mask.shape, device=batch.input_ids.device, dtype=torch.float32)
    return batch.spread(torch.cat(pieces)) if pieces else zeros


def backbone(model: PreTrainedModel) -> torch.nn.Module:
    """The transformer without its head (through a PEFT wrapper too)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, inner.base_model_prefix)


def base(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def score_head_of(model: torch.nn.Module) -> torch.nn.Module:
    """The scalar head, also where PEFT has wrapped it in ``ModulesToSaveWrapper``; its products are in fp32."""
    head = getattr(model, "score", None)
    head = head if head is not None else score_head(model)
    for layer in head.modules():
        if type(layer) is torch.nn.Linear:
            layer.__class__ = ScalarHead
    return head


def response_values(value_model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Values ``(B, R)`` of the states before each response token, s_t = (prompt, response[:t]); 0 at padding."""
    places = batch.places
    check_length(value_model, places.packing.groups.longest)
    if can_pack(value_model):
        inner = backbone(value_model)
        states = packed_states(inner, base(value_model), places.packing, batch.input_ids, places.before)
    else:
        length = batch.response_ids.shape[1]
        check_reads_masks(backbone(value_model))
        states = _padded_states(value_model, batch.input_ids, batch.attention_mask)[:, -length - 1 : -1]
        states = states.flatten(0, 1).index_select(0, places.real)
    return batch.spread(score_head_of(base(value_model))(states).squeeze(-1))


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
    return score_head_of(base(reward_model))(picked).squeeze(-1)


def _padded_states(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Last hidden states ``(B, L, d)`` of the backbone on padded rows."""
    positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    return backbone(model)(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
    ).last_hidden_state
