"""Stages as forks of one process: what a fork is, and what becomes of it when something ends that should not."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.guards.fingerprints import Made
from ppo_vs_dpo.artifacts.guards.processes import MARK, marked
from ppo_vs_dpo.artifacts.resources import BEGAN
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.running import job as job_module
from ppo_vs_dpo.pipeline.running import launch
from ppo_vs_dpo.pipeline.running.graph import Job
from ppo_vs_dpo.pipeline.running.launch import ForkServer, may_fork, start
from ppo_vs_dpo.pipeline.running.profile import profile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each stage is a process of its own")

# Says what it is, as far as a stage could tell a difference.
PROBE = """
import atexit, ctypes, json, os, pathlib, signal, sys, threading, time
from ppo_vs_dpo.artifacts import resources

print("said when it is imported", flush=True)

def main():
    atexit.register(print, "at its end", flush=True)
    me, death = pathlib.Path("/proc/self"), ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(death))
    environment = (me / "environ").read_bytes().split(b"\\0")
    print(json.dumps({
        "argv": sys.argv, "main": sys.modules["__main__"].__spec__.name, "path": sys.path, "cwd": os.getcwd(),
        "line": (me / "cmdline").read_text().rstrip("\\0").split("\\0"),
        "environment": dict(os.environ),
        "shown": sorted(item.decode() for item in environment if item.startswith(b"PPO_VS_DPO_COMMAND")),
        "files": [os.readlink(me / "fd" / str(n)).split(":")[0] for n in range(3)],
        "how many": len(os.listdir(me / "fd")),
        "leads": os.getsid(0) == os.getpgid(0) == os.getpid(),
        "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "killed with its parent": death.value,
        "threads": len(list((me / "task").iterdir())),
        "parts": sorted(resources.seconds_by_part()),
        "of now": max(resources.age(), resources.cpu_seconds()) < 3, "start": resources._spent["start-up"] > 10,
        "stdin": sys.stdin.read(),
    }), flush=True)
    print("parent", os.getppid(), flush=True)
    what = sys.argv[1]
    if what == "raise":
        raise RuntimeError("a defect")
    if what == "hang":
        time.sleep(600)
    sys.exit(int(what))

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder of modules that processes find."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv(MARK, "test..")
    add(tmp_path, "probe", PROBE)
    return tmp_path


def add(folder, name, text):
    (folder / name).mkdir()
    (folder / name / "__main__.py").write_text(text)


def ready(server, limit=120.0):
    deadline = time.monotonic() + limit
    while not server.ready():
        if time.monotonic() > deadline or server._process.poll() is not None:
            return False
        time.sleep(0.02)
    return True


def line(*words):
    return [sys.executable, "-m", "probe", *words]


def run(words, server=None, mark="test.job."):
    """Start it, and return the exit code, what it says of itself, its parent, and its other words."""
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    process = start(line(*words), {**environment, MARK: mark, "OF_THIS_ONE": "ü", BEGAN: "0"}, server)
    said = process.stdout.read().decode()
    process.stdout.close()
    code = process.wait()
    itself = json.loads(re.search(r"^\{.*\}$", said, re.MULTILINE)[0])
    parent = int(re.search(r"^parent (\d+)$", said, re.MULTILINE)[1])
    return code, itself, parent, re.sub(r"^(\{.*\}|parent \d+)\n", "", said, flags=re.MULTILINE)


def test_a_fork_is_what_the_process_would_be(modules):
    """By all that it can ask of itself, and by what others see."""
    with ForkServer(["probe"], dict(os.environ)) as server:
        assert ready(server)
        for words in (["0"], ["3", "a b", "", "ü"], ["raise"]):
            plain, forked = run(words), run(words, server)
            assert plain[2] == os.getpid()
            assert forked[2] == server._process.pid
            assert forked[1] == plain[1]
            assert plain[1]["environment"]["OF_THIS_ONE"] == "ü"
            assert "HOME" not in plain[1]["environment"]
            assert forked[0] == plain[0] == {"0": 0, "3": 3, "raise": 1}[words[0]]
            # Once more: what was said when the server imported it belongs into every log.
            assert forked[3].replace("said when it is imported\n", "", 1).splitlines()[:1] == [
                "said when it is imported"
            ]
            last = ["RuntimeError: a defect", "at its end"] if words == ["raise"] else ["at its end"]
            assert forked[3].splitlines()[-len(last) :] == plain[3].splitlines()[-len(last) :] == last
    assert server.spent["imports"] > 0


