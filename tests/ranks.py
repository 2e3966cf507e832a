"""Several real processes for a test: forked ones joined by gloo, or a stage under torchrun."""

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.models.sharding.deepspeed import settled, start_deepspeed
from tests import warm

CONFIGS = Path(__file__).parents[1] / "configs" / "deepspeed"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def settings_of(name: str) -> dict:
    """A file of configs/deepspeed/, with no parameter left whole."""
    settings = settled(OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml")))
    if settings["zero_optimization"]["stage"] == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


def on_ranks(world: int, work: Callable, *arguments: Any, timeout: float | None = None, orderly: bool = True) -> list:
    """``work(*arguments)`` on ``world`` forked processes joined by gloo; what each of them returned.

    Args:
        timeout: seconds that a collective may take.
        orderly: they end together; else without waiting for each other.
    """
    context = multiprocessing.get_context("fork")
    port, answers = free_port(), context.Queue()

    def rank_main(rank: int) -> None:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        start_deepspeed(use_cpu=True, timeout=timeout)
        answers.put((rank, work(*arguments)))
        if orderly:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    processes = [context.Process(target=rank_main, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(500)
    assert [process.exitcode for process in processes] == [0] * world
    return [answer for _, answer in sorted(answers.get() for _ in processes)]


def launch(run: RunFolder, stage: str, ranks: int = 2, code: int = 0) -> str:
    """``torchrun -m <stage> RUN`` on so many processes; what they wrote."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    ended = subprocess.run(
        [*start, "-m", stage, str(run.root)], capture_output=True, text=True, check=False, timeout=400
    )
    assert ended.returncode == code, ended.stderr[-3000:]
    return ended.stdout + ended.stderr


def launch_forked(run: RunFolder, stage: str, ranks: int = 2) -> str:
    """``python -m ppo_vs_dpo.<stage> RUN`` on so many forks of this process, with what torchrun would tell each of
    them; what they wrote. That torchrun starts them is for `launch` and the slow tests."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    count = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    with contextlib.ExitStack() as opened, warm.forks():
        outputs = [opened.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
        started = [
            subprocess.Popen(
                [sys.executable, "-m", f"ppo_vs_dpo.{stage}", str(run.root)],
                env={**os.environ, **meeting, **count, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            for rank, out in enumerate(outputs)
        ]
        codes = [process.wait(400) for process in started]
        said = ""
        for out in outputs:
            out.seek(0)
            said += out.read()
    assert codes == [0] * ranks, said[-3000:]
    return said


def beside_tests(folder: Path) -> str:
    """A ``PYTHONPATH`` for an interpreter without this project: a link ``ppo_vs_dpo`` in ``folder``, and ``tests``."""
    root = Path(__file__).parents[1]
    (folder / "importable").mkdir(exist_ok=True)
    (folder / "importable" / "ppo_vs_dpo").symlink_to(root)
    return os.pathsep.join([str(folder / "importable"), str(root)])
