"""Jobs as real processes: order, failure, Ctrl-C, kill, and one command at a time."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.guards import processes
from ppo_vs_dpo.artifacts.guards.fingerprints import Made
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.running import execute
from ppo_vs_dpo.pipeline.running import job as job_module
from ppo_vs_dpo.pipeline.running.graph import Job
from ppo_vs_dpo.pipeline.running.launch import ForkServer
from ppo_vs_dpo.pipeline.running.overview import Overview

CHILD = """
import json, os, pathlib, sys, time

def main():
    run, name, what = sys.argv[1:4]
    folder = pathlib.Path(run) / name
    (folder / "began").write_text(str(time.time()))
    (folder / "gpus").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    print("working on", name, flush=True)
    if what.startswith("some work, then "):
        step = len(list(folder.glob("checkpoints/*"))) + 1
        (folder / "progress.json").write_text('{"done": 1, "total": 4, "note": "a quarter"}')
        (folder / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        what = what.removeprefix("some work, then ")
    if what == "fail":
        sys.exit("\\nerror in stage %s: the pairs file is empty" % name)
    if what == "rank":
        sys.exit("Root Cause (first observed failure):\\n  rank      : 3 (local_rank: 1)\\n  exitcode  : -9 (pid: 7)")
    if what == "hang":
        time.sleep(600)
    time.sleep(0.3)
    (folder / "done.json").write_text(json.dumps({"stage": name, "fingerprint": "f", "seconds": 0.3, "figures": {}}))
    (folder / "ended").write_text(str(time.time()))

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def run(request, tmp_path, monkeypatch):
    """Its jobs are processes of their own; or forks of one, where the parameter says so."""
    launch = {"workers": 2, "processes": 1, "threads": 1, "expected_seconds": {}}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({"launch": launch})))
    (tmp_path / "modules" / "child").mkdir(parents=True)
    (tmp_path / "modules" / "child" / "__main__.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(
        execute,
        "command",
        lambda run, job: [sys.executable, "-m", "child", str(run.root), job.name, job.point.get("what", "work")],
    )
    run = RunFolder(tmp_path)
    if getattr(request, "param", "processes") == "processes":
        yield run
        return
    with ForkServer(["child"], job_module.environment(run.config, "test..")) as SERVERS[run.root]:
        ready(SERVERS[run.root])
        yield run
    del SERVERS[run.root]


SERVERS = {}
both_ways = pytest.mark.parametrize(
    "run",
    ["processes", pytest.param("forks", marks=pytest.mark.skipif(sys.platform != "linux", reason="/proc"))],
    indirect=True,
)


def ready(server):
    deadline = time.monotonic() + 120
    while not server.ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def go(run, jobs):
    out = io.StringIO()
    with Overview(run, jobs, Console(file=out, width=100)) as overview:
        execute.execute(run, jobs, overview, SERVERS.get(run.root))
    return out.getvalue()


def times(run, name):
    return [float((run.root / name / part).read_text()) for part in ("began", "ended")]


@both_ways
def test_order_follows_needs_and_two_run_at_once(run):
    jobs = [Job("a", "a"), Job("b", "b", needs=("a",)), Job("c", "c", needs=("a",)), Job("d", "d", needs=("b", "c"))]
    said = go(run, jobs)
    assert times(run, "a")[1] <= min(times(run, "b")[0], times(run, "c")[0])
    assert max(times(run, "b")[1], times(run, "c")[1]) <= times(run, "d")[0]
    assert times(run, "b")[0] < times(run, "c")[1]
    assert times(run, "c")[0] < times(run, "b")[1]
    assert "d done in" in said
    assert said.rstrip().endswith(" s")  # the last one: nothing is left


