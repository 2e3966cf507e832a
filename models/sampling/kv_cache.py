"""The key-value cache of generation: memory reserved ahead, written in place, rows removed by closing gaps.

transformers' ``DynamicCache`` copies all keys and values at every token (a concatenation a layer), and again whenever
a row leaves. Here a token is one small write, and a row that leaves costs one row's copy.
"""

import contextlib
from collections.abc import Iterator

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):
    """Keys and values ``(B, H, L, D)`` of one layer: the front of a larger tensor."""

    def __init__(self):
        super().__init__()
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None

    def put(self, rows: torch.Tensor, batch: int, length: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Place what a prompt left, ``(len(rows), H, l, D)``, in the last ``l`` of the first ``length`` columns."""
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

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; a row that stays in its place is not touched."""
        length = self.get_seq_length()
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(-1)
        for room in self.room:
            room[moved, :, :length] = room[indices[moved], :, :length]
        self._show(len(indices), length)

    def _reserve(self, batch: int, length: int, *like: torch.Tensor) -> None:
        """Room for half as many columns again (at least 64): growing costs a copy, and seldom happens."""
        room = length + max(64, length // 2)
        self.room = tuple(x.new_empty(batch, x.shape[1], room, x.shape[3]) for x in like)
        self.dtype, self.device, self.is_initialized = like[0].dtype, like[0].device, True

    def _show(self, batch: int, length: int) -> None:
        self.keys, self.values = (room[:batch, :, :length] for room in self.room)


class ReservedCache(DynamicCache):
    """transformers' cache for a model, with `ReservedLayer` wherever a layer attends to everything.

    Attributes:
        reserves: whether all layers do; else (sliding windows, recurrent layers) those keep transformers' own.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.layers = [ReservedLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        self.config = config
        self.reserves = bool(self.layers) and all(isinstance(layer, ReservedLayer) for layer in self.layers)

    @contextlib.contextmanager
    def reading(self, rows: torch.Tensor, batch: int, length: int) -> Iterator[DynamicCache]:
        """A cache to read the prompts of some ``rows`` with; they are in this one afterwards, flush on the right.

        Args:
            rows: ``(n,)`` which of the ``batch`` rows.
            batch: rows of this cache.
            length: columns of this cache.
        """
        if not self.reserves:
            yield self
            return
        part = DynamicCache(config=self.config)
        yield part
        for layer, read in zip(self.layers, part.layers, strict=True):
            layer.put(rows, batch, length, read.keys, read.values)
            read.reset()
