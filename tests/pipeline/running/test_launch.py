"""Starting a stage on several machines: a hostfile, SLURM, and torchrun by hand; docs/cluster.md's own commands."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.guards.fingerprints import Made
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.checking.elsewhere import handed_on
from ppo_vs_dpo.pipeline.running.execute import command
from ppo_vs_dpo.pipeline.running.graph import Job
from ppo_vs_dpo.pipeline.running.launch import launcher
from tests.sft.tiny_run import make_run

ROOT = Path(__file__).parents[3]
# srun as far as a stage can tell: the same command once for each node, all on this machine; the first error counts.
SRUN = """#!/bin/bash
nodes=$2; shift 7
pids=()
for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""


# ssh and pdsh as far as DeepSpeed's launcher can tell: every machine is this one.
SSH = """#!/bin/bash
case "$*" in *"hostname -I") echo 127.0.0.1;; *) echo here;; esac
"""
PDSH = """#!/bin/bash
while [ "$1" != -w ]; do shift; done; echo "told: $*"
IFS=, read -ra hosts <<< "$2"; shift 2
code=0; pids=()
for index in "${!hosts[@]}"; do line="$*"; bash -c "${line//%n/$index}" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""


def launch(**settings):
    return OmegaConf.create({"processes": 1, "nodes": 1, "hostfile": None, "rendezvous": None, **settings})


def test_one_machine():
    assert launcher(launch()) == [sys.executable, "-m"]
    many = launcher(launch(processes=8))
    assert many[1:] == ["-m", "torch.distributed.run", "--nproc-per-node", "8", "--standalone", "-m"]


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Stand-ins for srun, ssh and pdsh in front of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in (("srun", SRUN), ("ssh", SSH), ("pdsh", PDSH)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_machines_of_a_hostfile(tmp_path, tools, monkeypatch):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# ours\nnode1 slots=8\nnode2 slots=8\n")
    line = launcher(launch(hostfile=str(hostfile)))
    assert line[1:5] == ["-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
    assert line[-1] == "--module"
    for text, expected in (
        ("node1 slots=8\nnode2\n", "hosts, line 2: 'node2'; it must be a machine and its processes"),
        ("node1 slots=none\n", "line 1"),
        ("\n", "it names no machine"),
    ):
        hostfile.write_text(text)
        with pytest.raises(UserError, match=expected):
            launcher(launch(hostfile=str(hostfile)))
    with pytest.raises(UserError, match="there is no such file"):
        launcher(launch(hostfile=str(tmp_path / "none")))
    monkeypatch.setenv("PATH", "/nonexistent")
    hostfile.write_text("node1 slots=8\n")
    with pytest.raises(UserError, match="install ssh and pdsh"):
        launcher(launch(hostfile=str(hostfile)))
    with pytest.raises(UserError, match=r"give one; launch.nodes is for SLURM"):
        launcher(launch(hostfile=str(hostfile), nodes=2))


def test_nodes_need_slurm(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="run this inside a SLURM allocation"):
        launcher(launch(nodes=2))


@pytest.fixture
def tiny(word_tokenizer, tiny_llama, tmp_path):
    """A run folder whose dpo stage takes seconds; ``tiny(**launch)``."""

    def build(**settings) -> RunFolder:
        run = make_run(tmp_path / "run", word_tokenizer, tiny_llama(), pairs=16, dpo={"max_steps": 2, "save_steps": 2})
        config = OmegaConf.load(run.path("config.yaml"))
        config.launch = launch(**settings)
        OmegaConf.save(config, run.path("config.yaml"))
        return RunFolder(run.root)

    return build


def start(line: list[str], **environment: str) -> str:
    ended = subprocess.run(
        line, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT, env={**os.environ, **environment}
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said[-3000:]
    return said


@pytest.mark.slow
def test_two_machines_under_slurm(tiny, tools):
    """Two torchruns (``--nnodes 2``) find each other over loopback and make one run of four ranks."""
    run = tiny(nodes=2, processes=2, rendezvous="localhost")
    line = command(run, Job("dpo", "dpo", made=Made("f", {})))
    assert line[:3] == ["srun", "--nodes", "2"]
    start(line)
    assert run.done("dpo")["figures"]["steps"] == 2


@pytest.mark.slow
def test_two_machines_of_a_hostfile(tiny, tmp_path, tools):
    """DeepSpeed's launcher starts a process on each of two machines, both of them this one."""
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    run = tiny(hostfile=str(tmp_path / "hosts"))
    told = handed_on({"OMP_NUM_THREADS": "1", "HF_HOME": "/shared/the cache"}, tmp_path)
    said = start(command(run, Job("dpo", "dpo", made=Made("f", {}))), DS_ACCELERATOR="cpu", HOME=str(tmp_path), **told)
    assert run.done("dpo")["figures"]["steps"] == 2
    assert "nnodes=2" in said
    assert "export OMP_NUM_THREADS=1;" in said
    assert 'export HF_HOME="/shared/the cache";' in said


