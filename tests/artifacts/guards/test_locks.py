"""One command, and one set of processes for each stage; a second names the first."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.guards import locks, processes

HOLDER = """
    import pathlib, sys, time
    from ppo_vs_dpo.artifacts.guards import locks
    with locks.stage_at_work(pathlib.Path(sys.argv[1]), "sft", int(sys.argv[2]), 2):
        print("held", flush=True)
        time.sleep(60)
"""


def holder(root, rank):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(root), str(rank)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_one_is_refused_and_told_who_holds_it(tmp_path):
    path = locks.run_lock(tmp_path)
    with locks.hold(path, "runs/x"):
        with pytest.raises(UserError, match=rf"runs/x is in use by another command: process {os.getpid()} on "):
            with locks.hold(path, "runs/x"):
                pass
    assert not path.exists()
    with locks.hold(path, "runs/x", shared=True), locks.hold(path, "runs/x", shared=True):
        with pytest.raises(UserError, match="in use"), locks.hold(path, "runs/x"):
            pass
    with locks.hold(path, "runs/x"):
        pass


def test_a_lock_file_that_a_kill_left_does_not_matter(tmp_path):
    for left in ("", "{", "[]", '{"pid": 1}'):
        locks.run_lock(tmp_path).write_text(left)
        with locks.hold(locks.run_lock(tmp_path), "runs/x"):
            pass


@pytest.mark.parametrize("left", [0, 1])
def test_a_stage_does_not_start_beside_a_rank_of_an_earlier_attempt(tmp_path, monkeypatch, left):
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    other = holder(tmp_path, left)
    try:
        with pytest.raises(UserError, match=rf"stage sft of .* is in use by another command: process {other.pid} on"):
            with locks.stage_at_work(tmp_path, "sft"):
                pass
        with locks.stage_at_work(tmp_path, "dpo"):
            pass
    finally:
        other.kill()
        other.wait()
    with locks.stage_at_work(tmp_path, "sft"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_dying_attempt_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 20.0)
    other = holder(tmp_path, 0)
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {other.pid}"])
    started = time.monotonic()
    with locks.stage_at_work(tmp_path, "sft"):
        assert 0.5 < time.monotonic() - started < 15
    other.wait()


TREE = """
    import subprocess, sys, time
    from ppo_vs_dpo.artifacts.guards.processes import MARK, watched
    import os
    mark = sys.argv[1]
    with watched(mark):
        # A launcher in a session of its own, its rank in another, and a worker of the rank: as torchrun starts them.
        inner = "import subprocess, time; subprocess.Popen(['sleep', '60'], start_new_session=True); time.sleep(60)"
        environment = {**os.environ, MARK: mark + ".sft."}
        subprocess.Popen([sys.executable, "-c", inner], env=environment, start_new_session=True)
        time.sleep(1)
        print("started", flush=True)
        time.sleep(60 if sys.argv[2] == "killed" else 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("end", ["killed", "ended"])
def test_nothing_outlives_the_command(tmp_path, end):
    mark = f"test-{os.getpid()}-{end}"
    command = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TREE), mark, end], stdout=subprocess.PIPE, text=True
    )
    assert command.stdout.readline() == "started\n"
    if end == "killed":
        assert len(processes.marked(mark)) == 2
        command.kill()
    command.wait()
    deadline = time.monotonic() + 5
    while processes.marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes.marked(mark) == []


def test_marks_are_whole_names():
    mark = f"marks-{os.getpid()}"
    sleepers = {
        name: subprocess.Popen(["sleep", "60"], env={**os.environ, processes.MARK: f"{mark}.{name}."})
        for name in ("ppo", "ppo,kl_coef=0.0")
    }
    try:
        assert processes.kill_marked(f"{mark}.ppo.") == (1 if sys.platform == "linux" else 0)
        assert sleepers["ppo,kl_coef=0.0"].poll() is None
    finally:
        for one in sleepers.values():
            one.kill()
            one.wait()


@pytest.mark.parametrize("guarded", [True, False])
def test_a_ctrl_c_that_falls_where_exceptions_are_ignored_comes_again(guarded):
    """While a process is forked (as here), and in finalizers; without the guard the run goes on."""
    code = f"""
        import os, signal, subprocess, sys, time
        from ppo_vs_dpo.artifacts.guards import processes
        if {guarded}:
            processes.lose_no_interrupt()
        once = []

        def hook():
            if not once:
                once.append(1)
                os.kill(os.getpid(), signal.SIGINT)

        os.register_at_fork(after_in_parent=hook)
        try:
            subprocess.run([sys.executable, "-c", "pass"], preexec_fn=lambda: None, check=True)
            time.sleep(1)
            print("went on")
        except KeyboardInterrupt:
            print("stopped")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    # Tests that were started in the background have the signal ignored, and would hand that down.
    allow = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    ended = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=allow)
    assert ended.stdout == ("stopped\n" if guarded else "went on\n")
    assert ("Traceback" in ended.stderr) != guarded
