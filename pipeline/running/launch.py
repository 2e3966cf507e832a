"""How a stage's processes are started: on this machine, on the machines of a hostfile, or through SLURM.

All of these end in ``python -m <stage> RUN`` with RANK, WORLD_SIZE and MASTER_* set; docs/cluster.md shows each as one
would type it. On a CPU a stage of one rank is a fork of a process that has imported the libraries before.
"""

import contextlib
import ctypes
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from omegaconf import DictConfig

from ppo_vs_dpo.artifacts import resources
from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.guards.processes import MARK, die_with_parent
from ppo_vs_dpo.pipeline.planning.gpus import hosts, visible
from ppo_vs_dpo.pipeline.planning.gpus import processes as count_processes

# What stands before a stage of one rank.
ALONE = [sys.executable, "-m"]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def launcher(launch: Any) -> list[str]:
    """What stands before ``<stage> RUN`` on the command line of a training stage.

    Args:
        launch: the section ``launch``: ``processes`` on each machine, and ``hostfile`` or ``nodes`` for several.

    Raises:
        UserError: the settings contradict each other, or what they need is not there.
    """
    processes, nodes, hostfile = count_processes(launch), launch.get("nodes", 1), launch.get("hostfile")
    if hostfile:
        if nodes > 1:
            raise UserError("launch.hostfile and launch.nodes: give one; launch.nodes is for SLURM.")
        hosts(Path(hostfile))
        missing = [tool for tool in ("ssh", "pdsh") if shutil.which(tool) is None]
        if missing:
            raise UserError(
                f"launch.hostfile reaches other machines by ssh and pdsh: install {' and '.join(missing)}."
            )
        # DeepSpeed's launcher reaches the machines by ssh (pdsh); the slots of each are in the file.
        runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(Path(hostfile).resolve())]
        return [*runner, "--master_port", str(free_port()), "--no_local_rank", "--module"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    if nodes > 1:
        if shutil.which("srun") is None:
            raise UserError(
                f"launch.nodes={nodes} starts stages with srun, and there is none here: run this inside a SLURM "
                f"allocation (configs/cluster/slurm.sbatch), or name the machines in launch.hostfile."
            )
        # One torchrun a machine; they find each other, and their ranks, at the machine where this command runs.
        here = launch.get("rendezvous") or socket.gethostname()
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{here}:{free_port()}"]
        name = ["--rdzv-id", os.environ.get("SLURM_JOB_ID", "ppo-vs-dpo")]
        alone = ["srun", "--nodes", str(nodes), "--ntasks", str(nodes), "--ntasks-per-node", "1", "--kill-on-bad-exit"]
        return [*alone, *torchrun, "--nnodes", str(nodes), *meeting, *name, "-m"]
    if processes > 1:
        return [*torchrun, "--standalone", "-m"]
    return [*ALONE]


# ------------------------------------------------------------------------------------- forks of one process, on a CPU

# Bytes kept free in the server's own arguments and environment: a fork writes its own over them.
ROOM = 4096
# Seconds to wait for the last word on a process that has ended, from a server that may be stopped.
LAST_WORD = 1.0
# Seconds between two looks of the server at its forks.
LOOK_EVERY = 0.02
# Bytes of a command line and its variables that go to the server in one packet; longer ones are not forked.
PACKET = 1 << 16
# What training stages import when they are at work: accelerate asks for DeepSpeed, whether it is used or not.
AT_WORK = ("deepspeed", "torch.utils.tensorboard")
# What is said of a fork: that it has begun, with its number, and that it has ended, with its exit code.
WORD = struct.Struct("cq")


def may_fork(config: DictConfig) -> bool:
    """Whether stages may be forks of one process: on Linux, one rank a stage, and ``launch.fork`` is left on.

    Not where there is a GPU, which survives no fork, nor with DeepSpeed.
    """
    launch = config.launch
    if not launch.get("fork", True) or sys.platform != "linux" or config.get("deepspeed"):
        return False
    alone = not launch.get("hostfile") and int(launch.get("nodes") or 1) == 1 and count_processes(launch) == 1
    return alone and not visible()


class Forked:
    """A fork as `subprocess.Popen` would have it: the same members with the same meaning, as far as jobs use them."""

    def __init__(self, pid: int, words: int, stdout: BinaryIO):
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None
        self._words = words
        self._end: int | None = None
        with contextlib.suppress(OSError, AttributeError):  # an old kernel
            self._end = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; ``None`` while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is not None:
            return self.returncode
        both = [self._words] if self._end is None else [self._words, self._end]
        ready, *_ = select.select(both, [], [], timeout)
        if not ready:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        if self._words not in ready:  # it has ended, and the server is about to say how; or is stopped
            ready, *_ = select.select([self._words], [], [], LAST_WORD)
        said = os.read(self._words, WORD.size) if ready else b""
        # A server that is killed takes its forks with it.
        self.returncode = WORD.unpack(said)[1] if said else -signal.SIGKILL
        for descriptor in both:
            os.close(descriptor)
        return self.returncode


class ForkServer:
    """A process that imports what stages need once, and forks itself for each of them.

    It saves each stage the three seconds of its imports. `multiprocessing` has such a server, too; its forks are
    functions of their parent, ours are what they would be otherwise: ``python -m <stage> RUN`` by their arguments,
    environment, session, words, exit code, and the interpreter's end.

    The server imports and does nothing else: it has no thread, lock or random number that a stage would inherit.

    Args:
        modules: whose ``__main__`` are to be run, e.g. ``ppo_vs_dpo.sft``.
        environment: of all its forks, but for what is of each: its mark (`guards.processes.MARK`) above all.
    """

    def __init__(self, modules: Sequence[str], environment: dict[str, str]):
        self.mark, self._environment = environment[MARK], environment
        # Seconds by part (`resources.PARTS`), and ``CPU``, once it has imported everything.
        self.spent: dict[str, float] = {}
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # What libraries say when they are imported belongs into every stage's log.
        with theirs, tempfile.TemporaryFile() as words:
            self._process = subprocess.Popen(
                [*ALONE, __name__, *modules, " " * ROOM],
                stdin=theirs,
                stdout=words,
                stderr=subprocess.STDOUT,
                env={**environment, MARK: self.mark.ljust(ROOM)},
                preexec_fn=die_with_parent,
                start_new_session=True,
            )

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def ready(self) -> bool:
        """Whether it has imported everything, and can be forked."""
        if not self.spent and select.select([self._socket], [], [], 0)[0]:
            with contextlib.suppress(OSError, ValueError):  # it has ended without a word
                self.spent = json.loads(self._socket.recv(ROOM))
        return bool(self.spent) and self._process.poll() is None

    def start(self, command: list[str], environment: dict[str, str]) -> Forked | None:
        """Fork it for a command; ``None`` where that cannot be (now), and a process of its own does it, too."""
        if command[:2] != ALONE or len(os.fsencode(environment[MARK])) > ROOM or not self.ready():
            return None
        names = {*environment, *self._environment}
        own = {name: environment.get(name) for name in names if environment.get(name) != self._environment.get(name)}
        message = json.dumps([own, *command]).encode()
        if len(message) > PACKET:
            return None
        (said, out), (heard, words) = os.pipe(), os.pipe()
        try:
            socket.send_fds(self._socket, [message], [out, words])
        except OSError:  # it has ended just now
            pid = 0
        else:
            pid = -1
        finally:
            os.close(out)
            os.close(words)
        if pid:
            # Said by the fork when it can be found and stopped: in a session of its own, with its own mark.
            kind, pid = WORD.unpack(os.read(heard, WORD.size) or WORD.pack(b"-", 0))
            if kind == b"+":
                return Forked(pid, heard, os.fdopen(said, "rb", buffering=0))
        os.close(said)
        os.close(heard)
        return None


def start(
    command: list[str], environment: dict[str, str], server: ForkServer | None = None
) -> "Forked | subprocess.Popen[bytes]":
    """Start a job in a session of its own, its words in a pipe: as a fork, where there is a server that can."""
    forked = server.start(command, environment) if server is not None else None
    return forked or subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        preexec_fn=die_with_parent,
        start_new_session=True,
    )


