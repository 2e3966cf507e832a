"""Decoding at fixed addresses and shapes, so that a GPU can repeat the step of a token as a CUDA graph: one launch.

A step of a small batch costs less than launching its kernels: about 40 a layer. Here everything that a step reads and
writes stays in its place, counters of tokens and columns among it, and the host is asked for nothing: so a step can be
captured once and repeated. Attention sees the cache's columns up to a multiple of `BUCKET`, those that are not filled
yet masked; rows that have ended stay until half of those there have. Only then shapes change, and a step is captured
anew, after one that is carried out as always (what CUDA wants before a capture is done by it). A model's first capture
is held against a step that is carried out.

The same tokens as the loop in `models.sampling.generation`, up to the rounding of masked columns and other batch sizes
(tests/models/sampling/test_fixed.py, with a stand-in for the graph).
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.passes.head import rows_logprobs
from ppo_vs_dpo.models.passes.packed import can_pack
from ppo_vs_dpo.models.passes.padding import LOW_PRECISION, TOLERANCE
from ppo_vs_dpo.models.sampling.kv_cache import ReservedCache, close_gaps, read
from ppo_vs_dpo.models.sampling.picking import LOOK_EVERY, Drawn, SamplingConfig, pick_tokens
from ppo_vs_dpo.models.sharding.deepspeed import is_sharded

logger = logging.get_logger(__name__)

# Columns of the cache that attention sees: so many more at a time.
BUCKET = 256
# Steps that a capture must save to be worth its own time.
WORTH = 8
# Rotary embeddings that are chosen by the positions, on the host.
BY_POSITION = ("dynamic", "longrope", "su")


class CudaGraph:
    """One step, captured; each call repeats it.

    Args:
        step: called once, and carried out by no more than the calls.

    Raises:
        RuntimeError: it cannot be captured.
    """

    def __init__(self, step: Callable[[], None]):
        self.graph = torch.cuda.CUDAGraph()
        # Where a capture fails, torch stays on the stream that it captured on: the outer block brings this one back.
        # Other threads (NCCL's watchdog) may do as they like meanwhile.
        within = torch.cuda.stream(torch.cuda.current_stream())
        with within, torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            step()

    def __call__(self) -> None:
        self.graph.replay()


# What repeats a step, by the type of the device.
GRAPHS: dict[str, Callable[[Callable[[], None]], Callable[[], None]]] = {"cuda": CudaGraph}


def graphs_for(model: PreTrainedModel, sampling: SamplingConfig, device: torch.device) -> Callable | None:
    """What repeats a step of ``model``; ``None`` where it is to be carried out as it is.

    Raises:
        UserError: the settings ask for graphs (``cuda_graphs: true``), and there cannot be any; says why.
    """
    if sampling.cuda_graphs is False:
        return None
    why = _obstacle(model, device)
    if why is not None and sampling.cuda_graphs:
        raise UserError(f"cuda_graphs is true, and {why}. Leave it out: they are used wherever they can be.")
    return GRAPHS[device.type] if why is None else None


def _obstacle(model: PreTrainedModel, device: torch.device) -> str | None:
    name = type(model).__name__
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(one for one in rope.values() if isinstance(one, dict))]
    if device.type not in GRAPHS:
        return f"a {device.type} has none"
    if not can_pack(model):
        return f"{name} is not known to decode with a cache of fixed size"
    if any(kind.get("rope_type") in BY_POSITION for kind in kinds):
        return f"{name} chooses its rotary embedding by the positions, on the host"
    if getattr(model, "is_quantized", False):
        return "the kernels of quantized weights are not known to be captured"
    if is_sharded(next(model.parameters())):
        return "ZeRO-3 holds the weights"
    return getattr(model, "_not_captured", None)


class FixedDecoding:
    """The tokens after some prompts.

    Args:
        model: a causal language model that `graphs_for` takes.
        cache: with the prompts in it, flush on the right.
        logits: ``(B, V)`` of the first tokens.
        attention_mask: ``(B, P)`` of the prompts.
        uniforms: ``(B, T)`` in [0, 1), for ``T`` tokens.
        eos: ``(E,)`` tokens that end a row.
        sampling: how to draw.
        drawn: what is filled in.
        graph: what repeats a step, given the step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: ReservedCache,
        logits: torch.Tensor,
        attention_mask: torch.Tensor,
        uniforms: torch.Tensor,
        eos: torch.Tensor,
        sampling: SamplingConfig,
        drawn: Drawn,
        graph: Callable[[Callable[[], None]], Callable[[], None]],
    ):
        self.model, self.cache, self.eos, self.sampling, self.drawn = model, cache, eos, sampling, drawn
        self.graph, self.replay = graph, None
        (count, self.longest), self.most = attention_mask.shape, uniforms.shape[1]
        device = logits.device
        # At these addresses until rows leave: what a step reads and writes.
        self.logits, self.uniforms, self.peaks = logits, uniforms, drawn.peaks
        self.tokens, self.length, self.over = drawn.tokens.clone(), drawn.lengths.clone(), drawn.finished.clone()
        self.figures = None if drawn.figures is None else drawn.figures.clone()
        self.mask = torch.zeros(count, 1, 1, self._capacity, dtype=torch.bool, device=device)
        self.mask[:, 0, 0, : self.longest] = attention_mask.bool()
        self.position = attention_mask.sum(-1, keepdim=True)
        # The numbers of the token that is drawn and of the column that it goes to.
        self.at, self.column = (torch.full((1,), start, device=device) for start in (0, self.longest))
        # The rows' numbers in `drawn`, and how many columns a step sees.
        self.alive, self.columns = torch.arange(count, device=device), 0

    @property
    def _capacity(self) -> int:
        """Columns of the cache: the last token is not read."""
        return self.longest + self.most - 1

    def run(self, stopped: Callable[[torch.Tensor], list[bool]] | None = None) -> None:
        """Draw them all.

        Args:
            stopped: which rows of tokens ``(B, n)`` hold a stop string.
        """
        every = LOOK_EVERY if stopped is None else 1
        for step in range(self.most):
            last = step + 1 == self.most
            if last:
                self._draw()
            else:
                self._step(step)
            if stopped is not None:
                found = torch.tensor(stopped(self.tokens[:, : step + 1]), device=self.over.device)
                self._end(found, step + 1)
            if last or ((step + 1) % every == 0 and self._leave()):
                break
        self._note()
        self.replay = None

    def _step(self, step: int) -> None:
        """Draw and read one token: repeated where a step of this shape is captured."""
        columns = min(self._capacity, -(-(self.longest + step + 1) // BUCKET) * BUCKET)
        if self.replay is not None and columns == self.columns:
            self.replay()
            return
        self.replay, self.columns = None, columns
        self.cache.fix(self.column, len(self.alive), columns)
        self._advance()
        left = min(self.most - 1, columns - self.longest) - (step + 1)
        if self.graph is None or left < WORTH:
            return
        try:
            self.replay = self._captured()
        except RuntimeError as error:
            self.graph, name = None, type(self.model).__name__
            why = str(error).strip().splitlines()[0]
            self.model._not_captured = f"{name} could not be captured ({why})"
            logger.warning("Decoding goes on without CUDA graphs: %s.", self.model._not_captured)

    def _captured(self) -> Callable[[], None]:
        """A step, captured. A model's first is repeated once and carried out once from the same state, to see.

        Raises:
            RuntimeError: it cannot be captured, or gives other logits.
        """
        replay = self.graph(self._advance)
        if getattr(self.model, "_captured", False):
            return replay
        found = []
        kept = [one for one in vars(self).values() if isinstance(one, torch.Tensor)]
        for step in (replay, self._advance):
            before = [one.clone() for one in kept]
            step()
            found.append(self.logits.float().clone())
            for one, was in zip(kept, before, strict=True):
                one.copy_(was)
        repeated, right = found
        off = (repeated - right).abs().max() / right.abs().max()
        if not off <= TOLERANCE.get(self.logits.dtype, LOW_PRECISION):
            raise RuntimeError(f"a repeated step gave other logits, {float(off):.2g} off")
        self.model._captured = True
        return replay

    def _advance(self) -> None:
        """One step, in place; the host waits for nothing."""
        picked = self._draw()
        self.mask.index_fill_(3, self.column, True)
        seen = self.mask[..., : self.columns]
        self.logits.copy_(read(self.model, picked[:, None], seen, self.position, self.cache))
        self.position.add_(1)
        self.column.add_(1)

    def _draw(self) -> torch.Tensor:
        """One token a row, ``(B,)``, noted with what is asked for of it."""
        # NaN has no place in a distribution: the inverse of it is the last token, for ever. A sum hands it on.
        self.peaks.add_(self.logits.amax())
        picked = pick_tokens(self.logits, self.uniforms.index_select(1, self.at).squeeze(1), self.sampling)
        self.tokens.index_copy_(1, self.at, picked[:, None])
        if self.figures is not None:
            found = torch.stack(rows_logprobs(self.logits, picked, self.sampling.temperature))
            self.figures.index_copy_(2, self.at, found[..., None])
        self.at.add_(1)
        self._end((picked[:, None] == self.eos).any(-1), self.at)
        return picked

    def _end(self, ended: torch.Tensor, length: torch.Tensor | int) -> None:
        """These rows have ended after so many tokens, if they had not before."""
        self.length.copy_(torch.where(ended & ~self.over, length, self.length))
        self.over.logical_or_(ended)

    def _leave(self) -> bool:
        """Half of the rows leave where they have ended; whether all have."""
        gone = self.over.tolist()
        rows = close_gaps(gone)
        if not rows or 2 * len(rows) > len(gone):
            return not rows
        self._note()
        keep = self.cache.keep(rows, self.alive.device)
        for name in ("alive", "logits", "uniforms", "tokens", "length", "over", "mask", "position"):
            setattr(self, name, getattr(self, name)[keep])
        self.figures = None if self.figures is None else self.figures[:, keep]
        self.replay = None
        return False

    def _note(self) -> None:
        """Fill in what the rows that are here have come to."""
        self.drawn.tokens[self.alive], self.drawn.lengths[self.alive] = self.tokens, self.length
        self.drawn.finished[self.alive] = self.over
        if self.figures is not None:
            self.drawn.figures[:, self.alive] = self.figures
