"""No process of a job outlives the command that started it, whatever ended the command.

Three lines of defence, for Linux: each process asks the kernel to be killed when its parent dies; a watcher beside the
command, which a pipe tells of its end, kills whatever carries the job's mark; the command does the same with what
a stage left behind. Elsewhere the first two are missing, and locks (`guards.locks`) name who is left.

Ranks on other machines are heard of through the run folder: beside each a small process touches a file as long as the
rank lives and is not stopped. It says nothing of what the rank does: one that merges, saves or waits for a judge
for an hour is alive.
"""

import contextlib
import ctypes
import faulthandler
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# In the environment of every process of a command, and so of everything they start.
MARK = "PPO_VS_DPO_COMMAND"

WATCHER = """
import os, signal, sys
mark = sys.argv[1].encode()
signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
while os.read(0, 1):
    pass
for again in range(3):
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if any(item.startswith(mark) for item in file.read().split(b"\\0")):
                        os.kill(int(name), signal.SIGKILL)
            except OSError:
                pass
"""

# Seconds after which an interrupt comes again that was ignored.
AGAIN = 0.05
# Seconds between two beats of a rank, and after which one is not alive any more that others have outlived.
BEAT, SILENT = 5.0, 40.0
# Not a thread: a library that holds the interpreter for minutes (writing a large file) would look like a dead rank.
PULSE = """
import os, signal, sys, time
rank, path, every = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
while os.getppid() == rank:
    try:
        with open(f"/proc/{rank}/stat") as file:
            alive = file.read().rpartition(")")[2].split()[0] not in "TtXZ"
    except OSError:
        alive = True
    try:
        if alive:
            os.utime(path)
    except OSError:
        pass
    time.sleep(every)
"""


def die_with_parent() -> None:
    """Ask to be killed when the parent process dies; forked children must ask for themselves."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), signal.SIGKILL)


def lose_no_interrupt() -> None:
    """Let a Ctrl-C that falls where Python ignores exceptions come again.

    While a process is forked, and in finalizers, an exception is printed and forgotten: a run that one wanted to stop
    would go on for days.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        # A moment later: at once, it would be raised in here, and ignored again.
        number = signal.SIGINT if callable(signal.getsignal(signal.SIGINT)) else signal.SIGTERM
        again = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
        again.daemon = True
        with contextlib.suppress(RuntimeError):  # the interpreter is ending: there is nothing left to stop
            again.start()

    sys.unraisablehook = hook


# By which a command asks its processes where they are. Not SIGUSR1: libraries and users have handlers of their own.
WHERE = getattr(signal, "SIGRTMIN", 0) + 7


def say_where_asked() -> None:
    """Let SIGUSR1 print the line that this process is at, and who called it: also where it loops or waits for ever."""
    if hasattr(faulthandler, "register"):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no stderr of the system's own
            faulthandler.register(signal.SIGUSR1, all_threads=False)
            if sys.platform == "linux":
                faulthandler.register(WHERE, all_threads=False)


def ask_where(mark: str) -> int:
    """Have every process that carries a mark and understands it say where it is; how many were asked."""
    asked = 0
    for pid in marked(mark):
        with contextlib.suppress(OSError, ValueError):
            caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
            if caught and int(caught[1], 16) >> (WHERE - 1) & 1:
                os.kill(pid, WHERE)
                asked += 1
    return asked


def marked(mark: str) -> list[int]:
    """Processes of this machine whose mark is this or begins with it, this process left out."""
    wanted, found = f"{MARK}={mark}".encode(), []
    if sys.platform == "linux":
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != os.getpid():
                with contextlib.suppress(OSError):
                    items = (folder / "environ").read_bytes().split(b"\0")
                    if any(item.startswith(wanted) for item in items):
                        found.append(int(folder.name))
    return found


def stopped(mark: str) -> list[int]:
    """Processes that carry a mark and are stopped (SIGSTOP, a debugger): others wait for them for half an hour."""
    found = []
    for pid in marked(mark):
        with contextlib.suppress(OSError, IndexError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in ("T", "t"):
                found.append(pid)
    return found


def kill_marked(mark: str) -> int:
    """Kill what carries a mark; returns how many there were."""
    found = marked(mark)
    for pid in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return len(found)


@contextlib.contextmanager
def watched(mark: str) -> Iterator[None]:
    """While the block runs, a watcher waits for this process's end, to kill what then carries the mark."""
    if sys.platform != "linux":
        yield
        return
    read, write = os.pipe()
    environment = {key: value for key, value in os.environ.items() if key != MARK}
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", WATCHER, f"{MARK}={mark}"],
        stdin=read,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd="/",
        start_new_session=True,
    )
    os.close(read)
    try:
        yield
    finally:
        os.close(write)
        watcher.wait()


def beat(folder: Path, rank: int) -> Callable[[], None]:
    """Let a rank be heard of, until it ends: a process beside it touches ``folder/rank<number>``.

    Args:
        folder: on a file system that the command sees, too.
        rank: this process's.

    Returns:
        What to call when the rank ends in order, after all others: nobody waits for it any more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank{rank}"
    with contextlib.suppress(OSError):  # a full disk: the file's time is enough
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", PULSE, str(os.getpid()), str(path.resolve()), str(BEAT)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )

    def end() -> None:
        process.kill()
        process.wait()
        path.unlink(missing_ok=True)

    return end


class Pulses:
    """The beats of a job's ranks as this machine sees them: by its own clock, with which others need not agree."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen: dict[str, tuple[int, float]] = {}

    def silent(self) -> str | None:
        """The rank, in words, that has not been heard of for `SILENT` seconds while another one was; or ``None``.

        A file system that stands still silences all of them, and says nothing of any.
        """
        now = time.monotonic()
        for path in self.folder.glob("rank*"):
            with contextlib.suppress(OSError):
                touched = path.stat().st_mtime_ns
                if self.seen.get(path.name, (None, now))[0] != touched:
                    self.seen[path.name] = (touched, now)
        # A rank that ended in order has taken its file with it.
        there = {name: seen for name, seen in self.seen.items() if (self.folder / name).exists()}
        since = {name: now - when for name, (_, when) in there.items()}
        late = [name for name, seconds in since.items() if seconds > SILENT]
        if not late or min(since.values()) > 3 * BEAT:
            return None
        name = max(late, key=since.__getitem__)
        where = ""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            where = (self.folder / name).read_text()[:200]
        return f"rank {name.removeprefix('rank')}{f' ({where})' if where else ''}"
