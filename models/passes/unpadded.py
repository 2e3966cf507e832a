"""TRL's trainers without the padding: the model is taught to skip it by itself.

TRL hands padded rows to the model. `skip_padding` changes what happens behind that call, on the instance only (its
class, its config and what is saved stay as they are): the rows go packed (`models.passes.packed`), the language-model
head
sees only the positions that carry loss, and a scalar head only the last token of each row. Equal to the padded pass
up to rounding (tests/models/passes/test_unpadded.py).
"""

import functools
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, SequenceClassifierOutputWithPast

from ppo_vs_dpo.models.passes.fused import packed_states
from ppo_vs_dpo.models.passes.logprobs import backbone, base, score_head_of, sequence_scores
from ppo_vs_dpo.models.passes.packed import Packing, Spread, can_pack, pack, upload

# Arguments of a backbone that mean nothing here.
_IGNORED = {"use_cache", "position_ids", "return_dict"}


@dataclass
class Kept:
    """The states that are wanted of padded rows: how the rows are packed, and ``(N,)`` packed places."""

    packing: Packing
    places: torch.Tensor

    @classmethod
    def of(cls, attention_mask: torch.Tensor, flat: torch.Tensor, device: torch.device) -> "Kept":
        """The states at ``(N,)`` positions ``flat`` of the flattened rows; all is worked out on the host."""
        packing = pack(attention_mask)
        index = torch.zeros(attention_mask.numel(), dtype=torch.long)
        index[packing.order] = torch.arange(len(packing.order))
        if device.type == "cpu":
            return cls(packing, index[flat])
        return cls(packing.to(device), *upload([index[flat]], device))


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
        if isinstance(keep, Kept):
            states = packed_states(inner, owner, keep.packing, input_ids, keep.places, call=plain)
            return BaseModelOutputWithPast(last_hidden_state=states.unsqueeze(0))
        packing = pack(attention_mask)
        if keep is None:
            states = packed_states(inner, owner, packing, input_ids, call=plain)
            rows = Spread.apply(states, packing.order, input_ids.numel())
            return BaseModelOutputWithPast(last_hidden_state=rows.view(*input_ids.shape, -1))
        packed_index = torch.zeros(input_ids.numel(), dtype=torch.long, device=input_ids.device)
        packed_index[packing.order] = torch.arange(len(packing.order), device=input_ids.device)
        kept = packed_states(inner, owner, packing, input_ids, packed_index[keep], call=plain)
        return BaseModelOutputWithPast(last_hidden_state=kept.unsqueeze(0))

    inner.forward = forward


def skip_padding(model: PreTrainedModel) -> bool:
    """Let a causal language model that a TRL trainer holds (a PEFT wrapper is looked through) run without padding.

    TRL's fused head (``model(..., labels=..., fused_lm_head=True)``) then works on the positions with a label alone.
    Call it after the trainer was built. Calls with a cache, as in generation, go the plain way.

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
        shown, asked = torch.stack([attention_mask.bool(), labels != -100]).cpu()
        rows, columns = asked[:, 1:].nonzero(as_tuple=True)
        # The token at column t is predicted from the state at column t - 1, and `mask` starts at column 1.
        flat = rows * labels.shape[1] + columns
        keep = Kept.of(shown.long(), flat, labels.device)
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
