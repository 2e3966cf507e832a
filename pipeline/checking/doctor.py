"""``ppo-vs-dpo doctor``: what of this machine matters to a run, and what will go wrong; also for a bug report.

One page: versions, GPUs, how processes find each other, disks, the Hub, compilers. Nothing is changed, nothing is
sent, and of a key only whether it is there is said.
"""

import argparse
import importlib.metadata
import ipaddress
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from ppo_vs_dpo.artifacts.errors import UserError, in_help, say
from ppo_vs_dpo.pipeline.checking.elsewhere import not_handed_on, own_files
from ppo_vs_dpo.pipeline.planning.gpus import visible

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "vllm", "bitsandbytes")
# Below these a run is wrong, or does not start.
FLOORS = {
    "deepspeed": ("0.19.4", "0.18 drops gradients under zero2_offload (DeepSpeed #7981)"),
    "trl": ("1.13", "earlier trainers lack what the stages build on"),
    "transformers": ("5.10", "earlier models lack what packed rows build on"),
}
GB = 1e9
# Known to whoever starts a run, or of no harm to one that starts.
QUIET = {"Hub token", "compilers"}
# Interfaces that collectives are told to use.
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


@dataclass(frozen=True)
class Finding:
    """One line of the page.

    Attributes:
        topic: what it is about.
        said: what is there.
        wrong: what will go wrong and what to do; empty where all is well.
        stops: a run cannot work like this; else it may.
    """

    topic: str
    said: str
    wrong: str = ""
    stops: bool = False

    def __str__(self) -> str:
        mark = "ok" if not self.wrong else "WRONG" if self.stops else "look"
        return f"{mark:6}{self.topic:14}{self.said}" + (f"\n{'':20}-> {self.wrong}" if self.wrong else "")


