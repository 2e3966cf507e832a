"""A CUDA graph's stand-in: what torch did in one call is recorded, and repeated on the same memory.

As a CUDA graph does: nothing of Python runs again, so numbers that Python worked out stay what they were, and every
tensor stays at its address. A capture leaves no trace in the values; an operation that makes the host wait ends it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default,
    aten.masked_select.default, aten._unique2.default, aten.lift_fresh.default,
}  # fmt: skip


def plain(x: Any) -> Any:
    """The values of a tensor that only says where it is (`tests.device.pretended.Shadow`)."""
    inner = getattr(x, "inner", None)
    return inner if isinstance(inner, torch.Tensor) else x


def tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors, as values."""
    return [plain(x) for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class RecordedGraph:
    """Repeats a step.

    Args:
        step: called once.

    Attributes:
        made: all there have been.
        replays: how often it was repeated.

    Raises:
        RuntimeError: the step makes the host wait, as in a capture.
    """

    made: list["RecordedGraph"] = []

    def __init__(self, step: Callable[[], None]):
        self.replays, self.calls = 0, []
        recorder = _Recorder(self.calls)
        try:
            with recorder:
                step()
        finally:
            for storage, values in recorder.before.values():
                storage.copy_(values)
        RecordedGraph.made.append(self)

    def __call__(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, out in self.calls:
                again = function(*args, **kwargs)
                for place, value in zip(out, tensors(again), strict=True):
                    if place is not value:
                        place.copy_(value)
        self.replays += 1


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list):
        super().__init__()
        self.calls, self.before = calls, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = zip(func._schema.arguments, args, strict=False)
        for argument, value in [*given, *((a, kwargs.get(a.name)) for a in func._schema.arguments)]:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for written in tensors(value):
                    storage = written.untyped_storage()
                    self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        shares = [result.alias_info for result in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in shares):
            # Another look at the same memory needs no repeating.
            kept_args, kept_kwargs = tree_map(plain, (args, kwargs))
            if "device" in kept_kwargs:
                kept_kwargs["device"] = torch.device("cpu")
            self.calls.append((func, kept_args, kept_kwargs, tensors(out)))
        return out