def test_jobs_beside_each_other_see_gpus_of_their_own(run, monkeypatch):
    """Two GPUs, three jobs that need nothing of each other: the third waits for the first one to be free."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    run.config.launch.workers = 3
    go(run, [Job(name, "sft") for name in "abc"])
    assert [(run.root / name / "gpus").read_text() for name in "ab"] == ["5", "6"]
    assert (run.root / "c" / "gpus").read_text() in ("5", "6")
    assert times(run, "c")[0] >= min(times(run, "a")[1], times(run, "b")[1])


@both_ways
def test_a_failure_shows_the_stage_s_own_words_and_stops_the_others(run):
    jobs = [Job("good", "good", {"what": "hang"}), Job("bad", "bad", {"what": "fail"})]
    start = time.monotonic()
    with pytest.raises(execute.StageFailed) as failure:
        go(run, jobs)
    assert time.monotonic() - start < 300  # the other one would sleep for 600
    assert "stage bad failed" in str(failure.value)
    assert "the pairs file is empty" in str(failure.value)
    assert "bad/log.txt" in str(failure.value)
    assert run.done("good") is None


@both_ways
def test_a_killed_stage_is_named(run):
    job = Job("victim", "victim", {"what": "hang"})

    def kill():
        while not (run.root / "victim" / "began").exists():
            time.sleep(0.05)
        found = subprocess.run(["pgrep", "-f", f"{run.root} victim"], capture_output=True, text=True, check=True)
        os.kill(int(found.stdout.split()[0]), signal.SIGKILL)

    threading.Thread(target=kill).start()
    with pytest.raises(execute.StageFailed, match="victim was killed by SIGKILL"):
        go(run, [job])


def test_a_killed_rank_is_named(run):
    """What torchrun says at the end of a log, in a sentence."""
    with pytest.raises(UserError, match=r"rank 3 of stage split was killed by SIGKILL \(out of memory\?\)"):
        go(run, [Job("split", "ppo", {"what": "rank"})])


@both_ways
def test_killing_the_command_kills_its_stages(run):
    """kill -9 of the command leaves no stage behind that goes on writing, nor what it is a fork of."""
    code = f"""
        import sys, time
        from ppo_vs_dpo.pipeline.running import execute
        from ppo_vs_dpo.pipeline.running.graph import Job
        from ppo_vs_dpo.pipeline.running.job import environment
        from ppo_vs_dpo.pipeline.running.launch import ForkServer
        from ppo_vs_dpo.pipeline.running.overview import Overview
        from ppo_vs_dpo.artifacts.run import RunFolder
        run = RunFolder({str(run.root)!r})
        execute.command = lambda run, job: [sys.executable, "-m", "child", str(run.root), job.name, "hang"]
        jobs = [Job("orphan", "orphan")]
        server = ForkServer(["child"], environment(run.config, "test..")) if {run.root in SERVERS} else None
        while server and not server.ready():
            time.sleep(0.05)
        with Overview(run, jobs) as overview:
            execute.execute(run, jobs, overview, server)
    """
    command = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run.root / "orphan" / "began").exists():
        assert command.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = [pid for pid in processes.marked("") if parent(pid) == command.pid]
    assert len(started) == 1
    command.kill()
    command.wait()
    time.sleep(0.5)
    left = subprocess.run(["pgrep", "-f", f"{run.root} orphan"], capture_output=True, text=True, check=False)
    assert left.stdout == ""
    assert not Path(f"/proc/{started[0]}").exists() or parent(started[0]) != command.pid


def parent(pid):
    """The parent of a process; 0 where it has just ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@both_ways
def test_a_stopped_rank_is_named_and_ends_the_job(run, monkeypatch):
    monkeypatch.setattr(job_module, "STOPPED", 1.0)
    monkeypatch.setattr(job_module, "LOOK_EVERY", 0.2)

    def stop():
        while not (run.root / "victim" / "began").exists():
            time.sleep(0.05)
        found = subprocess.run(["pgrep", "-f", f"{run.root} victim"], capture_output=True, text=True, check=True)
        os.kill(int(found.stdout.split()[0]), signal.SIGSTOP)

    threading.Thread(target=stop).start()
    with pytest.raises(execute.StageFailed, match=r"process \d+ of stage victim has been stopped for 1 s"):
        go(run, [Job("victim", "victim", {"what": "hang"})])
    left = subprocess.run(["pgrep", "-f", f"{run.root} victim"], capture_output=True, text=True, check=False)
    assert left.stdout == ""


