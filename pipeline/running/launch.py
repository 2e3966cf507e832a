"""How a training stage's processes are started: on this machine, on the machines of a hostfile, or through SLURM.

All of these end in ``python -m <stage> RUN`` with RANK, WORLD_SIZE and MASTER_* set; docs/cluster.md shows each as one
would type it.
"""

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.pipeline.planning.gpus import hosts
from ppo_vs_dpo.pipeline.planning.gpus import processes as count_processes


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def launcher(launch: Any) -> list[str]:
    """What stands before ``<stage> RUN`` on the command line of a training stage.

    Args:
        launch: the section ``launch``: ``processes`` on each machine, and ``hostfile`` or ``nodes`` for several.

    Raises:
        UserError: the settings contradict each other, or what they need is not there.
    """
    processes, nodes, hostfile = count_processes(launch), launch.get("nodes", 1), launch.get("hostfile")
    if hostfile:
        if nodes > 1:
            raise UserError("launch.hostfile and launch.nodes: give one; launch.nodes is for SLURM.")
        hosts(Path(hostfile))
        missing = [tool for tool in ("ssh", "pdsh") if shutil.which(tool) is None]
        if missing:
            raise UserError(
                f"launch.hostfile reaches other machines by ssh and pdsh: install {' and '.join(missing)}."
            )
        # DeepSpeed's launcher reaches the machines by ssh (pdsh); the slots of each are in the file.
        runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(Path(hostfile).resolve())]
        return [*runner, "--master_port", str(free_port()), "--no_local_rank", "--module"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    if nodes > 1:
        if shutil.which("srun") is None:
            raise UserError(
                f"launch.nodes={nodes} starts stages with srun, and there is none here: run this inside a SLURM "
                f"allocation (configs/cluster/slurm.sbatch), or name the machines in launch.hostfile."
            )
        # One torchrun a machine; they find each other, and their ranks, at the machine where this command runs.
        here = launch.get("rendezvous") or socket.gethostname()
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{here}:{free_port()}"]
        name = ["--rdzv-id", os.environ.get("SLURM_JOB_ID", "ppo-vs-dpo")]
        alone = ["srun", "--nodes", str(nodes), "--ntasks", str(nodes), "--ntasks-per-node", "1", "--kill-on-bad-exit"]
        return [*alone, *torchrun, "--nnodes", str(nodes), *meeting, *name, "-m"]
    if processes > 1:
        return [*torchrun, "--standalone", "-m"]
    return [sys.executable, "-m"]
