"""What a process uses: memory so far, seconds by part of its work, a model's size as cost is counted by."""

import contextlib
import gc
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of ``ru_maxrss``: kilobytes on Linux, bytes on macOS.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
# The parts of a stage's time; what belongs to none of them is "other".
PARTS = (
    "start-up", "imports", "loading", "tokenising", "sampling", "scoring", "training", "saving", "statistics",
    "report", "other",
)  # fmt: skip
# Those that come before a stage knows its name.
BEFORE = ("start-up", "imports")
# In a stage's environment: when the command started it, or its launcher (`time.monotonic`, one clock on a machine).
BEGAN = "PPO_VS_DPO_BEGAN"


def peak_memory() -> dict[str, float]:
    """``peak_memory_mb`` of this process and, with a GPU in use, ``gpu_peak_memory_mb`` as torch allocated it."""
    found = {"peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 2**20, 1)}
    torch = sys.modules.get("torch")  # a stage that never imported torch used no GPU
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found["gpu_peak_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return found


def age() -> float:
    """Wall-clock seconds since this process was started; since Python began to load it, where nobody says."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - _imported


def lived() -> float:
    """Wall-clock seconds since a command started this process, or the launcher that did; `age`, where none says so."""
    with contextlib.suppress(KeyError, ValueError):
        return max(age(), time.monotonic() - float(os.environ[BEGAN]))
    return age()


def cpu_seconds() -> float:
    """CPU time of this process and of those that it started and waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


_imported = time.monotonic()
_spent: dict[str, float] = {"start-up": lived()}
_open: list[tuple[str, float]] = []


def begin_again() -> None:
    """In a process that was forked to do a stage's work: what its parent has taken is not of its time."""
    _open.clear()
    _spent.clear()
    _spent["start-up"] = lived()


def seconds_by_part() -> dict[str, float]:
    """Wall-clock seconds of this process by part, parts that are still open left out."""
    return dict(_spent)


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Count the block's wall-clock seconds as one of `PARTS`; those of a part inside it are the inner one's alone.

    Also a decorator. Of the main thread only: what other threads do, it waits for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _turn(time.monotonic())
    _open.append((name, time.monotonic()))
    try:
        yield
    finally:
        now = time.monotonic()
        _turn(now)
        _open.pop()
        if _open:
            _open[-1] = (_open[-1][0], now)


def _turn(now: float) -> None:
    """Give the part of the moment what it has taken."""
    if _open:
        name, since = _open[-1]
        _spent[name] = _spent.get(name, 0.0) + now - since


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Around the imports of a process that is this project's own: no garbage is looked for while they run.

    Torch, transformers and TRL make a million objects, all of which stay: passing over them again and again is a fifth
    of the seconds of their import, and every later collection (the Trainer asks for some) passes over them, too.
    """
    before, enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        with part("imports"):
            yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if enabled:
            gc.enable()


def parameter_size(parameter: Any) -> int:
    """How many numbers a parameter stands for: of a shard those of all ranks, of packed 4-bit weights two a byte."""
    if type(parameter).__name__ == "Params4bit" and parameter.quant_state is not None:
        return parameter.quant_state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def parameters_without_embeddings(model: Any) -> int:
    """N of the rule "2 N FLOPs a token forward, 6 N with backward"; of a sharded model all parameters count."""
    from torch.nn import Embedding

    embeddings = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, Embedding)}
    return sum(parameter_size(parameter) for name, parameter in model.named_parameters() if name not in embeddings)
