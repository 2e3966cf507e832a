"""The key-value cache of generation: memory reserved ahead, written in place, rows removed by closing gaps.

transformers' ``DynamicCache`` copies all keys and values at every token (a concatenation a layer), and again whenever
a row leaves. Here a token is one small write, and a row that leaves costs one row's copy. How long a row can get is
known before the first token, so what is reserved is what is needed, and nothing is ever copied to grow.
"""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ppo_vs_dpo.models.passes.padding import without_router

# Share of the device's free memory that one batch of rows may take: the rest is for the steps themselves.
SHARE = 0.8
# Bytes of a vocabulary entry and row while a token is picked: fp32 logits, and their distribution in fp64 twice.
PICKING = 24


def read(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    cache: Cache,
) -> torch.Tensor:
    """Read tokens ``(B, n)`` into the cache; logits ``(B, V)`` of the one after the last."""
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = "past_key_values"
    if "cache_params" in inspect.signature(type(owner).forward).parameters:
        # Mamba's: a state alone, into which a single token goes without a mask.
        name, attention_mask = "cache_params", None if input_ids.shape[1] == 1 else attention_mask
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=True,
        logits_to_keep=1,
        **{name: cache},
        **without_router(model),
    ).logits[:, -1]


class ReservedLayer(DynamicLayer):
    """Keys and values ``(B, H, L, D)`` of one layer: the front of a larger tensor.

    Args:
        capacity: columns to reserve; ``None`` where nobody knows.
    """

    def __init__(self, capacity: int | None = None):
        super().__init__()
        self.capacity = capacity
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None
        # Where the next token goes, on the device, once columns are fixed.
        self.column: torch.Tensor | None = None

    def put(self, rows: slice, batch: int, length: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Place what prompts left, ``(n, H, l, D)``, in the last ``l`` of the first ``length`` columns of ``rows``."""
        if self.room is None:
            self._reserve(batch, length, keys, values)
            self._show(batch, length)
            # What no prompt reaches is masked, but must be a number.
            self.keys.zero_()
            self.values.zero_()
        self.keys[rows, :, length - keys.shape[2] :] = keys
        self.values[rows, :, length - keys.shape[2] :] = values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append ``(B, H, n, D)``; returns all keys and values so far."""
        if self.column is not None:
            for shown, new in zip((self.keys, self.values), (key_states, value_states), strict=True):
                shown.index_copy_(2, self.column, new.to(shown.dtype))
            return self.keys, self.values
        batch, start = key_states.shape[0], self.get_seq_length()
        stop = start + key_states.shape[2]
        if self.room is None:
            self._reserve(batch, stop, key_states, value_states)
        elif stop > self.room[0].shape[2]:
            before = self.keys, self.values
            self._reserve(batch, stop, key_states, value_states)
            for room, old in zip(self.room, before, strict=True):
                room[:, :, :start] = old
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:batch, :, start:stop] = new
        self._show(batch, stop)
        return self.keys, self.values

    def fix(self, column: torch.Tensor, rows: int, columns: int) -> None:
        """From now on so many columns are seen, whatever is in them, and a token goes to ``column`` ``(1,)``."""
        if self.column is None:
            for room in self.room:
                # Masked, but must be a number.
                room[:, :, self.get_seq_length() :].zero_()
        self.column = column
        self._show(rows, columns)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; a row that stays in its place is not touched."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(-1)
        self.keep(len(indices), moved, indices[moved])

    def keep(self, rows: int, moved: torch.Tensor, sources: torch.Tensor) -> None:
        """Keep the first ``rows``, after the rows ``sources`` have taken the places ``moved``."""
        length = self.get_seq_length()
        for room in self.room:
            room[moved, :, :length] = room[sources, :, :length]
        self._show(rows, length)

    def _reserve(self, batch: int, length: int, *like: torch.Tensor) -> None:
        """Room for all that comes; where that is not known, for half as many columns again (at least 64)."""
        room = length + max(64, length // 2) if self.capacity is None else max(length, self.capacity)
        self.room = tuple(x.new_empty(batch, x.shape[1], room, x.shape[3], dtype=_kept_in(x)) for x in like)
        self.dtype, self.device, self.is_initialized = self.room[0].dtype, like[0].device, True

    def _show(self, batch: int, length: int) -> None:
        self.keys, self.values = (room[:batch, :, :length] for room in self.room)


def _kept_in(states: torch.Tensor) -> torch.dtype:
    """What attention computes with: under autocast rotary embeddings leave keys in fp32, which it would cast again at
    every token."""
    kind = states.device.type
    half = states.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if half else states.dtype


class ReservedCache(DynamicCache):
    """transformers' cache for a model, with `ReservedLayer` wherever a layer attends to everything.

    Args:
        config: of the model.
        capacity: columns that a row can get; ``None`` where nobody knows.

    Attributes:
        reserves: whether all layers do; else (sliding windows, recurrent layers) those keep transformers' own.
    """

    def __init__(self, config: PreTrainedConfig, capacity: int | None = None):
        super().__init__(config=config)
        self.layers = [ReservedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in self.layers]
        self.config = config
        self.reserves = bool(self.layers) and all(isinstance(layer, ReservedLayer) for layer in self.layers)

    def keep(self, rows: list[int], device: torch.device) -> torch.Tensor:
        """Keep these rows, in this order, of all layers at once.

        Returns:
            ``rows`` on the device.
        """
        moved = [place for place, row in enumerate(rows) if place != row]
        # One copy to the device, whatever the number of layers.
        both = torch.tensor([*rows, *moved], device=device)
        kept, places = both[: len(rows)], both[len(rows) :]
        for layer in self.layers:
            if isinstance(layer, ReservedLayer):
                layer.keep(len(rows), places, kept[places])
            elif hasattr(layer, "recurrent_states"):
                # Recurrent and convolutional states; a hybrid layer's keys and values with them.
                layer.reorder_cache(kept)
            else:
                layer.batch_select_indices(kept)
        return kept

    def fix(self, column: torch.Tensor, rows: int, columns: int) -> None:
        """`ReservedLayer.fix` for all layers, of the first ``rows``."""
        for layer in self.layers:
            layer.fix(column, rows, columns)

    @contextlib.contextmanager
    def reading(self, rows: slice, batch: int, length: int) -> Iterator[DynamicCache]:
        """A cache to read the prompts of some ``rows`` with; they are in this one afterwards, flush on the right.

        Args:
            rows: which of the ``batch`` rows.
        """
        if not self.reserves:
            yield self
            return
        part = DynamicCache(config=self.config)
        yield part
        for layer, read in zip(self.layers, part.layers, strict=True):
            layer.put(rows, batch, length, read.keys, read.values)
            read.reset()


def close_gaps(gone: list[bool]) -> list[int]:
    """Rows that stay: each in its place but for the last ones, which fill the gaps of those that are gone."""
    left = [row for row, ended in enumerate(gone) if not ended]
    late = iter(row for row in left if row >= len(left))
    return [next(late) if gone[place] else place for place in range(len(left))]


def row_bytes(config: PreTrainedConfig, columns: int, dtype: torch.dtype) -> int:
    """Bytes that decoding takes for one row: keys and values of all layers, and one row of logits."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * columns * dtype.itemsize + text.vocab_size * PICKING


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that nobody holds; ``None`` where it is not to be budgeted (a CPU's, a pretended one's)."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def rows_that_fit(model: PreTrainedModel, columns: int, wanted: int) -> int:
    """Rows decoded at once: those wanted, or as many as the device's free memory takes; at least one.

    Which rows share a batch changes nothing but rounding, so the limit needs no setting.
    """
    parameter = next(model.parameters())
    free = free_bytes(parameter.device)
    if free is None:
        return wanted
    kind = parameter.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
    return max(1, min(wanted, int(SHARE * free) // row_bytes(model.config, columns, dtype)))
