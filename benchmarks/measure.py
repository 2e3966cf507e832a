"""What the speed benchmarks share: two processes that take turns, the machine's rates, peak memory, tables.

Two sides never work at the same time: the parent lets one take a step, waits for its figures, then the other. Each
side is a process of its own, so its peak memory is its own, and TRL 1.12 can be loaded beside our TRL.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
MARK = "@@"


# ------------------------------------------------------------------------------------------- the machine


def matmul_rate(dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """FLOP/s of square matrix products, the best of several: what no model can beat on this machine."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = 0.0
    for _ in range(8):
        started = time.process_time()
        for _ in range(4):
            torch.mm(left, right)
        best = max(best, 4 * 2 * size**3 / (time.process_time() - started))
    return best


def bandwidth(megabytes: int = 256) -> float:
    """Bytes/s read by a sum over a tensor larger than the caches, the best of several."""
    numbers = torch.ones(megabytes << 18)
    best = 0.0
    for _ in range(8):
        started = time.process_time()
        numbers.sum()
        best = max(best, numbers.numel() * 4 / (time.process_time() - started))
    return best


def _cpuinfo() -> dict[str, str]:
    """Linux's facts about the (last) processor; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def processor() -> str:
    """The processor in words; its generation by number, for virtual machines give several the same name."""
    fields = _cpuinfo()
    name = fields.get("model name", platform.machine())
    return f"{name}, family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else name


def machine() -> str:
    """The machine in words, without its name."""
    fields = _cpuinfo()
    wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in fields.get("flags", "").split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{fields.get('model name', platform.machine())} ({', '.join(wide)}), {os.cpu_count()} cores, "
        f"{memory:.0f} GiB; one thread a process; Python {platform.python_version()}, torch {torch.__version__}"
    )


def memory_now(field: str = "VmRSS") -> float:
    """MiB of this process: resident now (``VmRSS``) or at most so far (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


# ------------------------------------------------------------------------------------------- taking turns


class Turns:
    """The worker's end: waits until the parent lets it work, and reports what a step took.

    Seconds are CPU seconds of this (one-threaded) process: on an idle core they are wall seconds, and other work on
    the machine adds little to them.
    """

    def __init__(self):
        self.phases: dict[str, float] = {}
        self.started = (0.0, 0.0)

    def ready(self, **figures: float) -> None:
        """Say that everything is loaded, and wait for the first turn."""
        self._say(memory=memory_now(), **figures)
        self._wait()

    def done(self, last: bool = False, **figures: float) -> None:
        """Report one step, and wait for the next turn unless this was the last."""
        now = (time.process_time(), time.perf_counter())
        self._say(
            seconds=now[0] - self.started[0],
            wall=now[1] - self.started[1],
            phases=self.phases,
            peak=memory_now("VmHWM"),
            **figures,
        )
        if not last:
            self._wait()

    def elapsed(self) -> float:
        """Seconds since this turn began."""
        return time.process_time() - self.started[0]

    def timed(self, name: str, function: Callable) -> Callable:
        """``function``, its seconds added to the phase ``name``."""

        def wrapped(*args, **kwargs):
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.phases[name] = self.phases.get(name, 0.0) + time.process_time() - started

        return wrapped

    def _say(self, **figures) -> None:
        print(MARK + json.dumps(figures), flush=True)

    def _wait(self) -> None:
        sys.stdin.readline()
        self.phases = {}
        self.started = (time.process_time(), time.perf_counter())


class Side:
    """The parent's end of one worker process.

    Args:
        command: its command line after the interpreter.
        path: folders to import from first.
    """

    def __init__(self, name: str, command: list[str], path: list[str]):
        self.name = name
        env = {
            **os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read when the worker has ended)
        # Not in the repository's root: a folder there would hide a package of the same name.
        self.process = subprocess.Popen(
            [sys.executable, *command], env=env, cwd=tempfile.gettempdir(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        self.loaded = self._hear()

    def _hear(self) -> dict:
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        self.process.wait()
        self.errors.seek(0)
        raise SystemExit(f"{self.name} ended early:\n{self.errors.read()[-4000:]}")

    def step(self) -> dict:
        """Let it take one step; its figures."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._hear()

    def close(self) -> None:
        """Wait for its end."""
        self.process.stdin.close()
        self.process.wait(timeout=120)


def alternate(sides: list[Side], rounds: int) -> dict[str, list[dict]]:
    """One step of each to warm up, then ``rounds`` of each in turns."""
    steps: dict[str, list[dict]] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides:
            figures = side.step()
            kind = f"round {number}" if number else "warm-up"
            print(
                f"  {side.name}, {kind}: {figures['seconds']:.1f} s, peak {figures['peak']:.0f} MiB", file=sys.stderr
            )
            if number:
                steps[side.name].append(figures)
    for side in sides:
        side.close()
    return steps


def install_trl(version: str, folder: str) -> str:
    """Install a TRL without its dependencies into ``folder``."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, f"trl=={version}"]
    subprocess.run(command, check=True)
    return folder


# ------------------------------------------------------------------------------------------- figures


def median(steps: list[dict], name: str) -> float:
    """Median of one figure over steps; ``phases.x`` looks into the phases."""
    outer, _, inner = name.partition(".")
    return statistics.median(step[outer].get(inner, 0.0) if inner else step[outer] for step in steps)


def ratios(theirs: list[dict], ours: list[dict]) -> list[float]:
    """Samples/s of ours over theirs, pair by pair."""
    return [
        (mine["samples"] / mine["seconds"]) / (other["samples"] / other["seconds"])
        for other, mine in zip(theirs, ours, strict=True)
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bar(name: str, value: float, bound: float, at_most: bool = False) -> str:
    """One line on one bar: its value, the bar, and whether it is reached."""
    reached = value <= bound if at_most else value >= bound
    return (
        f"{name}: {value:.2f} ({'at most' if at_most else 'at least'} {bound:g}): {'reached' if reached else 'MISSED'}"
    )
