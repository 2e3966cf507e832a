"""Ranks that wait for one another: a word before a collective gives up, and a meeting that never does."""

import contextlib
import datetime
import faulthandler
import itertools
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

from ppo_vs_dpo.artifacts.errors import warn

# Seconds that a collective may take: torch's half an hour, everywhere.
PATIENCE = 1800.0
# So many seconds before, a rank says what it is doing.
BEFORE = 30.0
_meetings = itertools.count()
# In the ranks' store: where each stood when it had been in one step for too long.
STOOD = "ppo_vs_dpo/stood"
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))


def ranks() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join_on_cpu(patience: float, backend: str | None = None) -> None:
    """Join the ranks that a launcher started, each collective to be given up after so many seconds.

    With an accelerator or DeepSpeed transformers does that, with ``ddp_timeout``. On a CPU it leaves the timeout out,
    and a rank that hangs is waited for as long as torch's own half an hour.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group(backend or "gloo", timeout=datetime.timedelta(seconds=patience))


@contextlib.contextmanager
def watched(name: Callable[[], str], patience: float) -> Iterator[None]:
    """While the block runs on several ranks: a step that lasts nearly as long as a collective may is named on stderr.

    So is the line that this rank is at, which the others find in `not_waiting`.

    Args:
        name: of the step under way; asked from another thread, and a new answer is a new step.
        patience: seconds a collective may take.
    """
    if ranks() == 1:
        yield
        return
    if not faulthandler.is_enabled():
        # Stacks of all threads where NCCL's watchdog ends the process.
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no stderr of the system's own
            faulthandler.enable()
    allowed = max(patience - BEFORE, 0.75 * patience)
    ended, thread_of_work, rank = threading.Event(), threading.get_ident(), os.environ.get("RANK", "0")

    def watch() -> None:
        now, since, said = name(), time.monotonic(), False
        while not ended.wait(min(1.0, allowed / 20)):
            if name() != now:
                if said:
                    _note(rank, "")
                now, since, said = name(), time.monotonic(), False
            elif not said and time.monotonic() - since > allowed:
                said = True
                place, waits = standing(thread_of_work)
                what = "waits for the others at" if waits else "does not wait for others: it is at"
                _note(rank, "" if waits else place)
                warn(
                    f"rank {rank} has been in this step for {allowed:.0f} s: {now}. It "
                    f"{what} {place}. A collective is given up after {patience:.0f} s (ddp_timeout): a rank that is "
                    f"not waiting, names another step, or none, is the one the others wait for.\n"
                )
                sys.stderr.flush()
        if said:  # it has got on after all: nobody is to be told of it later
            _note(rank, "")

    thread = threading.Thread(target=watch, name="named step", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def standing(thread: int) -> tuple[str, bool]:
    """The line that a thread is at, ``"slow (rewards.py, line 3)"``, and whether it waits there for other ranks.

    In a library's midst the line of one's own that called it is added. DDP's and DeepSpeed's collectives of the
    backward pass lie below Python: a rank that waits in one is seen at the pass.
    """
    frame, frames = sys._current_frames().get(thread), []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    if not frames:
        return "its end", False
    inner = frames[0][0].replace(os.sep, "/")
    waits = "/torch/distributed/" in inner or frames[0][0] == __file__
    own = next((one for one in frames if not one[0].startswith((*_LIBRARIES, "<"))), frames[0])
    words = [f"{name} ({file}, line {line})" for file, line, name in dict.fromkeys((frames[0], own))]
    return ", called by ".join(words), waits


def not_waiting() -> list[str]:
    """Of ranks that were too long in one step without waiting for others: number and line, as they noted it."""
    found = []
    with contextlib.suppress(RuntimeError, ValueError, OSError):  # the store is gone with the rank that keeps it
        store = dist.distributed_c10d._get_default_store()
        for rank in range(ranks()):
            key = f"{STOOD}/{rank}"
            if store.check([key]) and (place := store.get(key).decode(errors="replace")):
                found.append(f"rank {rank} is at {place}")
    return found


def _note(rank: str, place: str) -> None:
    with contextlib.suppress(RuntimeError, ValueError, OSError):
        dist.distributed_c10d._get_default_store().set(f"{STOOD}/{rank}", place)


def meet(pause: float = 0.2, patience: float = 10 * PATIENCE) -> None:
    """Wait for all ranks, however long one of them works alone (merging, saving): no collective is under way.

    Args:
        pause: seconds between two looks, once it takes long.
        patience: seconds after which nobody will come any more.

    Raises:
        RuntimeError: ``patience`` is over.
    """
    world = ranks()
    if world == 1:
        return
    store, key = dist.distributed_c10d._get_default_store(), f"ppo_vs_dpo/meeting/{next(_meetings)}"
    _until(store, key, 1, world, pause, patience)
    # The first rank keeps the store: it leaves when all others have seen that all are there.
    if dist.get_rank() == 0:
        _until(store, f"{key}/seen", 0, world - 1, pause, patience)
    else:
        store.add(f"{key}/seen", 1)


def _until(store: dist.Store, key: str, mine: int, wanted: int, pause: float, patience: float) -> None:
    """Add ``mine`` to a counter, and look at it until it is what is ``wanted``."""
    count, started = store.add(key, mine), time.monotonic()
    while count < wanted:
        waited = time.monotonic() - started
        if waited > patience:
            raise RuntimeError(f"timed out after {waited:.0f} s: {count} of {wanted} ranks have come")
        # Short at first: most meetings are of ranks that arrive together.
        time.sleep(min(pause, 0.002 + waited / 10))
        count = store.add(key, 0)
