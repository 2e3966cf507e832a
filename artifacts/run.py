"""A run is a folder: its configuration, a folder for each stage, and ``done.json`` as a stage's last word."""

import shutil
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, write_json

# Runs of versions before this one name modules, and are fingerprinted by names, that are no longer there.
OLDEST = (0, 2)
STAGES = ("data", "sft", "pairs", "reward_model", "dpo", "ppo", "compare")


def point_name(stage: str, point: dict[str, Any]) -> str:
    """Name of a stage's run at a point of a sweep: ``("ppo", {"kl_coef": 0.0})`` -> ``"ppo,kl_coef=0.0"``."""
    return ",".join([stage, *(f"{key}={value}" for key, value in sorted(point.items()))])


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; it must hold a ``config.yaml``.

    Raises:
        UserError: there is no such folder, no configuration in it, or it is a run of a version before 0.2.
    """

    def __init__(self, path: str | Path):
        self.root = Path(path)
        if not (self.root / "config.yaml").is_file():
            raise UserError(
                f"{self.root} is not a run folder: it has no config.yaml. "
                f"Start a run with `ppo-vs-dpo experiment=...` or name an existing folder."
            )
        self._check_version()
        self.config: DictConfig = OmegaConf.load(self.root / "config.yaml")

    def _check_version(self) -> None:
        manifest = self.root / "manifest.json"
        versions = (read_json(manifest).get("versions") or {}) if manifest.is_file() else {}
        version = versions.get("ppo-vs-dpo")
        if version is not None and tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            raise UserError(
                f"{self.root} was made by ppo-vs-dpo {version}, whose modules had other names: this version cannot go "
                f"on with it. Start anew under another name (name=...); its models and its report stay as they are."
            )

    def path(self, *parts: str) -> Path:
        """A path inside the folder."""
        return self.root.joinpath(*parts)

    def stage_dir(self, name: str) -> Path:
        """Where a stage (``"ppo"``) or a point of its sweep (``"ppo,kl_coef=0.0"``) writes."""
        return self.path("sweep", name) if "," in name else self.path(name)

    def done(self, name: str) -> dict | None:
        """The stage's ``done.json``, or ``None`` where it has not finished."""
        path = self.stage_dir(name) / "done.json"
        return read_json(path) if path.is_file() else None

    def require(self, name: str) -> dict:
        """The stage's ``done.json``.

        Raises:
            UserError: the stage has not finished.
        """
        done = self.done(name)
        if done is None:
            raise UserError(
                f"stage {name} of {self.root} has not finished, and this stage needs it. "
                f"Run `ppo-vs-dpo experiment=... stages=[{name.split(',')[0]},...]` first."
            )
        return done

    def points(self, stage: str) -> list[str]:
        """Names of the finished points of a stage's sweep, sorted."""
        folders = self.path("sweep").glob(f"{stage},*")
        return sorted(folder.name for folder in folders if (folder / "done.json").is_file())

    def finish(
        self, name: str, fingerprint: str | None, seconds: float, figures: dict, cost: dict | None = None
    ) -> None:
        """Write ``done.json``: the stage's last file, written atomically."""
        write_json(
            self.stage_dir(name) / "done.json",
            {
                "stage": name,
                "fingerprint": fingerprint,
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "seconds": round(seconds, 3),
                "cost": cost or {},
                "figures": figures,
            },
        )

    def clear(self, name: str) -> None:
        """Remove what a stage wrote (its inputs changed: going on from its checkpoints would mix two runs)."""
        folder = self.stage_dir(name)
        (folder / "done.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
