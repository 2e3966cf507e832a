"""A pretended GPU for machines without one: tensors that say they are on it, with their values on the CPU.

torch has a way to write a device in Python (`torch.utils.backend_registration`). Every tensor on this one is a
`Shadow`: ``.device`` is ``pretend:0``, ``.is_cuda`` is True, and the values lie in an ordinary tensor inside. So the
real code runs on real data, backward passes and optimizers included, and what a GPU would refuse or wait for is seen
and counted by `Probe`: operations that mix host and device, waits of the host, copies to the device, operations, the
dtypes of matrix products, the largest tensor, and the bytes that an allocator would have handed out.

What it cannot show: kernels' own numbers and times, NCCL, DeepSpeed's engines. The registration is for the whole
process (``torch.accelerator`` is there afterwards), so this is for a process of its own.
"""

import collections
import contextlib
import math
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

NAME = "pretend"
ROOT = str(Path(__file__).parents[2])


class _Backend(backend_registration._DummyBackendModule):
    """What ``torch.pretend`` answers to autocast, checkpointing and saved generators."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def set_device(self, device) -> None:
        """There is one."""

    def synchronize(self, device=None) -> None:
        """Everything is done already."""

    def empty_cache(self) -> None:
        """There is none."""

    def get_rng_state(self, device=None) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state, device=None) -> None:
        """Nothing is drawn on the device."""


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(f"{NAME}:0")
aten = torch.ops.aten


# Weights that autocast has cast already; kept until the outermost block ends, as on CUDA.
CASTS: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A product's operand in half precision; a weight's copy is made once."""
    if x.dtype != torch.float32 or not (x.requires_grad and x.is_leaf and torch.is_autocast_cache_enabled()):
        return x.to(dtype) if x.dtype in (torch.float32, torch.bfloat16) else x
    if id(x) not in CASTS:
        CASTS[id(x)] = (x, x.to(dtype))
    return CASTS[id(x)][1]


def _register_autocast() -> list[torch.library.Library]:
    """Autocast's rule for products, as CUDA's: their operands in half precision. Others are left to the operation."""
    library, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    off = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def rule(function):
        def run(*args, **kwargs):
            dtype = torch.get_autocast_dtype(NAME)
            cast = tree_map_only(torch.Tensor, lambda x: _cast(x, dtype), args)
            with torch._C._ExcludeDispatchKeyGuard(off):
                return function(*cast, **kwargs)

        return run

    for name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"):
        library.impl(name, rule(getattr(aten, name)), "AutocastPrivateUse1")
    return [library, others]


_AUTOCAST = _register_autocast()

# The host needs a value, or a size that depends on values.
WAITS = {
    aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default,
    aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default,
            aten._index_put_impl_.default}  # fmt: skip
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
# Those may take a tensor of the host.
CROSSING = {aten._to_copy.default, aten.copy_.default, aten.lift_fresh.default, aten.detach.default,
            aten.alias.default, aten._local_scalar_dense.default}  # fmt: skip
# No kernel: another look at the same memory, or memory without values.
FREE = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand", "slice", "select",
    "unsqueeze", "squeeze", "split", "split_with_sizes", "unbind", "narrow", "chunk", "unfold", "diagonal", "detach",
    "alias", "as_strided", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
}  # fmt: skip


class MixedDevices(RuntimeError):
    """An operation got tensors of the host and of the device; CUDA refuses it."""


@dataclass
class Counts:
    """What happened in one part of the work.

    Attributes:
        operations: on the device, views aside: at least so many kernels.
        waits: of the host for the device, by the line that caused them.
        uploads: copies to the device, by line.
        products: matrix products by dtype.
        largest: bytes of the largest tensor, and where it was used.
        peak: bytes of all tensors of the device at once.
    """

    operations: int = 0
    waits: collections.Counter = field(default_factory=collections.Counter)
    uploads: collections.Counter = field(default_factory=collections.Counter)
    products: collections.Counter = field(default_factory=collections.Counter)
    largest: tuple[int, str] = (0, "")
    peak: int = 0


