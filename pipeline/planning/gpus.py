"""Which GPUs a job sees: as many as it has processes, and none that another job sees.

A stage that sees more GPUs than it has processes would spread itself over them (`torch.nn.DataParallel`, which TRL's
trainers refuse); two jobs that see the same ones would both take the first.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Seconds that the driver may take to list them.
PATIENCE = 60


def visible() -> list[str]:
    """The GPUs of this machine that this process may use, as the environment names them; none without a driver.

    Raises:
        UserError: the driver does not answer.
    """
    given = os.environ.get(VISIBLE)
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"nvidia-smi has not answered for {PATIENCE} s, so nobody knows what GPUs there are: the driver hangs. "
            f"Say {VISIBLE}=0,1,... where some of them work, or {VISIBLE}= to use none."
        ) from error
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [str(number) for number, line in enumerate(line for line in lines if line.startswith("GPU "))]


def processes(launch: Any) -> int:
    """Processes of a training stage on each machine; ``auto`` is one for each GPU, or one without any."""
    count = launch.get("processes") or 1
    return len(visible()) or 1 if count == "auto" else int(count)


def ranks_of(launch: Any) -> int:
    """Processes of a training stage on all machines together.

    Args:
        launch: the section ``launch``; ``None``: one process.
    """
    if not launch:
        return 1
    if launch.get("hostfile"):
        return sum(hosts(Path(launch.hostfile)).values())
    return processes(launch) * int(launch.get("nodes") or 1)


def hosts(path: Path) -> dict[str, int]:
    """A hostfile's machines and the processes of each: lines ``name slots=N``, as DeepSpeed and OpenMPI read them.

    Raises:
        UserError: no such file, or a line of another form; names it.
    """
    if not path.is_file():
        raise UserError(f"launch.hostfile={path}: there is no such file.")
    found: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, _, slots = text.partition(" ")
        count = slots.strip().removeprefix("slots=")
        if not slots.strip().startswith("slots=") or not count.isdigit() or int(count) < 1:
            raise UserError(f"{path}, line {number}: {text!r}; it must be a machine and its processes: name slots=8.")
        found[name] = int(count)
    if not found:
        raise UserError(f"launch.hostfile={path}: it names no machine.")
    return found


class Gpus:
    """Those of this machine, and who has them.

    Args:
        launch: the section ``launch``.

    Raises:
        UserError: a stage would have more processes than there are GPUs.
    """

    def __init__(self, launch: Any):
        self.all = visible()
        self.free = list(self.all)
        # Several machines: each stage takes all that it finds on each of them.
        self.everything = bool(launch.get("hostfile")) or launch.get("nodes", 1) > 1
        self.processes = processes(launch)
        if self.all and not self.everything and self.processes > len(self.all):
            raise UserError(
                f"launch.processes={self.processes}, and there {'is' if len(self.all) == 1 else 'are'} "
                f"{len(self.all)} GPU{'s' * (len(self.all) != 1)} here ({VISIBLE}={','.join(self.all)}): two ranks on "
                f"one GPU would wait for each other. Set launch.processes=auto, or at most {len(self.all)}."
            )

    def take(self, distributed: bool) -> list[str] | None:
        """GPUs for a job; ``None`` where it must wait until another gives back its own. Without GPUs an empty list.

        Args:
            distributed: the job is a stage that runs on ``launch.processes``; others use one.
        """
        if not self.all:
            return []
        wanted = 1 if not distributed else len(self.all) if self.everything else self.processes
        if wanted > len(self.free):
            return None
        taken, self.free = self.free[:wanted], self.free[wanted:]
        return taken

    def give_back(self, taken: list[str]) -> None:
        """A job has ended."""
        self.free = sorted([*self.free, *taken], key=self.all.index)
