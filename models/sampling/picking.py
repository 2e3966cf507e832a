"""One token a row: how it is drawn, by the inverse of the cumulative distribution, and where it is kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ppo_vs_dpo.artifacts.errors import UserError

# Tokens between two looks at which rows have ended, on an accelerator: a look makes the host wait for it.
LOOK_EVERY = 8


@dataclass
class Drawn:
    """What has been drawn for ``B`` rows of at most ``T`` tokens.

    Attributes:
        tokens: ``(B, T)``; what a row samples after its end means nothing.
        lengths: ``(B,)`` tokens up to the end.
        finished: ``(B,)`` whether a row ended by itself.
        figures: ``(2, B, T)`` log-probabilities and entropies, where they are asked for.
        peaks: ``()`` the sum of all logits' maxima: finite where all are.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    finished: torch.Tensor
    figures: torch.Tensor | None
    peaks: torch.Tensor

    @classmethod
    def empty(cls, rows: int, most: int, with_logprobs: bool, device: torch.device) -> "Drawn":
        """Nothing yet, of ``rows`` rows."""
        return cls(
            tokens=torch.zeros(rows, most, dtype=torch.long, device=device),
            lengths=torch.full((rows,), most, device=device),
            finished=torch.zeros(rows, dtype=torch.bool, device=device),
            figures=torch.zeros(2, rows, most, device=device) if with_logprobs else None,
            peaks=torch.zeros((), device=device),
        )


@dataclass
class SamplingConfig:
    """How completions are drawn.

    Example::

        from ppo_vs_dpo import SamplingConfig

        plain = SamplingConfig(max_new_tokens=64)  # temperature 1, the whole distribution
        greedy = SamplingConfig(max_new_tokens=64, temperature=0.0)

    Attributes:
        max_new_tokens: the response budget, EOS included.
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with this mass; 1 keeps all.
        stop_strings: a response also ends where one of these appears in its text.
        batch_size: rows decoded at once, at most: on a GPU as many as its free memory takes.
        cuda_graphs: repeat the step of a token as a CUDA graph (`models.sampling.fixed`): ``None`` where device and
            model take it, ``False`` never, ``True`` or stop.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_strings: list[str] = field(default_factory=list)
    batch_size: int = 256
    cuda_graphs: bool | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; a response needs at least 1 token.")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError("sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0.")
        if not all(self.stop_strings):
            raise UserError("stop_strings has an empty text, which ends every response at its first token. Remove it.")

    @property
    def changes_distribution(self) -> bool:
        """Whether top-k or top-p sample from another policy than the model, whose KL is then not the model's."""
        return self.top_k > 0 or self.top_p < 1


def _filter(logits: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """Top-k, then top-p, on logits ``(B, V)`` already divided by the temperature."""
    if sampling.top_k > 0:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, before >= sampling.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def pick_tokens(logits: torch.Tensor, uniforms: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits: ``(B, V)``.
        uniforms: ``(B,)`` in [0, 1).

    Returns:
        ``(B,)`` token ids; ``argmax`` where the temperature is 0.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = _filter(logits.float() / sampling.temperature, sampling)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    targets = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    return picked.clamp_max(logits.shape[-1] - 1)


def uniform_rows(seeds: Sequence[int], length: int) -> torch.Tensor:
    """``(B, length)`` numbers in [0, 1), row i from the Philox stream of ``seeds[i]``."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(length) for seed in seeds]
    return torch.from_numpy(np.stack(rows))
