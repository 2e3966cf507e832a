"""No process of a job outlives the command that started it, whatever ended the command.

Three lines of defence, for Linux: each process asks the kernel to be killed when its parent dies; a watcher beside the
command, which a pipe tells of its end, kills whatever carries the job's mark; the command does the same with what
a stage left behind. Elsewhere the first two are missing, and locks (`guards.locks`) name who is left.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


def die_with_parent() -> None:
    """Ask to be killed when the parent process dies; forked children must ask for themselves."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), signal.SIGKILL)


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