RANKS = """
import os, pathlib, subprocess, sys, time
from ppo_vs_dpo.artifacts.guards import processes
processes.BEAT = 0.1
folder = pathlib.Path(sys.argv[1])
if len(sys.argv) > 2:
    (folder / f"pid{sys.argv[2]}").write_text(str(os.getpid()))
    processes.beat(folder / "pulse", int(sys.argv[2]))
    time.sleep(600)
for process in [subprocess.Popen([sys.executable, __file__, str(folder), str(rank)]) for rank in range(2)]:
    process.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_rank_that_is_not_heard_of_is_named_and_ends_the_job(run, tmp_path, monkeypatch):
    """Two ranks as on two machines: what the processes here show of them is not looked at, what they say is."""
    monkeypatch.setattr(job_module, "LOOK_EVERY", 0.1)
    monkeypatch.setattr(job_module, "stopped", lambda mark: [])
    monkeypatch.setattr(processes, "BEAT", 0.5)
    monkeypatch.setattr(processes, "SILENT", 2.0)
    run.config.launch.nodes = 2
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    folder = run.stage_dir("split")
    monkeypatch.setattr(execute, "command", lambda run, job: [sys.executable, str(script), str(folder)])
    stopped = []

    def stop():
        while not ((folder / "pulse" / "rank0").exists() and (folder / "pulse" / "rank1").exists()):
            time.sleep(0.05)
        time.sleep(3.0)  # both are alive, and nothing is said of them
        stopped.append(time.monotonic())
        os.kill(int((folder / "pid1").read_text()), signal.SIGSTOP)

    threading.Thread(target=stop).start()
    said = rf"rank 1 \(process \d+ on {re.escape(socket.gethostname())}\) of stage split has not been heard of"
    with pytest.raises(execute.StageFailed, match=said) as failure:
        go(run, [Job("split", "split")])
    assert 1.0 < time.monotonic() - stopped[0] < 40
    assert "The same command goes on from where this stopped" in str(failure.value)
    assert not (folder / "pulse").exists()
    time.sleep(0.5)
    for rank in range(2):  # a zombie has no command line
        line = Path(f"/proc/{(folder / f'pid{rank}').read_text()}/cmdline")
        assert not line.exists() or line.read_bytes() == b""


LOOPS = """
import json, pathlib, sys, time
from ppo_vs_dpo.artifacts.guards.processes import say_where_asked
folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]
say_where_asked()

def endless():
    while True:
        time.sleep(0.01)

for step in range(12):
    if what == "speaks":
        print("a line", flush=True)
    else:
        (folder / "progress.json").write_text(json.dumps({"done": step, "total": 12, "note": "updates"}))
    time.sleep(0.25)
    if what == "loops" and step == 2:
        endless()
