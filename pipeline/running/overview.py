"""What a person sees while a run works: every job, how far it is, and the time left."""

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ppo_vs_dpo.artifacts.errors import printable, terminal
from ppo_vs_dpo.artifacts.files import read_marker
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.planning.cost.beforehand import at_once
from ppo_vs_dpo.pipeline.running.graph import Job

# State -> its word and style. Not as markup: a line that is printed above the table without it would show the marks.
MARKS = {
    "done": ("done", "green"),
    "running": ("running", "cyan"),
    "interrupted": ("interrupted", ""),
    "failed": ("failed", "red"),
    "part": ("to resume", ""),
    "stale": ("stale", ""),
}


def clock(seconds: float) -> str:
    """``75`` -> ``"1:15"``; from two hours on ``7500`` -> ``"2:05 h"``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 120 else f"{minutes // 60}:{minutes % 60:02d} h"


class Overview:
    """A live table on a terminal, a line for each event elsewhere."""

    def __init__(
        self,
        run: RunFolder,
        jobs: list[Job],
        console: Console | None = None,
        estimates: dict[str, float] | None = None,
    ):
        self.run, self.jobs, self.estimates = run, jobs, estimates or {}
        # When a job was first seen to get on, and how far it was: loading and compiling are before that.
        self.first: dict[str, tuple[float, float]] = {}
        self.shares: dict[str, float] = {}
        # What the table shows of a job that has ended early: what lies in its folder may be an earlier result again.
        self.last: dict[str, tuple[float, str]] = {}
        self.console = console or terminal()
        self.states = {job.name: job.state for job in jobs}
        self.began: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        for job in jobs:
            done = run.done(job.name)
            if done:
                self.seconds[job.name] = done["seconds"]
        self.start = time.monotonic()
        self.live = (
            Live(self.table(), console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        )

    def __enter__(self) -> "Overview":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.update(self.table())
            self.live.stop()

    def started(self, job: Job) -> None:
        """A job's process has started."""
        verb = {"stale": f"again ({job.because} changed)", "part": "resumes"}.get(job.state, "starts")
        self.states[job.name] = "running"
        self.began[job.name] = time.monotonic()
        # Why something is made again stays to be read, also above the live table.
        (self.say if job.state == "stale" else self._say)(f"{job.name} {verb}")

    def finished(self, job: Job) -> None:
        """A job has finished. Its seconds are those that it wrote itself: the report has the same."""
        done = self.run.done(job.name) or {}
        self.states[job.name] = "done"
        seconds = self.seconds[job.name] = done.get("seconds", 0.0)
        rest = all(state == "done" for state in self.states.values())
        self._say(f"{job.name} done in {seconds:.0f} s" + ("" if rest else f"; about {self.left()} left"))
        for sentence in (done.get("figures") or {}).get("warnings") or []:
            line = printable(f"{job.name}: {sentence}")
            self.console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def stopped(self, job: Job, how: str) -> None:
        """A job has ended early, ``"interrupted"`` or ``"failed"``; told before its folder is looked after."""
        self.last[job.name] = self.progress(job)
        self.states[job.name] = how

    def update(self) -> None:
        """Redraw."""
        if self.live:
            self.live.update(self.table())

    def say(self, text: str) -> None:
        """A line that stays: also above the live table."""
        console = self.live.console if self.live else self.console
        line = f"[{clock(time.monotonic() - self.start)}] {printable(text)}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        if not self.live:
            self.say(text)

    def progress(self, job: Job) -> tuple[float, str]:
        """Share done in [0, 1], and what the stage says about it."""
        numbers = {"done": int | float, "total": int | float}
        said = read_marker(self.run.stage_dir(job.name) / "progress.json", keys=numbers)
        if said is None:
            return 0.0, ""
        share = said["done"] / said["total"] if said["total"] else 0.0
        return min(share, 1.0), str(said.get("note") or "") or f"{said['done']}/{said['total']}"

    def expected(self, job: Job) -> float | None:
        """Seconds a job takes: as the same stage took elsewhere in this run, as estimated, as configured, or as it
        took with other settings.
        """
        same = [j.name for j in self.jobs if j.stage == job.stage and self.states[j.name] == "done"]
        known = [self.seconds[name] for name in same if name in self.seconds]
        if known:
            return sum(known) / len(known)
        configured = self.run.config.launch.expected_seconds.get(job.stage)
        guess = self.estimates.get(job.name, float(configured) if configured else None)
        return self.seconds.get(job.name) if guess is None else guess

    def left(self) -> str:
        """Time left, as far as it can be known: from a running job's first update on by how fast it gets on."""
        rests: dict[str, float] = {}
        unknown = []
        for job in sorted(self.jobs, key=lambda one: self.states[one.name] != "running"):
            if self.states[job.name] == "done":
                continue
            rest = self.rest_of(job) if self.states[job.name] == "running" else self.expected(job)
            if rest is None:
                unknown.append(job.name)
            else:
                rests[job.name] = rest
        if unknown and not any(rests.values()):
            return "?"
        needs = {job.name: job.needs for job in self.jobs}
        known = clock(at_once(rests, needs.__getitem__, self.run.config.launch.workers))
        return known + (f" and what {', '.join(unknown)} will take" if unknown else "")

    def rest_of(self, job: Job) -> float | None:
        """Seconds a running job still needs; ``None`` before its first step where nothing else is known."""
        now = time.monotonic()
        elapsed = now - self.began[job.name]
        share, _ = self.progress(job)
        if share > 0:
            if share < self.shares.get(job.name, 0.0):  # another part of its work: samples after training
                self.first.pop(job.name, None)
            self.shares[job.name] = share
            seen, before = self.first.setdefault(job.name, (now, share))
            if share > before:
                return (now - seen) * (1 - share) / (share - before)
            if share > 0.05:
                return elapsed * (1 - share) / share
        guess = self.expected(job)
        if guess is not None:
            return max(guess - elapsed, 1.0)
        return elapsed * (1 - share) / share if share > 0 else None

    def table(self) -> Table:
        """The overview as a table."""
        title = Text(printable(str(self.run.root)))
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for heading, justify in (("stage", "left"), ("", "left"), ("progress", "left"), ("time", "right")):
            table.add_column(heading, justify=justify)
        for job in self.jobs:
            state = self.states[job.name]
            progress, spent = "", ""
            if state in ("running", "interrupted", "failed"):
                share, note = self.progress(job) if state == "running" else self.last[job.name]
                progress = f"{'━' * round(20 * share):<20} {note}"
                spent = clock(time.monotonic() - self.began[job.name])
            elif state == "done" and job.name in self.seconds:
                spent = clock(self.seconds[job.name])
            # Names and what a stage says are data, never markup.
            table.add_row(
                Text(printable(job.name)), Text(*MARKS.get(state, ("", ""))), Text(printable(progress)), spent
            )
        spent = clock(time.monotonic() - self.start)
        states = {*self.states.values()}
        if states <= {"done"}:
            table.caption = f"{spent} in all, from the first stage on"
        else:  # what is left of a job that has ended early is known when the command goes on with it
            ended = states & {"interrupted", "failed"}
            table.caption = f"{spent} so far" + ("" if ended else f", about {self.left()} left")
        return table


def verdict(run: RunFolder) -> list[str]:
    """What `compare` concluded, in its own sentences."""
    return (read_marker(run.path("compare", "report.json")) or {}).get("verdict", [])
