"""GPUs are handed out: as many as a job has processes, and never one to two jobs."""

import pytest
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.pipeline.planning import gpus
from ppo_vs_dpo.pipeline.planning.gpus import Gpus, processes, visible
from ppo_vs_dpo.pipeline.running.job import environment
from ppo_vs_dpo.pipeline.running.launch import launcher


def launch(**settings):
    return OmegaConf.create({"processes": 1, "nodes": 1, "hostfile": None, "threads": 1, **settings})


@pytest.fixture
def machine(monkeypatch):
    def has(count: int):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(str(10 + n) for n in range(count)))

    return has


def test_one_process_sees_one_gpu(machine):
    """On a machine with eight: a stage on one process, and the one beside it on another."""
    machine(8)
    hands = Gpus(launch())
    first, second = hands.take(True), hands.take(True)
    assert (first, second) == (["10"], ["11"])
    seen = environment(OmegaConf.create({"launch": launch()}), "mark", first)
    assert seen["CUDA_VISIBLE_DEVICES"] == "10"
    assert seen["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    hands.give_back(first)
    assert hands.take(False) == ["10"]


@pytest.mark.parametrize(("count", "each"), [(8, 4), (8, 3), (1, 1), (2, 2)])
def test_never_one_to_two_jobs(machine, count, each):
    machine(count)
    hands, taken = Gpus(launch(processes=each)), []
    while (some := hands.take(True)) is not None:
        assert len(some) == each
        taken += some
    assert len(taken) == len(set(taken)) == count // each * each
    hands.give_back(taken)
    assert len(hands.free) == count


def test_without_gpus_nothing_is_handed_out(machine, monkeypatch):
    machine(0)
    hands = Gpus(launch(processes=4))
    assert [hands.take(True), hands.take(True)] == [[], []]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(gpus.shutil, "which", lambda name: None)
    assert visible() == []
    assert "CUDA_VISIBLE_DEVICES" not in environment(OmegaConf.create({"launch": launch()}), "mark", [])


def test_more_processes_than_gpus(machine):
    machine(2)
    with pytest.raises(UserError, match=r"launch.processes=4, and there are 2 GPUs here .*=10,11"):
        Gpus(launch(processes=4))


def test_auto_is_one_process_a_gpu(machine):
    machine(4)
    assert processes(launch(processes="auto")) == 4
    assert "4" in launcher(launch(processes="auto"))
    machine(0)
    assert processes(launch(processes="auto")) == 1


def test_several_machines_take_all(machine):
    machine(4)
    hands = Gpus(launch(nodes=2, processes=4))
    assert len(hands.take(True)) == 4
    assert hands.take(False) is None


def test_the_driver_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-a)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-b)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert visible() == ["0", "1"]


def test_a_driver_that_hangs_is_said(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpus, "PATIENCE", 0.2)
    with pytest.raises(UserError, match=r"nvidia-smi has not answered for 0.2 s.*the driver hangs"):
        visible()


def test_ranks_are_counted_over_machines(machine, tmp_path):
    machine(4)
    assert gpus.ranks_of(None) == 1
    assert gpus.ranks_of(launch(processes=2, nodes=3)) == 6
    assert gpus.ranks_of(launch(processes="auto", nodes=2)) == 8
    (tmp_path / "hosts").write_text("one slots=8  # a machine\n\ntwo slots=4\n")
    assert gpus.ranks_of(launch(hostfile=str(tmp_path / "hosts"))) == 12