(folder / "done.json").write_text(json.dumps({"stage": "a", "fingerprint": "f", "seconds": 3, "figures": {}}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_stage_that_does_not_get_on_is_ended_with_its_line_where_that_is_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "LOOK_EVERY", 0.1)
    monkeypatch.setattr(job_module, "ANSWER", 0.5)
    script = tmp_path / "loops.py"
    script.write_text(LOOPS)
    line = 1 + LOOPS.splitlines().index("        time.sleep(0.01)")
    monkeypatch.setattr(
        execute, "command", lambda run, job: [sys.executable, str(script), str(run.stage_dir(job.name)), job.name]
    )
    run.config.launch.stalled_after = 2.0
    go(run, [Job("works", "works"), Job("speaks", "speaks")])  # each for three seconds
    place = re.escape(f"endless ({script}, line {line})")
    why = (
        rf"stage loops has not got on for [23] s at 2/12 updates\. It stands in {place}\. launch.stalled_after is 2 s"
    )
    with pytest.raises(execute.StageFailed, match=why) as failure:
        go(run, [Job("loops", "loops")])
    assert "The same command goes on from where this stopped" in str(failure.value)
    # Where it is not asked for, it is said, once, and nobody is ended.
    run.config.launch.stalled_after = None
    monkeypatch.setattr(job_module, "QUIET", 1.0)
    threading.Timer(5.0, lambda: [os.kill(pid, signal.SIGKILL) for pid in processes.marked(f"{os.getpid()}-")]).start()
    out = io.StringIO()
    with (
        pytest.raises(execute.StageFailed, match="killed by SIGKILL"),
        Overview(run, [Job("loops", "loops")], Console(file=out, width=100)) as overview,
    ):
        execute.execute(run, overview.jobs, overview)
    assert out.getvalue().count("stage loops has not got on for") == 1
    assert f"It stands in endless ({script}, line {line}). If that is no work" in out.getvalue()


def test_what_ranks_said_of_a_stalled_step_is_shown_where_nobody_else_says_it():
    """NCCL ends a process without a word of Python: what its ranks said before is all there is."""
    lines = [
        "rank 0 has been in this step for 1770 s: ppo, update 3, score. It waits for the others at all_reduce (c.py).",
        "rank 1 has been in this step for 1770 s: ppo, update 3, score. It does not wait for others: it is at f (r).",
    ]
    text = "\n".join(["loading", *lines, "[rank0]:[E1126 Watchdog caught collective operation timeout", "Signal 6"])
    assert job_module.stalled_ranks(text) == f"{lines[1]}\n{lines[0]}\n"
    assert job_module.stalled_ranks(f"{text}\nerror in stage ppo: rank 0 waited in vain") == ""
    stacks = """Stack (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 7 in all_reduce
  File "/y/train.py", line 8 in train
Current thread 0x01 (most recent call first):
  File "/y/rewards.py", line 3 in slow
"""
    assert job_module.stood(stacks) == ["slow (/y/rewards.py, line 3)"]
    assert job_module.stood(stacks[: stacks.index("Current")]) == [
        "all_reduce (/x/torch/distributed/distributed_c10d.py, line 7)"
    ]


def test_where_nobody_is_heard_of_nobody_is_named(tmp_path, monkeypatch):
    """A file system that stands still is no rank's fault; a rank that has not begun is waited for."""
    monkeypatch.setattr(processes, "SILENT", 0.2)
    monkeypatch.setattr(processes, "BEAT", 0.02)
    pulses = processes.Pulses(tmp_path)
    assert pulses.silent() is None
    for rank in (0, 1):
        (tmp_path / f"rank{rank}").write_text("x")
    assert pulses.silent() is None
    time.sleep(0.3)
    assert pulses.silent() is None
    os.utime(tmp_path / "rank0", (1, 1))
    assert pulses.silent() == "rank 1 (x)"
    (tmp_path / "rank1").unlink()  # it had ended in order
    assert pulses.silent() is None


@both_ways
def test_an_earlier_attempt_s_words_are_not_this_one_s(run):
    """log.txt is appended to; the cause that is shown is of this attempt."""
    (run.root / "split").mkdir()
    (run.root / "split" / "log.txt").write_text(
        "Root Cause:\n rank : 3\n exitcode : -9 (pid: 7)\nerror in stage x: old\n"
    )
    with pytest.raises(UserError) as failure:
        go(run, [Job("split", "split", {"what": "fail"})])
    assert "the pairs file is empty" in str(failure.value)
    assert "old" not in str(failure.value).replace(str(run.root), "")
    assert "rank 3" not in str(failure.value)


@both_ways
def test_a_replaced_result_is_back_where_the_new_attempt_made_nothing(run):
    folder = run.stage_dir("bad")
    run.begin("bad", Made("earlier", {}))
    (folder / "model").write_text("three days of work")
    run.finish("bad", "earlier", 1.0, {})
    with pytest.raises(UserError, match="The earlier result of bad is in its place again"):
        go(run, [Job("bad", "bad", {"what": "fail"}, made=Made("new", {}))])
    assert (folder / "model").read_text() == "three days of work"
    assert run.done("bad")["fingerprint"] == "earlier"
    assert "the pairs file is empty" in (folder / "log.failed.txt").read_text()
    assert not (run.root / ".replaced").exists()


def _interrupt_at_work(run, job, attempt):
    while not (run.stage_dir(job.name) / "checkpoints" / f"checkpoint-{attempt}").is_dir():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


def interrupted(run, job, attempt):
    """Ctrl-C once the job is at work."""
    # Tests that were started in the background have the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_interrupt_at_work, args=(run, job, attempt)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            go(run, [job])
    finally:
        signal.signal(signal.SIGINT, before)


def failed(run, job, attempt):
    with pytest.raises(UserError, match="The earlier result of bad is in its place again"):
        go(run, [job])


@both_ways
@pytest.mark.parametrize("first", ["fail", "hang", "kill"])
def test_a_finished_result_is_back_however_the_new_attempt_ends(run, first):
    """Failed, interrupted, or failed after the command itself was killed: and its checkpoints are gone on from."""
    folder = run.stage_dir("bad")
    run.begin("bad", Made("earlier", {}))
    (folder / "model").write_text("three days of work")
    run.finish("bad", "earlier", 1.0, {})
    for attempt in (1, 2):
        if first == "kill":
            # What a killed command leaves behind: the attempt where it was, the earlier result aside.
            assert run.begin("bad", Made("new", {})) == run.root / ".replaced" / "bad-1"
        what = f"some work, then {'hang' if first == 'hang' else 'fail'}"
        job = Job("bad", "bad", {"what": what}, made=Made("new", {}))
        (interrupted if first == "hang" else failed)(run, job, attempt)
        assert (folder / "model").read_text() == "three days of work"
        assert run.done("bad")["fingerprint"] == "earlier"
        (kept,) = (run.root / ".replaced").glob("bad-*")
        assert len(list(kept.glob("checkpoints/*"))) == attempt
    go(run, [Job("bad", "bad", made=Made("new", {}))])
    assert len(list(folder.glob("checkpoints/*"))) == 2
    assert run.done("bad") is not None
    (kept,) = (run.root / ".replaced").glob("bad-*")
    assert (kept / "model").read_text() == "three days of work"


def test_one_command_at_a_time(run):
    with execute.locked(run.root):
        with pytest.raises(UserError, match="in use by another command"), execute.locked(run.root):
            pass
    with execute.locked(run.root):
        pass


def test_a_terminal_says_why_something_is_made_again(run):
    """Above the live table, where it stays."""
    out = io.StringIO()
    jobs = [Job("a", "a", state="stale", because="the settings of a"), Job("b", "b")]
    with Overview(run, jobs, Console(file=out, width=100, force_terminal=True)) as overview:
        for job in jobs:
            overview.started(job)
    assert "a again (the settings of a changed)" in out.getvalue()
    assert "b starts" not in out.getvalue()  # the table says so


@pytest.mark.parametrize(("what", "word"), [("hang", "interrupted"), ("fail", "failed")])
def test_the_last_table_shows_the_new_attempt_and_not_the_earlier_result(run, what, word):
    """By then the earlier result is in its place again, with its progress."""
    folder, out = run.stage_dir("bad"), io.StringIO()
    run.begin("bad", Made("earlier", {}))
    (folder / "progress.json").write_text('{"done": 4, "total": 4, "note": "all of it"}')
    run.finish("bad", "earlier", 1.0, {})
    job = Job("bad", "bad", {"what": f"some work, then {what}"}, state="stale", made=Made("new", {}))
    threading.Thread(target=_interrupt_at_work, args=(run, job, 1)).start() if what == "hang" else None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises((KeyboardInterrupt, UserError)):
            with Overview(
                run, [job], Console(file=out, width=100, force_terminal=True, color_system=None)
            ) as overview:
                execute.execute(run, [job], overview)
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.done("bad")["fingerprint"] == "earlier"
    last = out.getvalue().rpartition("stage")[2]
    assert word in last
    assert "a quarter" in last
    assert "all of it" not in last
    assert "left" not in last  # of that nothing is known here


def test_a_stage_is_told_when_the_command_started_it(run, monkeypatch):
    """Its seconds begin there; on other machines, whose clocks are others, at its own start."""
    told = "import json, os; print(os.environ.get('PPO_VS_DPO_BEGAN'))"
    monkeypatch.setattr(execute, "command", lambda run, job: [sys.executable, "-c", told])
    for elsewhere in (False, True):
        monkeypatch.setattr(job_module, "on_several_machines", lambda config, e=elsewhere: e)
        before = time.monotonic()
        with pytest.raises(UserError, match="without its last word"):
            go(run, [Job("a", "a")])
        said = (run.stage_dir("a") / "log.txt").read_text().split()[-1]
        assert said == "None" if elsewhere else before <= float(said) <= time.monotonic()


def test_time_left_is_unknown_until_something_is_known(run):
    jobs = [Job("a", "a"), Job("a,x=1", "a", {"x": 1})]
    overview = Overview(run, jobs, Console(file=io.StringIO()))
    assert overview.left() == "?"
    run.finish("a", "f", 90.0, {})
    overview.finished(jobs[0])
    assert overview.left() == "1:30"


def test_how_long_it_took_with_other_settings_is_no_estimate(run):
    run.finish("a", "f", 5.0, {})
    jobs = [Job("a", "a", state="stale", because="a.max_steps"), Job("b", "b", needs=("a",))]
    assert Overview(run, jobs, Console(file=io.StringIO()), {"a": 200.0, "b": 10.0}).left() == "3:30"
    assert Overview(run, jobs, Console(file=io.StringIO()), {"b": 10.0}).left() == "0:15"  # better than nothing


def test_time_left_is_known_from_the_first_update_on(run, monkeypatch):
    """Whatever loading took: what counts is how fast a job gets on since it was first seen to."""
    now = [0.0]
    monkeypatch.setattr("ppo_vs_dpo.pipeline.running.overview.time.monotonic", lambda: now[0])
    jobs = [Job("a", "a"), Job("b", "b")]
    overview = Overview(run, jobs, Console(file=io.StringIO()))
    done = [0]
    monkeypatch.setattr(overview, "progress", lambda job: (done[0] / 100, ""))
    overview.started(jobs[0])
    now[0] = 50.0
    assert overview.left() == "?"
    done[0] = 1
    overview.left()
    now[0], done[0] = 60.0, 2  # ten seconds an update, 98 to go
    assert overview.left() == "16:20 and what b will take"
    overview.estimates = {"b": 20.0}
    assert overview.left() == "16:20"  # two workers: b beside a
    overview.estimates = {"b": 9000.0}
    assert overview.left() == "2:30 h"  # hours are not counted in minutes
    # Another part of its work begins at nothing again: samples after the training.
    overview.estimates, done[0] = {}, 1
    overview.left()
    now[0], done[0] = 70.0, 2
    assert overview.rest_of(jobs[0]) == 980.0


def test_a_tracker_writes_into_the_run_unless_told_otherwise(monkeypatch, tmp_path):
    config = OmegaConf.create({"output_dir": str(tmp_path), "name": "a", "launch": {"threads": 1}})
    monkeypatch.delenv("WANDB_DIR", raising=False)
    assert job_module.environment(config, "x")["WANDB_DIR"] == str(tmp_path / "a")
    monkeypatch.setenv("WANDB_DIR", "/elsewhere")
    assert job_module.environment(config, "x")["WANDB_DIR"] == "/elsewhere"
