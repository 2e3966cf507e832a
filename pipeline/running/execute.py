"""Running jobs as processes: several at once, stopped together, none left behind."""

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.guards import locks, replaced
from ppo_vs_dpo.artifacts.guards.processes import watched
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.planning.gpus import Gpus
from ppo_vs_dpo.pipeline.running.graph import DISTRIBUTED, Job
from ppo_vs_dpo.pipeline.running.job import Running, command, explain_end
from ppo_vs_dpo.pipeline.running.launch import ForkServer
from ppo_vs_dpo.pipeline.running.overview import Overview

# Time for a stage to stop by itself after Ctrl-C, in seconds; then it is killed (it resumes from its checkpoint).
PATIENCE = 20.0


class StageFailed(UserError):
    """A stage ended with an error; its own message has the cause."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder for this command alone.

    Raises:
        UserError: another command, or a stage started by hand, holds it; says who.
    """
    with locks.hold(locks.run_lock(folder), str(folder)):
        replaced.sweep_up(folder)
        yield


def stop(running: list[Running]) -> list[str]:
    """Ask every process to stop, wait, then kill what is left and all that it started.

    Returns:
        The jobs whose earlier results are in their places again.
    """
    back = []
    try:
        for one in running:
            one.signal(signal.SIGINT)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and any(one.process.poll() is None for one in running):
            time.sleep(0.1)
    finally:  # a second Ctrl-C does not wait
        for one in running:
            one.kill()
        for one in running:
            one.process.wait()
            one.close()
            if one.put_back():
                back.append(one.job.name)
    return back


def execute(run: RunFolder, jobs: list[Job], overview: Overview, server: ForkServer | None = None) -> None:
    """Run jobs, each as soon as its needs are met, at most ``launch.workers`` at once.

    Args:
        server: of which they are forks, as soon and as far as it can be forked.

    Raises:
        StageFailed: a job ended with an error; jobs beside it are stopped and can be resumed.
        KeyboardInterrupt: after everything has stopped.
    """
    mark = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
    with watched(mark):
        _execute(run, jobs, overview, mark, server)


def _execute(run: RunFolder, jobs: list[Job], overview: Overview, mark: str, server: ForkServer | None) -> None:
    waiting = list(jobs)
    unfinished = {job.name for job in jobs}
    running: list[Running] = []
    gpus = Gpus(run.config.launch)
    try:
        while waiting or running:
            for one in [r for r in running if r.process.poll() is not None]:
                running.remove(one)
                gpus.give_back(one.gpus)
                one.close()
                if one.process.returncode != 0 or run.done(one.job.name) is None:
                    one.kill()
                    overview.stopped(one.job, "failed")
                    raise StageFailed(explain_end(one))
                one.job.state = "done"
                unfinished.discard(one.job.name)
                overview.finished(one.job)
            for one in running:
                if (why := one.hung()) is not None:
                    running.remove(one)
                    overview.stopped(one.job, "failed")
                    one.kill()
                    one.process.wait()
                    one.close()
                    raise StageFailed(explain_end(one, why))
                if (words := one.quiet()) is not None:
                    overview.say(words)
            ready = [job for job in waiting if not unfinished.intersection(job.needs)]
            for job in ready[: max(0, run.config.launch.workers - len(running))]:
                taken = gpus.take(job.stage in DISTRIBUTED)
                if taken is None:
                    continue
                waiting.remove(job)
                one = Running(run, job, command(run, job), f"{mark}.{job.name}.", taken, server)
                running.append(one)
                overview.started(job)
                if one.aside is not None:
                    overview.say(f"{job.name}: the earlier result is kept in {one.aside} (rm -r removes it)")
            overview.update()
            time.sleep(0.05)
    finally:
        for one in running:
            overview.stopped(one.job, "interrupted")
        for name in stop(running):
            overview.say(
                f"{name}: the earlier result is in its place again; the same command goes on with the new one"
            )
