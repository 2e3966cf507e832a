"""Programs of this project as forks of the test's process, which has loaded the libraries: no six seconds of imports.

Inside `forks`, ``python -m ppo_vs_dpo.MODULE ...``, ``python -c ...`` and the command ``ppo-vs-dpo ...`` are forked
instead of started, and so is all that they start themselves: a command's stages. Each is a process with a session,
folder, environment, output, signals and exit code of its own, and has none of its parent's open files and locks.

What is about the start itself is not for this: variables that a library reads when it is loaded, marks that are looked
for in ``/proc``, a Python that does not know the repository (tests/test_wheel.py runs the whole pipeline there).
"""

import contextlib
import faulthandler
import inspect
import logging
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from ppo_vs_dpo.artifacts import resources

PACKAGE = "ppo_vs_dpo."
START = subprocess.Popen._execute_child
COMMAND = "ppo-vs-dpo"


def program(words: list[str]) -> Callable[[], None] | None:
    """What a command line runs, as a call that leaves ``sys.argv`` behind; ``None`` where it is not for a fork."""
    if Path(words[0]).name == COMMAND:
        return lambda: _module(f"{PACKAGE}pipeline.cli", words[1:])
    if words[0] != sys.executable or len(words) < 3:
        return None
    if words[1] == "-m" and words[2].startswith(PACKAGE):
        return lambda: _module(words[2], words[3:])
    return (lambda: _code(words[2], words[3:])) if words[1] == "-c" else None


def _module(name: str, arguments: list[str]) -> None:
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _code(code: str, arguments: list[str]) -> None:
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


class Fork(subprocess.Popen):
    """``subprocess.Popen`` that forks the programs of this project, and starts all others."""

    def _execute_child(self, args, *rest):
        run = None if isinstance(args, str) else program([os.fspath(word) for word in args])
        if run is None:
            START(self, args, *rest)
            return
        given = inspect.signature(START).bind(self, args, *rest).arguments
        ends = [given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_in_child(run, given))
        self._child_created = True
        self._close_pipe_fds(*ends)


def _in_child(run: Callable[[], None], given: dict) -> int:
    """All that ``exec`` would have done, then the program; its exit code."""
    code = 1
    try:
        _become(given)
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


def _become(given: dict) -> None:
    for target, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
        if given[name] not in (-1, target):
            os.dup2(given[name], target)
    # Not closed: an object of the parent that is collected later would close whatever has its number then.
    nothing = os.open(os.devnull, os.O_RDWR)
    for path in list(Path("/proc/self/fd").iterdir()):
        number = int(path.name)
        with contextlib.suppress(OSError):
            if number > 2 and number != nothing and not os.get_inheritable(number):
                os.dup2(nothing, number, inheritable=False)
    if given["start_new_session"]:
        os.setsid()
    if given["cwd"] is not None:
        os.chdir(given["cwd"])
    if given["env"] is not None:
        os.environ.clear()
        os.environ.update(given["env"])
    faulthandler.disable()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    # The libraries' handlers hold the stream that pytest had put there when they were made.
    for reference in logging._handlerList:
        if type(handler := reference()) is logging.StreamHandler:
            handler.setStream(sys.stderr)
    # The program is among the loaded modules already, and runpy would say so.
    warnings.filterwarnings("ignore", "'ppo_vs_dpo.* found in sys.modules", RuntimeWarning)
    # Its account of its time begins now.
    resources.begin_again()
    if given["preexec_fn"] is not None:
        given["preexec_fn"]()


@contextlib.contextmanager
def forks() -> Iterator[None]:
    """While the block runs, programs of this project are forked from this process."""
    with mock.patch.object(subprocess, "Popen", Fork):
        yield
