"""A job as a process: started, listened to, stopped, and what its end means."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import uuid
from pathlib import Path

from omegaconf import DictConfig

from ppo_vs_dpo.artifacts.errors import printable
from ppo_vs_dpo.artifacts.files import read_marker
from ppo_vs_dpo.artifacts.guards import replaced
from ppo_vs_dpo.artifacts.guards.fingerprints import point_text
from ppo_vs_dpo.artifacts.guards.processes import (
    MARK,
    SILENT,
    Pulses,
    ask_where,
    kill_marked,
    stopped,
)
from ppo_vs_dpo.artifacts.resources import BEGAN
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.artifacts.stage import PULSE, on_several_machines
from ppo_vs_dpo.pipeline.checking.elsewhere import handed_on
from ppo_vs_dpo.pipeline.planning.gpus import VISIBLE
from ppo_vs_dpo.pipeline.running.graph import DISTRIBUTED, Job
from ppo_vs_dpo.pipeline.running.launch import ALONE, ForkServer, launcher, may_fork, start

# Characters of a job's output that are kept in memory: its last words are wanted where the disk is full, too.
KEPT = 1 << 17
# Seconds after which a stopped process counts as hung, and between two looks.
STOPPED = 30.0
LOOK_EVERY = 3.0
# Seconds without progress after which a job is spoken of, and that its processes get to say where they are.
QUIET = 1800.0
ANSWER = 1.0
# Seconds that a launcher gets to end what it started on other machines, before it is killed itself.
ELSEWHERE = 10.0


def environment(config: DictConfig, mark: str, gpus: list[str] | None = None) -> dict[str, str]:
    """Environment of a stage's process, which sees these ``gpus`` (all there are where none are named)."""
    threads = str(config.launch.threads)
    return {
        # Sequences of all lengths come and go: without it memory falls to pieces (torch's notes on CUDA semantics).
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # W&B would write into the folder that the command was typed in.
        "WANDB_DIR": str(Path(config.get("output_dir") or ".", config.get("name") or "").resolve()),
        **os.environ,
        **({VISIBLE: ",".join(gpus)} if gpus else {}),
        MARK: mark,
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
    start = launcher(run.config.launch) if job.stage in DISTRIBUTED else [*ALONE]
    arguments = [f"ppo_vs_dpo.{room}", str(run.root)]
    if room != job.stage:
        arguments += ["--step", job.stage]
    if job.point:
        arguments += ["--point", point_text(job.point)]
    return [*start, *arguments, "--fingerprint", job.fingerprint]


def fork_server(run: RunFolder, jobs: list[Job]) -> ForkServer | None:
    """What these jobs are forks of, begun now: it imports while the first of them are prepared. ``None`` where they
    cannot be forks, and for a single job, which imports by itself as fast.
    """
    if len(jobs) < 2 or not may_fork(run.config):
        return None
    modules = dict.fromkeys(command(run, job)[len(ALONE)] for job in jobs)
    return ForkServer([*modules], environment(run.config, f"{os.getpid()}-{uuid.uuid4().hex[:12]}.."))


class Running:
    """A job's process and its log.

    Args:
        run: the run folder.
        job: what to run.
        command: its command line.
        mark: of the command that starts it; everything that the job starts carries it, with the job's own number.
        gpus: that it has for itself.
        server: to be forked for it, where that can be.
    """

    def __init__(
        self,
        run: RunFolder,
        job: Job,
        command: list[str],
        mark: str,
        gpus: list[str] | None = None,
        server: ForkServer | None = None,
    ):
        self.run, self.job, self.mark, self.gpus, self.server = run, job, mark, gpus or [], server
        folder = run.stage_dir(job.name)
        self.aside = run.begin(job.name, job.made)
        self.log_path = folder / "log.txt"
        self.log = self.log_path.open("ab")
        self.said, self.heard = b"", 0
        self.started = self.looked = self.moved_at = time.monotonic()
        self.moved: tuple[int, int] | None = None
        self.spoken = False
        self.stopped_since: dict[int, float] = {}
        self.elsewhere = on_several_machines(run.config)
        shutil.rmtree(folder / PULSE, ignore_errors=True)
        self.pulses = Pulses(folder / PULSE)
        env = environment(run.config, mark, self.gpus)
        if not self.elsewhere:  # another machine has another clock
            env[BEGAN] = str(self.started)
        if run.config.launch.get("hostfile"):
            env |= handed_on(env, folder)
        self.process = start(command, env, server)
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        """Write what the job says to its log, and keep its end: of this attempt only, and also on a full disk."""
        pipe = self.process.stdout.fileno()
        while True:
            try:
                block = os.read(pipe, 1 << 16)
            except OSError:
                return
            if not block:
                return
            self.said, self.heard = (self.said + block)[-KEPT:], self.heard + len(block)
            with contextlib.suppress(OSError, ValueError):
                self.log.write(block)
                self.log.flush()

    def hung(self) -> str | None:
        """Looked at now and then: what to say of a rank that is stopped, or not heard of; ``None`` where all are well.

        One that works is alive, however long the others wait for it: it merges, it saves, its judge is slow. It is
        ended where ``launch.stalled_after`` says how long that may take.
        """
        now = time.monotonic()
        if now - self.looked < LOOK_EVERY:
            return None
        self.looked, name = now, self.job.name
        held = stopped(self.mark) + (stopped(self.server.mark) if self.server else [])
        self.stopped_since = {pid: self.stopped_since.get(pid, now) for pid in held}
        late = [pid for pid, since in self.stopped_since.items() if now - since > STOPPED]
        if late:
            return f"process {late[0]} of stage {name} has been stopped for {STOPPED:.0f} s, and the others wait."
        limit = self.run.config.launch.get("stalled_after")
        if limit and self.idle(now) > limit:
            return f"{self.standstill(now)} launch.stalled_after is {limit:.0f} s."
        silent = self.pulses.silent() if self.elsewhere else None
        if silent is None:
            return None
        return (
            f"{silent} of stage {name} has not been heard of for {SILENT:.0f} s, and the others are alive: it is "
            f"stopped, its machine is down, or it does not see the run folder."
        )

    def idle(self, now: float) -> float:
        """Seconds since the job was seen to get on (``progress.json``) or to say something."""
        stamp = 0
        with contextlib.suppress(OSError):
            stamp = (self.log_path.parent / "progress.json").stat().st_mtime_ns
        if (stamp, self.heard) != self.moved:
            self.moved, self.moved_at, self.spoken = (stamp, self.heard), now, False
        return now - self.moved_at

    def quiet(self) -> str | None:
        """Said once of a job that has not got on for half an hour: it may well be at work."""
        now = time.monotonic()
        if self.spoken or now - self.moved_at < QUIET or self.idle(now) < QUIET:
            return None
        self.spoken = True
        return f"{self.standstill(now)} If that is no work, Ctrl-C ends it; launch.stalled_after does so by itself."

    def standstill(self, now: float) -> str:
        """A sentence on a job that does not get on: since when, in which step, at which line."""
        seconds, before = self.idle(now), self.heard
        said = read_marker(self.log_path.parent / "progress.json", keys={"done": int | float, "total": int | float})
        step = f" at {said['done']}/{said['total']}{' ' + said['note'] if said.get('note') else ''}" if said else ""
        if ask_where(self.mark):
            time.sleep(ANSWER)
            self.moved = (self.moved[0], self.heard)  # the answer is no progress
        places = stood(self.said[before - self.heard :].decode(errors="replace") if self.heard > before else "")
        where = f" It stands in {' and in '.join(places)}." if places else ""
        return printable(f"stage {self.job.name} has not got on for {seconds:.0f} s{step}.{where}")

    def signal(self, number: int) -> None:
        """Send a signal to the job and its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End the job and all it started; what is on other machines its launcher ends, which is asked first."""
        if self.elsewhere and self.process.poll() is None:
            self.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(ELSEWHERE)
        self.signal(signal.SIGKILL)
        kill_marked(self.mark)

    def close(self) -> None:
        """Wait for its last words, and close the log."""
        self.listener.join(timeout=5.0)
        with contextlib.suppress(OSError):
            self.log.close()
        self.process.stdout.close()
        shutil.rmtree(self.pulses.folder, ignore_errors=True)

    def put_back(self) -> bool:
        """Put the finished result that this attempt took the place of where it was: it is never lost to a failure.

        What the attempt made is moved aside if it took work, and the same command goes on from it; else its log alone
        is kept beside the result, as ``log.failed.txt``.

        Returns:
            Whether that was done.
        """
        folder = self.run.stage_dir(self.job.name)
        if self.aside is None or self.run.done(self.job.name) is not None:
            return False
        if replaced.worth_keeping(folder):
            if not (self.aside / "done.json").is_file():
                return False
            attempt = replaced.bring_back(self.run.root, self.job.name, self.aside, folder)
            self.log_path = attempt / self.log_path.name
            return True
        with contextlib.suppress(OSError):
            self.log_path.replace(self.aside / "log.failed.txt")
        replaced.bring_back(self.run.root, self.job.name, self.aside, folder)
        self.log_path = folder / "log.failed.txt"
        return True

    @property
    def words(self) -> str:
        """What the job said last, as text."""
        return self.said.decode(errors="replace")


def last_words(text: str, lines: int = 25) -> str:
    """The end of a log: from its last ``error in stage`` line where there is one, else its last lines."""
    text = text.replace("\r", "\n")
    marker = f"\n{text}".rfind("\nerror in stage")
    said = text[marker:].strip() if marker >= 0 else "\n".join(text.strip().splitlines()[-lines:])
    # What torchrun adds on its own behalf after the stage's words.
    return printable(re.split(r"\n[EW]\d{4} [\d:.]+ |\n=+\n|\nTraceback ", said)[0].strip() or said)


def stood(text: str) -> list[str]:
    """Where processes said they are: the innermost line of each, those that wait for other ranks left out."""
    found = re.findall(r'most recent call first\):\s+File "([^"]+)", line (\d+) in (\S+)', text)
    lines = {f"{name} ({file}, line {line})": "torch/distributed/" in file for file, line, name in found}
    alone = [place for place, waits in lines.items() if not waits]
    return (alone or list(lines))[:4]


def stalled_ranks(text: str) -> str:
    """What ranks said of a step that lasted too long, a line each: where NCCL ends the stage nobody else says it."""
    if "\nerror in stage" in text:
        return ""
    found = re.findall(r"^rank \d+ has been in this step for .*$", text, re.MULTILINE)
    found.sort(key=lambda line: "It waits for the others" in line)
    return printable("".join(f"{line}\n" for line in found[:4]))


def root_cause(text: str) -> tuple[int, int] | None:
    """Rank and exit code of the process that ended first, as torchrun's summary at the end of a log has them."""
    found = re.findall(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", text, re.DOTALL)
    return (int(found[-1][0]), int(found[-1][1])) if found else None


def explain_end(one: Running, hung: str | None = None) -> str:
    """Why a job ended as it did, where its log is, and what the same command will do."""
    code, name = one.process.returncode, one.job.name
    back = one.put_back()
    place = f"\n\nThe whole log: {one.log_path}\nThe same command goes on from where this stopped."
    if back:
        place += f" The earlier result of {name} is in its place again."
    if hung is not None:
        return f"{hung} The stage was ended.{place}"
    if code < 0:
        return f"stage {name} was killed by {_signal_name(-code)}.{place}"
    cause = root_cause(one.words)
    if cause is not None and cause[1] < 0:
        return f"rank {cause[0]} of stage {name} was killed by {_signal_name(-cause[1])}.{place}"
    if code == 0:
        return f"stage {name} ended without its last word, done.json:\n{last_words(one.words)}{place}"
    return f"stage {name} failed:\n{stalled_ranks(one.words)}{last_words(one.words)}{place}"


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
    return f"{name} (out of memory?)" if name == "SIGKILL" else name


__all__ = ["Running", "command", "environment", "explain_end", "last_words", "root_cause"]
