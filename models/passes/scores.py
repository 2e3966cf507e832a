"""How a model's score of a whole sequence is read: its own forward pass, or a faster way that agrees with it.

A decoder's score is a linear head on one state, so that packing or a mask can do what its forward pass does. Encoders
put a pooler, an activation or a token of their own between the two, and nobody can list all who do. So the fast way is
taken only where a probe finds that it gives the model's own logits; else the model itself is asked.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ppo_vs_dpo.artifacts.errors import UserError, first_sentence
from ppo_vs_dpo.models.devices import not_finite
from ppo_vs_dpo.models.loading.pretrained import context_length
from ppo_vs_dpo.models.passes.logprobs import backbone, score_head_of, sequence_scores
from ppo_vs_dpo.models.passes.logprobs import base as inside
from ppo_vs_dpo.models.sharding.deepspeed import whole

# Largest difference that rounding makes, relative to 1 + |score|.
TOLERANCE = 1e-4
# In half precision scores are known to a few percent of their spread over rows; a wrong reading is off by all of it.
HALF_TOLERANCE = 0.15
# What an architecture that the fast way does not know may raise; then its own forward pass is asked.
UNKNOWN_SHAPE = (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError, UserError)


class Reader:
    """Scores of token rows by one model.

    Args:
        model: a sequence-classification model with one label, or a scalar role on a shared base.
        pad_id: fills short rows; the config's own wins where it has one.
        by_mask: the score stands at the last real token, whatever it is (how this project trains, and OpenRLHF, TRL's
            and LLaMA-Factory's value heads); else where transformers puts it, at the last token that is not padding.
        special_ids: tokens that a probe had better not use.
        end_id: the end-of-sequence token, for architectures that read their score there (BART).

    Attributes:
        fast: the head is read at the last token directly; else the model's own forward pass is asked.
        alone: rows of different lengths in one batch change this model's scores: each row goes by itself.
        causal: a token's state does not depend on what follows it.

    Raises:
        UserError: it does not give one number a sequence, or gives NaN.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        pad_id: int = 0,
        by_mask: bool = True,
        special_ids: Sequence[int] = (),
        end_id: int | None = None,
    ):
        config = getattr(model, "config", None)
        own_pad = getattr(config.get_text_config(), "pad_token_id", None) if config is not None else None
        self.pad_id = pad_id if own_pad is None else own_pad
        # The padding token that transformers steps over at a row's end; none where the mask alone decides.
        self.skipped = None if by_mask else own_pad
        self.fast, self.alone, self.causal = True, False, True
        if not isinstance(inside(model), PreTrainedModel):
            return  # a role on a shared base: an adapter of a decoder and a linear head, nothing else
        self._probe(model, set(special_ids), end_id)

    @torch.no_grad()
    def _probe(self, model: torch.nn.Module, special: set[int], end: int | None) -> None:
        size = inside(model).get_input_embeddings().weight.shape[0]
        size = getattr(inside(model).get_input_embeddings(), "num_embeddings", size)
        plain = [i for i in range(size) if i not in {*special, self.pad_id, self.skipped}] or [0]
        # Spread over the vocabulary; neighbours would say little where embeddings repeat.
        long = [plain[(7 * i + 3) * max(1, len(plain) // 64) % len(plain)] for i in range(24)]
        room = (context_length(model) or 10) - 1
        pieces = ((0, 9), (9, 4), (3, 7), (12, 5), (6, 8), (17, 6))
        rows = [long[start : start + max(1, min(length, room))] for start, length in pieces]
        device = next(model.parameters()).device
        full = _is_full(model)
        with _head_that_speaks(model):
            try:
                own = [self._own(model, *padded_rows([row], self.pad_id, device)) for row in rows]
            except UNKNOWN_SHAPE as error:
                if end is None:
                    raise _unusable(model, error) from error
                rows = [[*row, end] for row in rows]
                try:
                    own = [self._own(model, *padded_rows([row], self.pad_id, device)) for row in rows]
                except UNKNOWN_SHAPE as again:
                    raise _unusable(model, again) from again
            for scores in own:
                if scores.shape != (1,):
                    raise UserError(
                        f"{type(inside(model)).__name__} gives {tuple(scores.shape)} for one sequence; a reward model "
                        f"gives one number. Take a sequence-classification model with one label."
                    )
            expected = torch.cat(own)
            if not expected.isfinite().all():
                raise not_finite(inside(model), "gives ordinary tokens scores")
            allowed = TOLERANCE * (1 + expected.abs()) if full else HALF_TOLERANCE * expected.std()
            self.fast = self._agrees(model, rows, expected, allowed, fast=True)
            if not self.fast:
                self.alone = not self._agrees(model, rows, expected, allowed, fast=False)
        self.causal = _is_causal(model, torch.tensor([rows[0]], device=device), TOLERANCE if full else 0.02)

    def _agrees(self, model, rows: list[list[int]], expected: torch.Tensor, allowed: torch.Tensor, fast: bool) -> bool:
        """Whether a padded batch of the rows gives their own scores, by the fast way or by the forward pass."""
        way = self._fast if fast else self._own
        try:
            found = way(model, *padded_rows(rows, self.pad_id, expected.device))
        except UNKNOWN_SHAPE:
            return False
        return found.shape == expected.shape and bool(((found - expected).abs() <= allowed).all())

    def __call__(
        self,
        model: torch.nn.Module,
        ids: torch.Tensor,
        mask: torch.Tensor,
        token_types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores ``(B,)`` in fp32.

        Args:
            model: the one that was probed (or the engine's module that took its place).
            ids: ``(B, L)``, padded with `pad_id`.
            mask: ``(B, L)``.
            token_types: ``(B, L)`` where the tokenizer tells two texts apart; for the model's own forward pass.
        """
        if self.fast:
            return self._fast(model, ids, mask)
        if not self.alone:
            return self._own(model, ids, mask, token_types)
        rows = []
        for row in range(len(ids)):
            real = mask[row].bool()
            types = None if token_types is None else token_types[row : row + 1, real]
            rows.append(self._own(model, ids[row : row + 1, real], mask[row : row + 1, real], types))
        return torch.cat(rows)

    def _fast(self, model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.skipped is None:
            return sequence_scores(model, ids, mask)
        # Padding tokens at a row's end are stepped over, real or not. They change no state before them.
        columns = torch.arange(ids.shape[1], device=ids.device)
        last = ((ids != self.skipped) & mask.bool()) * columns
        return sequence_scores(model, ids, mask * (columns <= last.amax(-1, keepdim=True)).to(mask.dtype))

    @staticmethod
    def _own(model, ids: torch.Tensor, mask: torch.Tensor, token_types: torch.Tensor | None = None) -> torch.Tensor:
        takes_types = "token_type_ids" in inspect.signature(inside(model).forward).parameters
        extra: dict[str, Any] = {"token_type_ids": token_types} if token_types is not None and takes_types else {}
        logits = model(input_ids=ids, attention_mask=mask, **extra).logits
        return logits.squeeze(-1).float() if logits.dim() == 2 and logits.shape[-1] == 1 else logits.float()


def padded_rows(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and their mask, each ``(B, L)``."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def _unusable(model: torch.nn.Module, error: Exception) -> UserError:
    first = first_sentence(error)
    return UserError(f"{type(inside(model)).__name__} cannot score a sequence of token ids: {first}")


def _is_full(model: torch.nn.Module) -> bool:
    return next(p for p in model.parameters() if p.is_floating_point()).dtype in (torch.float32, torch.float64)


@contextlib.contextmanager
def _head_that_speaks(model: torch.nn.Module) -> Iterator[None]:
    """A head of zeros scores 0 whatever is read; it takes other weights while it is looked at."""
    try:
        weight = score_head_of(inside(model)).weight
    except UNKNOWN_SHAPE:
        yield
        return
    with whole([weight]):  # under ZeRO-3 a rank may hold nothing of it
        silent = not weight.any()
        if silent:
            weight.copy_(torch.linspace(-1, 1, weight.numel(), device=weight.device).view_as(weight).to(weight.dtype))
    try:
        yield
    finally:
        if silent:
            with whole([weight]):
                weight.zero_()


def is_encoder(model: torch.nn.Module) -> bool:
    """Whether an architecture was made to read both ways, by the names that transformers knows it under."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    return kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(model.config, "is_encoder_decoder", False)


def _is_causal(model: torch.nn.Module, ids: torch.Tensor, tolerance: float) -> bool:
    """Whether the states of the first tokens stay when the last one is taken away."""
    if getattr(inside(model).config, "is_encoder_decoder", False):
        return False
    try:
        whole, cut = (backbone(model)(input_ids=part)[0] for part in (ids, ids[:, :-1]))
        scale = 1 + cut.abs().amax()
        return bool((whole[:, :-1] - cut).abs().amax() <= tolerance * scale)
    except UNKNOWN_SHAPE:
        return not is_encoder(inside(model))