def installed(name: str) -> str | None:
    """The version of a package; ``None`` where it is not installed (vLLM's CPU build has another name)."""
    for distribution in (name, f"{name}-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def versions() -> Iterator[Finding]:
    """Python and the packages that runs depend on."""
    yield Finding("system", f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} CPUs")
    for name in PACKAGES:
        found = installed(name)
        floor, why = FLOORS.get(name, ("0", ""))
        old = found is not None and Version(found) < Version(floor)
        wrong = f"{why}: pip install '{name}>={floor}'" if old else ""
        yield Finding(name, found or "not installed", wrong, stops=bool(wrong))


def gpus() -> Iterator[Finding]:
    """What the driver shows, and whether torch can use it."""
    import torch

    try:
        names = visible()
    except UserError as error:  # a driver that hangs is what this page is for
        yield Finding("GPUs", "not known", str(error), stops=True)
        return
    if not names:
        yield Finding("GPUs", "none: everything runs on the CPU")
        return
    if not torch.cuda.is_available():
        build = torch.version.cuda or "CPU"
        wrong = "this torch cannot use them: install a CUDA build whose version the driver takes (nvidia-smi shows it)"
        yield Finding("GPUs", f"{len(names)}, and torch {torch.__version__} is a {build} build", wrong, stops=True)
        return
    for number in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(number)
        bf16 = one.major >= 8
        wrong = "" if bf16 else "no bfloat16: stages compute in fp32 unless STAGE.fp16=true"
        yield Finding(f"GPU {number}", f"{one.name}, {one.total_memory / GB:.0f} GB", wrong)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "not there"
    yield Finding("NCCL", nccl, "" if nccl != "not there" else "several GPUs need it", stops=nccl == "not there")


def network() -> Iterator[Finding]:
    """How ranks on several machines find each other."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
        loopback = ipaddress.ip_address(address).is_loopback
        wrong = "on several machines gloo would wait for itself: set GLOO_SOCKET_IFNAME and launch.rendezvous"
        yield Finding("host name", f"resolves to {address}", wrong if loopback else "")
    except OSError as error:
        yield Finding(
            "host name", f"does not resolve ({error})", "set launch.rendezvous to an address of this machine"
        )
    here = {name for _, name in socket.if_nameindex()}
    for variable in INTERFACES:
        given = os.environ.get(variable, "")
        missing = interfaces_missing(variable, given, here)
        wrong = f"there is no {', '.join(missing)} here ({', '.join(sorted(here))})" if missing else ""
        if given:
            yield Finding(variable, given, wrong, stops=bool(missing))
    tools = [tool for tool in ("torchrun", "srun", "pdsh", "ssh") if shutil.which(tool)]
    yield Finding("launchers", ", ".join(tools) or "none but python -m torch.distributed.run")
    if "pdsh" in tools and (names := not_handed_on(os.environ)):
        wrong = f"machines of launch.hostfile will not see {', '.join(names)}: write them into ~/.deepspeed_env"
        yield Finding("pdsh", f"hands on {'what .deepspeed_env has' if own_files() else 'all but keys'}", wrong)


def interfaces_missing(variable: str, given: str, here: set[str]) -> list[str]:
    """Of the interfaces that a variable names those that a machine lacks, where its backend would then fail.

    gloo wants each by its whole name. NCCL takes what it finds of a list: ``=name`` is exact, a plain name is a
    beginning, and a list that begins with ``^`` says which to leave out.
    """
    names = [name for name in given.removeprefix("=").split(",") if name]
    if variable.startswith("GLOO"):
        return [name for name in names if name not in here]
    exact = given.startswith("=")
    found = any(one == name if exact else one.startswith(name) for one in here for name in names)
    return [] if given.startswith("^") or found else names


def disks(output: str) -> Iterator[Finding]:
    """Room for checkpoints, models and shared memory."""
    folder = Path(output).absolute()
    while not folder.exists():
        folder = folder.parent
    for topic, path, least, why in (
        ("output", folder, 10 * GB, "a checkpoint of a 1B model with its optimizer is 12 GB"),
        ("Hub cache", _hub_cache(), 10 * GB, "set HF_HOME to a larger disk"),
        ("/dev/shm", Path("/dev/shm"), 1 * GB, "NCCL and data loaders need it: docker run --shm-size=8g"),
    ):
        if not path.exists():
            continue
        free = shutil.disk_usage(path).free
        wrong = why if free < least else ""
        if not os.access(path, os.W_OK):
            wrong = "it cannot be written to"
        yield Finding(topic, f"{path}, {free / GB:.0f} GB free", wrong)
    local = any(str(folder).startswith(place) for place in ("/tmp", "/dev/shm", "/scratch", "/local"))
    if local:
        wrong = "on several machines all must see it: use a shared disk"
        yield Finding("shared disk", f"{folder} looks local to this machine", wrong)
    modules = Path(os.environ.get("HF_MODULES_CACHE", _hub_cache() / "modules"))
    if os.environ.get("HF_HOME") and any(str(modules).startswith(place) for place in ("/tmp", "/dev/shm")):
        wrong = "each machine fetches models for itself: fetch once on each, or set HF_HOME to a shared disk"
        yield Finding("Hub cache", f"{modules} is local to this machine", wrong)


def _hub_cache() -> Path:
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")).expanduser()
    while not cache.exists():
        cache = cache.parent
    return cache


def hub() -> Iterator[Finding]:
    """Whether models can be fetched; the token itself is told to nobody."""
    from huggingface_hub import constants, get_token

    offline = constants.HF_HUB_OFFLINE
    yield Finding("Hub", "offline (HF_HUB_OFFLINE)" if offline else "online", "")
    yield Finding("Hub token", "there" if get_token() else "none: gated models cannot be fetched (hf auth login)")


def compilers() -> Iterator[Finding]:
    """What DeepSpeed would compile with."""
    found = [name for name in ("g++", "nvcc", "ninja") if shutil.which(name)]
    yield Finding("compilers", ", ".join(found) or "none: DeepSpeed's CPU Adam cannot be built, torch's is used")


def findings(output: str) -> list[Finding]:
    """All of them."""
    return [*versions(), *gpus(), *network(), *disks(output), *hub(), *compilers()]


def before_cluster(output: str) -> str:
    """The short form, for a run on several machines or GPUs: only what is wrong, one line each; empty for nothing.

    Raises:
        UserError: something that stops a run; it has cost no GPU yet.
    """
    found = [one for one in findings(output) if one.wrong and one.topic not in QUIET]
    if stops := [one for one in found if one.stops]:
        lines = [f"{one.topic}: {one.said}: {one.wrong}" for one in stops]
        raise UserError("\n  ".join(["this machine cannot run it (ppo-vs-dpo doctor says more):", *lines]))
    return "".join(f"doctor: {one.topic}: {one.said}: {one.wrong}\n" for one in found)


def main(arguments: list[str]) -> int:
    """``ppo-vs-dpo doctor [--output DIR]``; 1 where something stops a run."""
    parser = argparse.ArgumentParser(prog="ppo-vs-dpo doctor", description=in_help(__doc__.splitlines()[0]))
    parser.add_argument("--output", default="runs", metavar="DIR", help="where runs go (default: %(default)s)")
    found = findings(parser.parse_args(arguments).output)
    say("\n".join(map(str, found)) + "\n")
    return int(any(one.stops for one in found))