class _Allocated:
    """Bytes of the storages that any living `Shadow` looks at."""

    def __init__(self):
        self.bytes, self.users = 0, collections.Counter()

    def add(self, shadow: "Shadow") -> None:
        storage = shadow.inner.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self.users[key]:
            self.bytes += size
            if Probe.active is not None:
                Probe.active.reached(self.bytes)
        self.users[key] += 1
        # The storage is kept until then, so that its address means nothing else meanwhile.
        weakref.finalize(shadow, self._remove, key, size, storage)

    def _remove(self, key: int, size: int, storage: Any) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.bytes -= size


ALLOCATED = _Allocated()


class Shadow(torch.Tensor):
    """A tensor of the host that says it is on the device."""

    inner: torch.Tensor
    is_cuda = True

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        ALLOCATED.add(made)
        return made

    def untyped_storage(self):
        """Of the values: whoever saves a model asks what is shared."""
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with torch.no_grad():
                copied = self.detach().clone()
            if isinstance(self, torch.nn.Parameter) or getattr(self, "_is_param", False):
                copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Probe.active.run(func, args, kwargs or {})


def on_device(device: Any) -> bool:
    """Whether this names the pretended device."""
    return device is not None and torch.device(device).type == NAME


class _Factories(TorchFunctionMode):
    """``torch.tensor(..., device=...)`` asks the device before anything is dispatched: made here, then moved."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], Shadow):
            Probe.active.note("waits", "tolist")
            return args[0].inner.tolist()
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and on_device(kwargs.get("device")):
            device = kwargs.pop("device")
            made = func(*args, **kwargs)
            return made if isinstance(made, Shadow) else made.to(device)
        return func(*args, **kwargs)


class Probe(TorchDispatchMode):
    """Counts what reaches the pretended device while it is entered.

    Args:
        strict: raise `MixedDevices`, as a GPU would.

    Attributes:
        parts: counts by name; ``all`` is everything.
    """

    active: "Probe | None" = None

    def __init__(self, strict: bool = True):
        super().__init__()
        self.strict, self.parts, self._open = strict, collections.defaultdict(Counts), ["all"]
        self._factories = _Factories()

    def __enter__(self) -> "Probe":
        Probe.active = self
        self._factories.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._factories.__exit__(*error)
        Probe.active = None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[Counts]:
        """What happens inside counts under this name, too."""
        self._open.append(name)
        self.reached(ALLOCATED.bytes)
        try:
            yield self.parts[name]
        finally:
            self._open.remove(name)

    def reached(self, size: int) -> None:
        """So many bytes are allocated."""
        for name in self._open:
            self.parts[name].peak = max(self.parts[name].peak, size)

    def launched(self) -> None:
        """One operation more."""
        for name in self._open:
            self.parts[name].operations += 1

    def note(self, what: str, kind: str) -> None:
        """One wait or upload more, by the line of this project that asked for it."""
        where = self._where()
        for name in self._open:
            getattr(self.parts[name], what)[f"{kind} at {where}"] += 1

    def _where(self) -> str:
        frame = sys._getframe(2)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(ROOT) and "site-packages" not in name and name != __file__:
                return f"{name[len(ROOT) + 1 :]}:{frame.f_lineno}"
            frame = frame.f_back
        return "elsewhere"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        """One operation: counted, and carried out on the values."""
        leaves = tree_leaves((args, kwargs))
        shadows = [x for x in leaves if isinstance(x, Shadow)]
        target = kwargs.get("device")
        if not shadows and not on_device(target):
            return func(*args, **kwargs)
        host = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Shadow)]
        self._count(func, args, kwargs, shadows, host)
        plain_args, plain_kwargs = tree_map_only(Shadow, lambda x: x.inner, (args, kwargs))
        if target is not None:
            plain_kwargs = {**plain_kwargs, "device": torch.device("cpu")}
        out = func(*plain_args, **plain_kwargs)
        leaves_device = target is not None and not on_device(target)
        if leaves_device or func in (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default):
            return out
        if func is aten.copy_.default and not isinstance(args[0], Shadow):
            return args[0]
        known = {id(x.inner): x for x in shadows}
        wrapped = tree_map(
            lambda x: known[id(x)] if id(x) in known else Shadow(x) if isinstance(x, torch.Tensor) else x, out
        )
        try:
            return return_and_correct_aliasing(func, args, kwargs, wrapped)
        except (AssertionError, RuntimeError, KeyError):
            # Not every operation's schema says what it aliases.
            return wrapped

    def _count(self, func, args, kwargs, shadows, host) -> None:
        name = func._schema.name.partition("::")[2].rstrip("_")
        if name not in FREE:
            self.launched()
        if func in WAITS:
            self.note("waits", name)
        self._transfer(func, args, kwargs, shadows, host)
        if func in INDEXING:
            self._index(func, name, args)
        elif func not in CROSSING and shadows and any(x.dim() > 0 and x.device.type == "cpu" for x in host):
            self._mixed(name)
        elif name in ("_fused_adamw", "_fused_adam") and host:
            self._mixed(name)  # the kernel reads the number of the step on the device
        if func in PRODUCTS and shadows:
            for part in self._open:
                self.parts[part].products[str(shadows[-1].dtype).removeprefix("torch.")] += 1
        for x in shadows:
            size = math.prod(x.shape) * x.element_size()
            for part in self._open:
                if size > self.parts[part].largest[0]:
                    self.parts[part].largest = (size, f"{name} {tuple(x.shape)} at {self._where()}")

    def _transfer(self, func, args, kwargs, shadows, host) -> None:
        target = kwargs.get("device")
        if func is aten._to_copy.default and target is not None:
            if shadows and not on_device(target):
                self.note("waits", "copy to the host")
            elif on_device(target) and not shadows:
                self.note("uploads", "copy")
        elif func is aten.copy_.default and isinstance(args[0], Shadow) != isinstance(args[1], Shadow):
            down = isinstance(args[1], Shadow)
            self.note("waits" if down else "uploads", "copy to the host" if down else "copy")

    def _index(self, func, name, args) -> None:
        value = args[2] if len(args) > 2 else None
        for index in (x for x in args[1] if isinstance(x, torch.Tensor)):
            if index.dtype in (torch.bool, torch.uint8) and (value is None or value.dim() > 0):
                self.note("waits", "boolean index")
            if isinstance(args[0], Shadow) and not isinstance(index, Shadow) and index.dim() > 0:
                self.note("uploads", "index of the host")
            elif not isinstance(args[0], Shadow) and isinstance(index, Shadow):
                self._mixed(name)
        if value is not None and value.dim() > 0 and isinstance(args[0], Shadow) != isinstance(value, Shadow):
            self._mixed(name)

    def _mixed(self, name: str) -> None:
        if self.strict:
            raise MixedDevices(f"{name} gets tensors of the host and of the device at {self._where()}")


@contextlib.contextmanager
def trainers_on_device() -> Iterator[None]:
    """Inside the block the pretended device is the one that trainers and their accelerator work on."""
    from accelerate import Accelerator, accelerator
    from transformers import TrainingArguments

    def autocast(native_amp=False, autocast_kwargs=None):
        return torch.autocast(NAME, torch.bfloat16) if native_amp else contextlib.nullcontext()

    theirs, accelerator.get_mixed_precision_context_manager = (
        accelerator.get_mixed_precision_context_manager, autocast,
    )  # fmt: skip
    clear, torch.clear_autocast_cache = torch.clear_autocast_cache, lambda: (clear(), CASTS.clear())[0]
    before = [(cls, cls.__dict__["device"]) for cls in (Accelerator, TrainingArguments)]
    for cls, found in before:
        # Asked for as always (the ranks meet there); only the answer is another.
        cls.device = property(lambda self, found=found: (found.fget(self), DEVICE)[1])
    try:
        yield
    finally:
        accelerator.get_mixed_precision_context_manager, torch.clear_autocast_cache = theirs, clear
        for cls, found in before:
            cls.device = found