def test_the_batch_script(tmp_path):
    """What it hands to the command, and that SLURM's signal before the time limit reaches it."""
    stand_in = tmp_path / "ppo-vs-dpo"
    stand_in.write_text(
        '#!/bin/bash\ntrap "echo stopped; exit 130" INT\necho "got $*"\nsleep 300 > /dev/null & wait\n'
    )
    stand_in.chmod(0o755)
    allocation = {"SLURM_NNODES": "2", "SLURM_GPUS_PER_NODE": "8"}
    job = subprocess.Popen(
        ["bash", str(ROOT / "configs/cluster/slurm.sbatch"), "experiment=hh", "deepspeed=zero3"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **allocation},
        stdout=subprocess.PIPE,
        text=True,
        # Tests that were started in the background have the signal ignored, and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    job.stdout.readline()
    got = job.stdout.readline().strip()
    assert got == "got experiment=hh deepspeed=zero3 launch.nodes=2 launch.processes=8 launch.workers=1"
    time.sleep(0.3)
    job.send_signal(signal.SIGINT)
    assert "stopped" in job.communicate(timeout=60)[0]


def documented(start: str) -> list[str]:
    """The first command of docs/cluster.md that begins so, as a list of words."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    (line, *_) = re.findall(rf"^    ({re.escape(start)}.*)$", text, re.MULTILINE)
    return shlex.split(line)


@pytest.mark.slow
def test_the_documented_torchrun_commands(tiny):
    """By hand: one machine, then two launchers that are told where to meet."""
    run = tiny()
    python = [sys.executable, "-m", "torch.distributed.run"]
    words = documented("torchrun --standalone")
    assert words[-3:] == ["-m", "ppo_vs_dpo.dpo", "runs/NAME"]
    start([*python, *words[1:-1], str(run.root)])
    assert run.done("dpo")["figures"]["steps"] == 2
    shutil.rmtree(run.path("dpo"))
    words = [word.replace("node1:29500", "localhost:29517") for word in documented("torchrun --nnodes 2")]
    assert words[-3:] == ["-m", "ppo_vs_dpo.dpo", "runs/NAME"]
    both = [subprocess.Popen([*python, *words[1:-1], str(run.root)], cwd=ROOT) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    assert run.done("dpo")["figures"]["steps"] == 2


def test_documented_commands_compose():
    """Every documented ppo-vs-dpo command names keys that exist."""
    from ppo_vs_dpo.pipeline.composing.compose import load
    from ppo_vs_dpo.pipeline.planning.plan import main

    text = (ROOT / "docs" / "cluster.md").read_text()
    lines = re.findall(r"^    (ppo-vs-dpo [^\\\n]*)$", text, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        words = [word for word in shlex.split(line)[1:] if word not in ("-m", "--multirun")]
        if words[0] == "plan":
            assert main(words[1:]) in (0, 1)
        else:
            load([word.split(",")[0] for word in words if not word.startswith("hydra")])


def test_a_sweep_by_submitit(tmp_path):
    """Hydra's submitit launcher, with its queue on this machine instead of SLURM's: a job of its own for each run."""
    line = ["-m", "ppo_vs_dpo.pipeline.cli", "-m", "experiment=quickstart", "stages=[data]", "seed=1,2"]
    line += [f"output_dir={tmp_path}", "hydra/launcher=submitit_local"]
    subprocess.run([sys.executable, *line], cwd=ROOT, check=True, capture_output=True, timeout=600)
    for seed in (1, 2):
        assert RunFolder(tmp_path / f"quickstart-seed{seed}").done("data")
    assert len(list(tmp_path.glob("sweeps/*/.submitit/*/*_result.pkl"))) == 2


def test_an_unknown_key_of_hydras_name_is_refused():
    from ppo_vs_dpo.pipeline.composing.compose import prepare_overrides

    assert prepare_overrides(["hydra/launcher=submitit_slurm"]) == ["hydra/launcher=submitit_slurm"]
    with pytest.raises(UserError, match="hydrae/launcher: no such key"):
        prepare_overrides(["hydrae/launcher=submitit_slurm"])