def test_two_forks_hold_nothing_of_each_other(modules):
    """The words of one end with it, whatever the other does; a signal ends one, by its number."""
    with ForkServer(["probe"], dict(os.environ)) as server:
        assert ready(server)
        first, second = (start(line("hang"), {**os.environ, MARK: f"test.{n}."}, server) for n in "ab")
        assert marked("test.a.") == [first.pid]
        assert marked("test.b.") == [second.pid]
        assert first.poll() is second.poll() is None
        os.killpg(first.pid, signal.SIGTERM)
        first.stdout.read()  # to its end
        assert first.wait(60) == -signal.SIGTERM
        assert second.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.05)
        # A server that is stopped: how its fork ended is not known, that it ended is.
        os.kill(server._process.pid, signal.SIGSTOP)
        os.kill(second.pid, signal.SIGTERM)
        assert second.wait(60) == -signal.SIGKILL
        first.stdout.close()
        second.stdout.close()


def test_a_server_that_is_killed_takes_its_forks_along_and_others_go_on(modules):
    with ForkServer(["probe"], dict(os.environ)) as server:
        assert ready(server)
        forked = start(line("hang"), {**os.environ, MARK: "test.a."}, server)
        os.kill(server._process.pid, signal.SIGKILL)
        assert forked.wait(60) == -signal.SIGKILL
        forked.stdout.close()
        assert run(["3"], server)[::2] == (3, os.getpid())


@pytest.mark.parametrize(
    "code",
    [
        "raise ImportError('no such library')",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
        "import os, time\nwhile os.environ: time.sleep(0.1)",
    ],
    ids=["fails", "has a thread", "is not ready yet"],
)
def test_where_it_cannot_be_forked_a_job_is_a_process_of_its_own(modules, code):
    add(modules, "library", code)
    with ForkServer(["library"], dict(os.environ)) as server:
        assert not ready(server, 1.0)
        assert run(["3"], server)[::2] == (3, os.getpid())


def test_a_mark_or_a_line_without_room_is_a_process_of_its_own(modules):
    with ForkServer(["probe"], dict(os.environ)) as server:
        assert ready(server)
        for words, mark in ((["3"], "x" * (launch.ROOM + 1)), (["3", *["x" * 99_999] * 9], "test.")):
            assert run(words, server, mark)[::2] == (3, os.getpid())
        code, itself, parent, _ = run(["3", "x" * 9_999], server)  # more than /proc shows of it
        assert (code, parent) == (3, server._process.pid)
        assert itself["argv"][2] == "x" * 9_999


def config(**settings):
    section = {"workers": 2, "processes": 1, "nodes": 1, "hostfile": None, "threads": 1, "fork": True}
    deepspeed = settings.pop("deepspeed", {})
    return OmegaConf.create({"launch": {**section, **settings}, "deepspeed": deepspeed})


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        ({}, "", True),
        ({"processes": "auto"}, "", True),
        ({"threads": 8}, "", True),
        ({"fork": False}, "", False),
        ({"processes": 2}, "", False),
        ({"nodes": 2}, "", False),
        ({"hostfile": "hosts.txt"}, "", False),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "", False),
        ({}, "0", False),
    ],
)
def test_where_stages_may_be_forks(settings, gpus, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert may_fork(config(**settings)) is expected
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not may_fork(config(**settings))


def test_one_job_alone_is_a_process(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made = []
    monkeypatch.setattr(job_module, "ForkServer", lambda *given: made.append(given))
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config()))
    jobs = [Job("sft", "sft"), Job("ppo", "ppo"), Job("ppo,lam=1", "ppo", {"lam": 1})]
    job_module.fork_server(RunFolder(tmp_path), jobs[:1])
    assert not made
    job_module.fork_server(RunFolder(tmp_path), jobs)
    ((imported, environment),) = made
    assert imported == ["ppo_vs_dpo.sft", "ppo_vs_dpo.ppo"]
    assert environment["OMP_NUM_THREADS"] == "1"
    assert Path(environment["WANDB_DIR"]).is_absolute()


def test_the_table_of_a_run_says_what_was_imported_once(tmp_path):
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config()))
    run = RunFolder(tmp_path)
    run.begin("sft", Made("f", {}))
    run.finish("sft", "f", 5.0, {}, {"times": {"start-up": 0.1, "training": 4.9}, "cpu_seconds": 4.0})
    text = profile(run, ["sft"], {"start-up": 0.2, "imports": 3.0, "CPU": 3.1})
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["stage", "seconds", "start-up", "imports", "training", "CPU"]
    assert rows[2:] == [
        ["libraries, once", "3.2", "0.2", "3.0", "0.0", "3.1"],
        ["sft", "5.0", "0.1", "0.0", "4.9", "4.0"],
        ["together", "8.2", "0.3", "3.0", "4.9", "7.1"],
    ]
    assert "libraries, once" not in profile(run, ["sft"])
