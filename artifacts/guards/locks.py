"""Who works on a run folder: one command, and one set of processes for each stage.

Locks are the operating system's (`flock`): they end with their holder, however it ends, and a process that was forked
from it holds them on. The file says who the holder is, so that a second one can name the first.
"""

import contextlib
import fcntl
import glob
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError, warn
from ppo_vs_dpo.artifacts.files import read_marker

# Seconds that a stage waits for the processes of a killed attempt to end, before it says that they are at work.
PATIENCE = 5.0


def _holder() -> dict[str, Any]:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": command[:500],
    }


def describe(path: Path) -> str:
    """Who holds a lock, in words, as far as it is known."""
    held = read_marker(path) or {}
    if "pid" not in held:
        return "another process"
    return f"process {held['pid']} on {held.get('host')}, since {held.get('since')} ({held.get('command')})"


@contextlib.contextmanager
def hold(path: Path, what: str, shared: bool = False, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock until the block ends; the file goes with it.

    Args:
        what: what is held, for the message.
        patience: seconds to wait for it.

    Raises:
        UserError: somebody else holds it; says who.
    """
    deadline = time.monotonic() + patience
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            raise UserError(
                f"{what} is in use by another command: {describe(path)}. Wait for it, stop it, or choose name=..."
            ) from None
        except OSError as error:
            os.close(descriptor)
            warn(f"{what}: this file system has no locks ({error}); nothing guards against two commands.\n")
            yield
            return
        if _is_still(path, descriptor):
            break
        os.close(descriptor)  # its holder removed the file between our opening and locking it
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_holder()).encode(), 0)
        yield
    finally:
        # Whoever shares it needs the file.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                path.unlink()
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        there = path.stat()
    except OSError:
        return False
    mine = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def run_lock(root: Path) -> Path:
    """The lock of a run: a command holds it alone, stages started by hand share it."""
    return root / ".lock"


@contextlib.contextmanager
def stage_at_work(root: Path, name: str, rank: int = 0, ranks: int = 1) -> Iterator[None]:
    """Hold a stage, as one of its ranks.

    Every rank holds a lock of its own, and the first looks at those of ranks that this job has not: processes that an
    earlier attempt left behind would go on writing checkpoints into the same folder.

    Raises:
        UserError: another job's process is at work on this stage; says which.
    """
    what = f"stage {name} of {root}"
    with hold(_of_rank(root, name, rank), what, patience=PATIENCE):
        if rank == 0:
            for path in root.glob(f".lock-{glob.escape(name.replace('/', '_'))}-rank*"):
                number = path.name.rpartition("-rank")[2]
                if number.isdigit() and int(number) >= ranks:
                    with hold(path, what, patience=PATIENCE):
                        pass
        yield


def _of_rank(root: Path, name: str, rank: int) -> Path:
    return root / f".lock-{name.replace('/', '_')}-rank{rank}"