def write_over(what: str, old: bytes, new: bytes) -> None:
    """Let ``/proc`` show ``new`` where it shows ``old``, of this process: a fork is found like any other process.

    Args:
        what: ``arguments``, of which ``new`` are then all; or ``environment``, of which it is one.

    Raises:
        ValueError: ``old`` is not there.
    """
    # proc_pid_stat(5): fields 48 to 51 are where both lie in memory; the first one here is 3.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = (int(field) for field in (fields[45:47] if what == "arguments" else fields[47:49]))
    shown = ctypes.string_at(begin, end - begin)
    at, length = (0, len(shown)) if what == "arguments" else (shown.index(old + b"\0"), len(old) + 1)
    if old not in shown:
        raise ValueError(f"the {what} are not where they should be")
    ctypes.memmove(begin + at, new[: length - 1].ljust(length, b"\0"), length)


def serve(modules: Sequence[str]) -> list[str]:
    """The server: import, then fork whenever that is asked.

    Returns:
        In a fork, its command line; in the server nothing, when its command has ended, or where it cannot be forked.
    """
    with resources.libraries():
        for module in modules:
            importlib.import_module(f"{module}.__main__")
            del sys.modules[f"{module}.__main__"]  # a fork runs it
        for library in AT_WORK if "trl" in sys.modules else ():
            with contextlib.suppress(Exception):  # whoever needs it will say so
                importlib.import_module(library)
    mark, torch = os.environ[MARK], sys.modules.get("torch")
    arguments, placeholder = os.fsencode(sys.argv[-1]), os.fsencode(f"{MARK}={mark}")
    write_over("environment", placeholder, placeholder)
    threads = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    # PyArrow's allocator looks after its thread in forks; nobody does after others, nor after a GPU.
    if len(threads) - threads.count("jemalloc_bg_thd") > 1 or (torch and torch.accelerator.is_available()):
        return []
    with socket.socket(fileno=os.dup(0)) as asked:
        asked.send(json.dumps({**resources.seconds_by_part(), "CPU": resources.cpu_seconds()}).encode())
        running: dict[int, int] = {}
        while True:
            readable, *_ = select.select([asked], [], [], LOOK_EVERY if running else None)
            for pid in list(running):
                ended, how = os.waitpid(pid, os.WNOHANG)
                if ended:
                    say(running.pop(pid), b".", os.waitstatus_to_exitcode(how))
            if not readable:
                continue
            message, descriptors, *_ = socket.recv_fds(asked, PACKET, 2)
            if not message:
                return []
            out, words = descriptors
            server, pid = os.getpid(), -1
            # Too many processes, too little memory: the command starts one itself. Python 3.12 warns of any thread.
            with contextlib.suppress(OSError), warnings.catch_warnings(action="ignore"):
                pid = os.fork()
            if pid == 0:
                for other in running.values():
                    os.close(other)
                own, *command = json.loads(message)
                become(command, own, out, server, arguments, placeholder)
                say(words, b"+", os.getpid())
                return command
            os.close(out)
            if pid > 0:
                running[pid] = words
            else:
                os.close(words)


def say(words: int, kind: bytes, number: int) -> None:
    """Say something of a fork to the command, which may have gone; nothing more comes from this process."""
    with contextlib.suppress(OSError):
        os.write(words, WORD.pack(kind, number))
    os.close(words)


def become(
    command: list[str], own: dict[str, str | None], out: int, server: int, arguments: bytes, placeholder: bytes
) -> None:
    """In a fork: be what a process would be that was started by this command line, with these variables of its own."""
    die_with_parent()
    if os.getppid() != server:
        os._exit(1)
    os.setsid()
    for name, value in own.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    write_over("environment", placeholder, os.fsencode(f"{MARK}={own[MARK]}"))
    write_over("arguments", arguments, b"\0".join(os.fsencode(word) for word in command))
    before = os.pread(1, 1 << 20, 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(descriptor, place)
    os.close(nothing)
    os.close(out)
    os.write(1, before)
    resources.begin_again()


if __name__ == "__main__":
    line = serve(sys.argv[1:-1])
    if line:
        sys.argv = line[2:]
        runpy.run_module(line[2], run_name="__main__", alter_sys=True)
