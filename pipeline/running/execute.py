"""Running jobs as processes: several at once, stopped together, none left behind."""

import contextlib
import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import write_json
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.running.graph import DISTRIBUTED, Job
from ppo_vs_dpo.pipeline.running.launch import launcher
from ppo_vs_dpo.pipeline.running.overview import Overview

# Time for a stage to stop by itself after Ctrl-C, in seconds; then it is killed (it resumes from its checkpoint).
PATIENCE = 20.0


class StageFailed(UserError):
    """A stage ended with an error; its own message has the cause."""


@contextlib.contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Hold the run folder for this command alone.

    Raises:
        UserError: another command holds it.
    """
    with (run.root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run.root} is in use by another command. Wait for it, or choose name=...") from None
        yield


def _die_with_parent() -> None:
    """In the child: be killed when the command dies (Linux). Else a killed command would leave writers behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def environment(config, job: Job) -> dict[str, str]:
    """Environment of a stage's process."""
    threads = str(config.launch.threads)
    return {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",
    }


def command(run: RunFolder, job: Job) -> list[str]:
    """The command line of a job: what a user would type to run that stage alone."""
    room = {"data": "preferences", "pairs": "preferences"}.get(job.stage, job.stage)
    start = launcher(run.config.launch) if job.stage in DISTRIBUTED else [sys.executable, "-m"]
    arguments = [f"ppo_vs_dpo.{room}", str(run.root)]
    if room != job.stage:
        arguments += ["--step", job.stage]
    if job.point:
        arguments += ["--point", ",".join(f"{key}={value}" for key, value in sorted(job.point.items()))]
    return [*start, *arguments, "--fingerprint", job.fingerprint]


class Running:
    """A job's process and its log."""

    def __init__(self, run: RunFolder, job: Job):
        self.job = job
        folder = run.stage_dir(job.name)
        if job.state == "stale":
            run.clear(job.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "progress.json").unlink(missing_ok=True)
        write_json(folder / "started.json", {"fingerprint": job.fingerprint, "parts": job.parts})
        self.log_path = folder / "log.txt"
        self.log = self.log_path.open("ab")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command(run, job),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment(run.config, job),
            preexec_fn=_die_with_parent,
            start_new_session=True,
        )

    def signal(self, number: int) -> None:
        """Send a signal to the job and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def close(self) -> None:
        """Close the log."""
        self.log.close()


def stop(running: list[Running]) -> None:
    """Ask every process to stop, wait, then kill what is left."""
    for one in running:
        one.signal(signal.SIGINT)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and any(one.process.poll() is None for one in running):
        time.sleep(0.1)
    for one in running:
        if one.process.poll() is None:
            one.signal(signal.SIGKILL)
        one.process.wait()
        one.close()


def last_words(path: Path, lines: int = 25) -> str:
    """The end of a log: from its last ``error in stage`` line where there is one, else its last lines."""
    text = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    marker = text.rfind("\nerror in stage")
    return text[marker + 1 :].strip() if marker >= 0 else "\n".join(text.strip().splitlines()[-lines:])


def root_cause(path: Path) -> tuple[int, int] | None:
    """Rank and exit code of the process that ended first, as torchrun's summary at the end of a log has them."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", text, re.DOTALL)
    return (int(found[-1][0]), int(found[-1][1])) if found else None


def execute(run: RunFolder, jobs: list[Job], overview: Overview) -> None:
    """Run jobs, each as soon as its needs are met, at most ``launch.workers`` at once.

    Raises:
        StageFailed: a job ended with an error; jobs beside it are stopped and can be resumed.
        KeyboardInterrupt: after everything has stopped.
    """
    waiting = list(jobs)
    unfinished = {job.name for job in jobs}
    running: list[Running] = []
    try:
        while waiting or running:
            for one in [r for r in running if r.process.poll() is not None]:
                running.remove(one)
                one.close()
                if one.process.returncode != 0 or run.done(one.job.name) is None:
                    raise _failure(run, one)
                one.job.state = "done"
                unfinished.discard(one.job.name)
                overview.finished(one.job, time.monotonic() - one.started)
            ready = [job for job in waiting if not unfinished.intersection(job.needs)]
            for job in ready[: max(0, run.config.launch.workers - len(running))]:
                waiting.remove(job)
                running.append(Running(run, job))
                overview.started(job)
            overview.update()
            time.sleep(0.05)
    finally:
        stop(running)


def _failure(run: RunFolder, one: Running) -> StageFailed:
    code = one.process.returncode
    place = f"\n\nThe whole log: {one.log_path}\nThe same command goes on from where this stopped."
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return StageFailed(f"stage {one.job.name} was killed by {name}{hint}.{place}")
    cause = root_cause(one.log_path)
    if cause is not None and cause[1] < 0:
        name = signal.Signals(-cause[1]).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return StageFailed(f"rank {cause[0]} of stage {one.job.name} was killed by {name}{hint}.{place}")
    return StageFailed(f"stage {one.job.name} failed:\n{last_words(one.log_path)}{place}")
