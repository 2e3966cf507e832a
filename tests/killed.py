"""A program that is killed at a state, not at a time: right after a call that brought it about, on any machine."""

import signal
import subprocess
import sys

from tests import warm

CODE = """
import importlib, os, runpy, signal, sys
place, after, module, *arguments = sys.argv[1:]
holder, _, name = place.rpartition(".")
try:
    owner = importlib.import_module(holder)
except ModuleNotFoundError:  # a method: package.module.Class.method
    package, _, attribute = holder.rpartition(".")
    owner = getattr(importlib.import_module(package), attribute)
original, calls = getattr(owner, name), 0

def counted(*args, **keys):
    global calls
    found = original(*args, **keys)
    calls += 1
    if calls == int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    return found

setattr(owner, name, counted)
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def killed_after(place: str, calls: int, module: str, *arguments: str) -> None:
    """Run ``python -m module arguments`` until a function has returned so often; then it is gone, as by ``kill -9``.

    Args:
        place: the function, where the program looks it up (``package.module.function`` or ``...Class.method``).
        calls: how often.
        module: the program.
        arguments: its.
    """
    command = [sys.executable, "-c", CODE, place, str(calls), module, *arguments]
    with warm.forks():
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
