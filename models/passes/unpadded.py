"""TRL's trainers without the padding: the model is taught to skip it by itself.

TRL hands padded rows to the model. `skip_padding` changes what happens behind that call, on the instance only (its
class, its config and what is saved stay as they are): the rows go packed (`models.passes.packed`), the language-model
head
sees only the positions that carry loss, and a scalar head only the last token of each row. Where the rows are pairs,
chosen answers in the first half and rejected ones in the second, what a pair has in common, its prompt above all, goes
through once on a CPU. Equal to the padded pass up to rounding (tests/models/passes/test_unpadded.py).
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, SequenceClassifierOutputWithPast

from ppo_vs_dpo.models.passes.fused import packed_states
from ppo_vs_dpo.models.passes.logprobs import backbone, base, score_head_of, sequence_scores
from ppo_vs_dpo.models.passes.packed import Packing, Spread, can_pack, pack, share, upload

# Arguments of a backbone that mean nothing here.
_IGNORED = {"use_cache", "position_ids", "return_dict"}


@dataclass
class Kept:
    """The states that are wanted of padded rows: how the rows are packed, and ``(N,)`` packed places."""

    packing: Packing
    places: torch.Tensor

    @classmethod
    def of(
        cls, attention_mask: torch.Tensor, flat: torch.Tensor, device: torch.device, same: torch.Tensor | None = None
    ) -> "Kept":
        """The states at ``(N,)`` positions ``flat`` of the flattened rows; all is worked out on the host.

        ``same`` ``(2B, L)``: of pairs, where the ids of both rows are equal.
        """
        packing = pack(attention_mask)
        if same is not None and bool(attention_mask[:, 0].all()):
            alike = same & attention_mask.bool()
            # A state that is asked for is each row's own, so that none is asked for twice.
            alike.view(-1)[flat] = False
            first, second = alike.chunk(2)
            packing = share(packing, same.shape[1], (first & second).long().cumprod(1).sum(1))
        index = torch.zeros(attention_mask.numel(), dtype=torch.long)
        index[packing.order] = torch.arange(len(packing.order))
        if device.type == "cpu":
            return cls(packing, index[flat])
        packing, (places,) = packing.to(device, index[flat])
        return cls(packing, places)


def _teach_backbone(owner: PreTrainedModel) -> None:
    """The backbone takes ``keep``, a `Kept` of the padded rows, and gives the states that it names ``(1, N, d)``."""
    inner = backbone(owner)
    plain = inner.forward

    @functools.wraps(plain)
    def forward(input_ids=None, attention_mask=None, keep=None, **kwargs):
        padded = input_ids is not None and attention_mask is not None and attention_mask.dim() == 2
        others = {key for key, value in kwargs.items() if value is not None and value is not False} - _IGNORED
        if keep is None and (not padded or kwargs.get("use_cache") or others):
            return plain(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if keep is not None:
            states = packed_states(inner, owner, keep.packing, input_ids, keep.places, call=plain)
            return BaseModelOutputWithPast(last_hidden_state=states.unsqueeze(0))
        packing = pack(attention_mask)
        states = packed_states(inner, owner, packing, input_ids, call=plain)
        rows = Spread.apply(states, packing.order, input_ids.numel())
        return BaseModelOutputWithPast(last_hidden_state=rows.view(*input_ids.shape, -1))

    inner.forward = forward


def _same(owner: PreTrainedModel, input_ids: torch.Tensor, pairs: bool) -> list[torch.Tensor]:
    """Where the rows of each pair have the same token, twice ``(B, L)`` in one tensor; ``[]`` where the rows are no
    pairs, where dropout or noise gives each row states of its own, and off a CPU: there what attention gathers is some
    more launches a layer, and what that saves is not measured yet."""
    if not pairs or len(input_ids) % 2 or input_ids.device.type != "cpu":
        return []
    if owner.training:
        layers = any(isinstance(module, nn.Dropout) and module.p for module in owner.modules())
        # NEFTune (Jain et al. 2023) draws noise for each token of each row; transformers notes it on the embeddings.
        noise = getattr(owner.get_input_embeddings(), "neftune_noise_alpha", None)
        if layers or noise or getattr(owner.config, "attention_dropout", 0):
            return []
    first, second = input_ids.chunk(2)
    return [(first == second).repeat(2, 1)]


def skip_padding(model: PreTrainedModel, pairs: bool = False) -> bool:
    """Let a causal language model that a TRL trainer holds (a PEFT wrapper is looked through) run without padding.

    TRL's fused head (``model(..., labels=..., fused_lm_head=True)``) then works on the positions with a label alone.
    Call it after the trainer was built. Calls with a cache, as in generation, go the plain way.

    Args:
        pairs: the trainer hands over as many rejected rows as chosen ones, after these.

    Returns:
        Whether it does: not every architecture's attention can be replaced (`models.passes.packed.can_pack`).
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
        # One copy to the host, instead of a wait at each question.
        questions = [attention_mask.bool(), labels != -100, *_same(owner, input_ids, pairs)]
        shown, asked, *same = torch.stack(questions).cpu()
        rows, columns = asked[:, 1:].nonzero(as_tuple=True)
        # The token at column t is predicted from the state at column t - 1, and `mask` starts at column 1.
        flat = rows * labels.shape[1] + columns
        keep = Kept.of(shown.long(), flat, labels.device, *same)
        (targets,) = (flat + 1,) if labels.device.type == "cpu" else upload([flat + 1], labels.device)
        output = fused(
            input_ids=input_ids,
            attention_mask=attention_mask,
            shift_labels=labels.flatten().index_select(0, targets).unsqueeze(0),
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


def score_at_last_token(model: PreTrainedModel, pairs: bool = False) -> None:
    """Let a sequence-classification model read its score at the last real token by the mask, without padding.

    transformers finds that token by comparing with the pad id: where padding is the end-of-sequence token, it reads
    one token too early and the score of a finished response is never trained (Huang et al. 2024, detail 12).

    Args:
        pairs: as for `skip_padding`.
    """
    owner = base(model)
    packable = can_pack(owner)
    if packable:
        _teach_backbone(owner)

    @functools.wraps(type(owner).forward)
    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if packable:
            shown, *same = torch.stack([mask.bool(), *_same(owner, input_ids, pairs)]).cpu()
            columns = torch.arange(mask.shape[1])
            last = (shown * columns).argmax(-1) + torch.arange(len(mask)) * mask.shape[1]
            keep = Kept.of(shown.long(), last, mask.device, *same)
            states = backbone(owner)(input_ids=input_ids, attention_mask=mask, keep=keep).last_hidden_state[0]
            scores = score_head_of(owner)(states)
        else:
            scores = sequence_scores(owner, input_ids, mask).unsqueeze(-1)
        return SequenceClassifierOutputWithPast(logits=scores)

    owner.forward = forward
