"""``manifest.json``: which code, versions, machine, seeds and data a run came from."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.files import sha256_of, write_json
from ppo_vs_dpo.artifacts.run import RunFolder

PACKAGES = (
    *("ppo-vs-dpo", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed"),
    *("numpy", "scipy", "scikit-learn", "evaluate", "hydra-core"),
)


def git_commit() -> str | None:
    """The project's commit, with ``-dirty`` where files differ; ``None`` outside a checkout."""
    root = Path(__file__).parents[2]
    try:
        run = ["git", "-C", str(root)]
        commit = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*run, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if dirty.strip() else commit


def versions() -> dict[str, str | None]:
    """Installed versions of the packages that decide results."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, str | int]:
    """The machine in words that matter for numbers; no names, no addresses."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "cpus": os.cpu_count() or 0,
        "gpus": ", ".join(gpus) or "none",
    }


def write_manifest(run: RunFolder) -> None:
    """Write ``manifest.json`` from what is known now; data fingerprints once the data is there."""
    data, pairs = run.done("data"), run.done("pairs")
    write_json(
        run.path("manifest.json"),
        {
            "experiment": run.config.get("experiment"),
            "seed": run.config.get("seed"),
            "commit": git_commit(),
            "versions": versions(),
            "machine": machine(),
            "config_hash": sha256_of(OmegaConf.to_container(run.config, resolve=True)),
            "data": data["figures"] if data else None,
            "pair_set": pairs["figures"].get("pair_set") if pairs else None,
        },
    )
