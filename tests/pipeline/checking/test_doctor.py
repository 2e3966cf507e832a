"""The page of this machine: what is wrong is said with what to do, and no secret is."""

import socket
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.pipeline.checking import doctor
from ppo_vs_dpo.pipeline.checking.elsewhere import handed_on
from ppo_vs_dpo.pipeline.cli import dispatch
from ppo_vs_dpo.pipeline.running import command as run


def wrong(found):
    return [(one.topic, one.wrong, one.stops) for one in found if one.wrong]


def test_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret_word")
    assert dispatch(["doctor", "--output", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    for topic in ("system", "torch", "deepspeed", "GPUs", "host name", "output", "Hub token", "compilers"):
        assert f" {topic}" in said, topic
    assert "a_secret_word" not in said


def test_an_old_deepspeed_stops(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: "0.18.2" if name == "deepspeed" else "99")
    ((topic, said, stops),) = wrong(doctor.versions())
    assert (topic, stops) == ("deepspeed", True)
    assert "pip install 'deepspeed>=0.19.4'" in said


def test_gpus_that_torch_cannot_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    ((topic, said, stops),) = wrong(doctor.gpus())
    assert (topic, stops) == ("GPUs", True)
    assert "install a CUDA build" in said


def test_the_network(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuch0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for tool in ("pdsh", "ssh"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = {topic: (said, stops) for topic, said, stops in wrong(doctor.network())}
    assert "GLOO_SOCKET_IFNAME" in found["host name"][0]
    assert "there is no nosuch0 here" in found["NCCL_SOCKET_IFNAME"][0]
    assert found["NCCL_SOCKET_IFNAME"][1]
    assert "pdsh" not in found  # the command hands all on that matters, but for keys
    assert "GLOO_SOCKET_IFNAME" not in found
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret_word")
    ((said, _),) = [rest for topic, *rest in wrong(doctor.network()) if topic == "pdsh"]
    assert "will not see HF_TOKEN: write them into ~/.deepspeed_env" in said
    # With a file of the user's own DeepSpeed reads that one, and no other.
    (tmp_path / ".deepspeed_env").write_text("HF_TOKEN=x\nOMP_NUM_THREADS=4\n")
    ((said, _),) = [rest for topic, *rest in wrong(doctor.network()) if topic == "pdsh"]
    assert "GLOO_SOCKET_IFNAME" in said
    assert not {"HF_TOKEN", "OMP_NUM_THREADS"} & set(said.replace(",", "").replace(":", "").split())


@pytest.mark.parametrize(
    ("variable", "given", "missing"),
    [
        ("NCCL_SOCKET_IFNAME", "eth,ib0", []),
        ("NCCL_SOCKET_IFNAME", "=eth", ["eth"]),
        ("NCCL_SOCKET_IFNAME", "^eth", []),
        ("NCCL_SOCKET_IFNAME", "ib,mlx", ["ib", "mlx"]),
        ("GLOO_SOCKET_IFNAME", "eth", ["eth"]),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", ["ib0"]),
        ("GLOO_SOCKET_IFNAME", "eth0", []),
    ],
)
def test_how_each_backend_reads_the_names_of_interfaces(variable, given, missing):
    """NCCL takes beginnings, and any that is there; gloo takes whole names, and wants them all."""
    assert doctor.interfaces_missing(variable, given, {"lo", "eth0"}) == missing


def test_machines_of_a_hostfile_get_what_a_run_is_told(tmp_path, monkeypatch):
    """DeepSpeed's launcher reads the file that its variable names; no secret is in it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    told = {"OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "eth0", "HF_HOME": "/shared/hf", "HF_TOKEN": "hf_secret",
            "WANDB_API_KEY": "secret", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "LANG": "C",
            "HF_ENDPOINT": "https://me:secret@hub"}  # fmt: skip
    ((name, path),) = handed_on(told, tmp_path).items()
    assert name == "DS_ENV_FILE"
    lines = dict(line.split("=", 1) for line in Path(path).read_text().splitlines())
    assert lines == {key: told[key] for key in told if "secret" not in told[key] and key != "LANG"}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("A=1\n")
    assert handed_on(told, tmp_path) == {}


def test_disks(monkeypatch, tmp_path):
    usage = doctor.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=5e8))
    found = wrong(doctor.disks(str(tmp_path / "not" / "there")))
    assert any(topic == "output" and "checkpoint" in said for topic, said, _ in found)


def test_the_short_form_before_a_cluster_run(monkeypatch, tmp_path):
    """Only what is wrong; what stops a run does so in one message, before anything is started."""
    found = [
        doctor.Finding("torch", "2.13"),
        doctor.Finding("host name", "resolves to 127.0.1.1", "set GLOO_SOCKET_IFNAME"),
        doctor.Finding("Hub token", "none", "hf auth login"),
    ]
    monkeypatch.setattr(doctor, "findings", lambda output: found)
    assert doctor.before_cluster("runs") == "doctor: host name: resolves to 127.0.1.1: set GLOO_SOCKET_IFNAME\n"
    found.append(doctor.Finding("deepspeed", "0.18", "pip install", stops=True))
    with pytest.raises(UserError, match=r"this machine cannot run it .*\n  deepspeed: 0.18: pip install"):
        doctor.before_cluster("runs")


@pytest.mark.parametrize(
    ("launch", "gpus", "asked"),
    [({"processes": 1}, "", False), ({"processes": 4}, "", False), ({"processes": 1}, "0,1", False),
     ({"processes": "auto"}, "0,1", True), ({"processes": 1, "nodes": 2}, "", True),
     ({"processes": 1, "hostfile": "hosts"}, "", True)],
)  # fmt: skip
def test_which_runs_ask_the_doctor(monkeypatch, launch, gpus, asked):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert bool(run.of_a_cluster(OmegaConf.create(launch))) == asked


def test_a_driver_that_hangs_is_a_finding(monkeypatch):
    def hangs():
        raise UserError("nvidia-smi has not answered for 60 s")

    monkeypatch.setattr(doctor, "visible", hangs)
    (found,) = doctor.gpus()
    assert found.stops
    assert "has not answered" in found.wrong
