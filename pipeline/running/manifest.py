"""``manifest.json``: which code, versions, machine, seeds and data a run came from."""

import os
import platform

from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.files import sha256_of, write_json
from ppo_vs_dpo.artifacts.guards.versions import git_commit, versions
from ppo_vs_dpo.artifacts.run import STAGES, RunFolder


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
            "made_by": versions_by_stage(run),
        },
    )


def versions_by_stage(run: RunFolder) -> dict[str, list[dict]]:
    """Stage (or point) -> what code and libraries worked on it; more than one where a run went on with others."""
    names = [name for stage in STAGES for name in (stage, *run.points(stage))]
    return {name: made for name in names if (made := run.made_by(name))}
