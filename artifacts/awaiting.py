"""Coroutines from plain code: one event loop in a thread of its own, for as long as the process lives.

A new loop for each call would close what a user's function keeps open between calls (sessions, connection pools).
"""

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Awaitable
from typing import TypeVar

Value = TypeVar("Value")

_lock = threading.Lock()
_running: tuple[int, asyncio.AbstractEventLoop] | None = None


def _loop() -> asyncio.AbstractEventLoop:
    global _running
    with _lock:
        # A forked child has the loop's memory and not its thread.
        if _running is None or _running[0] != os.getpid():
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="awaiting", daemon=True).start()
            _running = (os.getpid(), loop)
        return _running[1]


def wait_for(awaitable: Awaitable[Value], seconds: float | None = None) -> Value:
    """The result of an awaitable; whatever it raises is raised here.

    Raises:
        TimeoutError: it took longer.
    """

    async def whole() -> Value:
        return await asyncio.wait_for(awaitable, seconds)

    future = asyncio.run_coroutine_threadsafe(whole(), _loop())
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        raise TimeoutError("cancelled") from None
    except BaseException:
        future.cancel()  # Ctrl-C: nothing goes on behind one's back
        raise
