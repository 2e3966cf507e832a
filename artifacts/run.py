"""A run is a folder: its configuration, a folder for each stage, and ``done.json`` as a stage's last word."""

import time
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ppo_vs_dpo.artifacts.errors import UserError, first_sentence, not_the_file
from ppo_vs_dpo.artifacts.files import read_marker, write_json
from ppo_vs_dpo.artifacts.guards import outputs, replaced
from ppo_vs_dpo.artifacts.guards.fingerprints import NEEDS, TRAINED, Made, point_name, points_of
from ppo_vs_dpo.artifacts.guards.versions import differences, made_by

# Runs of versions before this one name modules, and are fingerprinted by names, that are no longer there.
OLDEST = (0, 2)
STAGES = tuple(NEEDS)

# What every `done.json` and every `started.json` has, with its types: one without is none.
DONE_KEYS = {"figures": dict}
STARTED_KEYS = {"parts": dict}


class RunFolder:
    """The folder of one run.

    Example::

        from ppo_vs_dpo import RunFolder

        run = RunFolder("runs/quickstart")
        for stage in ("sft", "reward_model", "ppo", "dpo"):
            done = run.done(stage)  # None where it has not finished
            print(stage, done and done["figures"])
        print(run.path("compare", "report.html"))

    Args:
        path: the folder; it must hold a ``config.yaml``.
        config: in place of that file, which is then not looked at.

    Raises:
        UserError: there is no such folder, no configuration in it that can be read, or it is a run of a version
            before 0.2.
    """

    def __init__(self, path: str | Path, config: DictConfig | None = None):
        self.root = Path(path)
        if config is None and not (self.root / "config.yaml").is_file():
            raise UserError(
                f"{self.root} is not a run folder: it has no config.yaml. "
                f"Start a run with `ppo-vs-dpo NAME` (`ppo-vs-dpo list` has the names) or name an existing folder."
            )
        self._check_version()
        self.config = read_config(self.root / "config.yaml") if config is None else config

    def _check_version(self) -> None:
        manifest = self.root / "manifest.json"
        versions = (read_marker(manifest) or {}).get("versions") or {}
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

    def cache(self, *parts: str) -> Path:
        """A path in the folder for what was drawn or paid for, kept by content: no stage's clearing touches it."""
        return self.path("cache", *parts)

    def done(self, name: str) -> dict | None:
        """The stage's ``done.json``, or ``None`` where it has not finished, or its files are not there any more."""
        done = read_marker(self.stage_dir(name) / "done.json", set_aside=True, keys=DONE_KEYS)
        if done is None or self.damage(name, done):
            return None
        return {**done, "seconds": done["seconds"] if isinstance(done.get("seconds"), int | float) else 0.0}

    def damage(self, name: str, done: dict | None = None, hashes: bool = False) -> list[str]:
        """What is wrong with the files that a stage's ``done.json`` vouches for (`guards.outputs.damage`)."""
        done = done or read_marker(self.stage_dir(name) / "done.json") or {}
        return outputs.damage(self.stage_dir(name), done["outputs"], hashes) if "outputs" in done else []

    def require(self, name: str) -> dict:
        """The stage's ``done.json``.

        Raises:
            UserError: the stage has not finished.
        """
        done = self.done(name)
        if done is None:
            raise UserError(
                f"stage {name} of {self.root} {self.why_not_done(name)}, and this stage needs it. "
                f"Run `ppo-vs-dpo experiment=... stages=[{name.split(',')[0]},...]` first."
            )
        return done

    def why_not_done(self, name: str) -> str:
        """Why a stage does not count as done, as the words after its name."""
        found = self.damage(name)
        return f"is damaged ({found[0]})" if found else "has not finished"

    def points(self, stage: str) -> list[str]:
        """Names of the finished points of a stage's sweep, sorted.

        What lies there of an earlier sweep may have been made from other settings, and is none of this one's.
        """
        names = {folder.name for folder in self.path("sweep").glob(f"{stage},*")}
        if "sweep" in (self.config.get(stage) or {}):
            names &= {point_name(stage, point) for point in points_of(self.config, stage)}
        return sorted(name for name in names if self.done(name) is not None)

    def begun(self, name: str) -> dict[str, Any] | None:
        """With what there is of a stage was begun: ``fingerprint``, ``parts`` and ``update``, the cut of its updates.

        ``None`` where nobody knows; ``update`` is ``None`` where it was not written.
        """
        folder = self.stage_dir(name)
        written = read_marker(folder / "started.json", keys=STARTED_KEYS) or read_marker(folder / "done.json")
        return with_update(written) if written is not None else None

    def rows(self, name: str) -> int | None:
        """Rows of an update, over all ranks, of a finished stage (PPO: responses); ``None`` where nobody wrote it."""
        update = with_update(self.done(name) or {})["update"]
        return None if update is None else update["rows"]

    def refuse_other_rows(self, name: str, made: Made) -> None:
        """Where a stage could go on, its updates must have as many rows as the ones that were made.

        Raises:
            UserError: they have not; says how to go on, and how to begin anew.
        """
        folder, attempt = self.stage_dir(name), replaced.unfinished(self.root, name, made.fingerprint)
        # A finished one whose files are damaged is made whole from its checkpoints.
        if attempt is None and self.done(name) is not None:
            return
        folder = folder if attempt is None else attempt
        before = with_update(read_marker(folder / "started.json", keys=STARTED_KEYS) or {})
        was, now = before["update"], made.update
        if before.get("fingerprint") != made.fingerprint or not replaced.worth_keeping(folder):
            return
        if was is None or now is None or was["rows"] == now["rows"]:
            return
        stage, ranks = name.split(",")[0], f"{was['ranks']} rank{'s' * (was['ranks'] != 1)}"
        go_on = (
            f"set {stage}.per_device_train_batch_size or gradient_accumulation_steps so that an update has "
            f"{was['rows']} rows again"
        )
        if (bound := was.get("bound")) is not None:
            go_on = f"start it on {ranks} again (with this {stage}.{bound} a result depends on the rows of a rank)"
        raise UserError(
            f"{name} has checkpoints in {folder} whose updates were of {was['rows']} rows on {ranks}; on "
            f"{now['ranks']} the same settings make {now['rows']}. To go on, {go_on}; to begin anew, move that folder "
            f"away."
        )

    def begin(self, name: str, made: Made) -> Path | None:
        """Make a stage's folder ready for work on just this.

        What was made from something else is moved aside, in one step and before anything is written; an unfinished
        attempt at this, moved aside before, is in its place again.

        Returns:
            Where a finished result of this stage is kept that this attempt takes the place of (also where an earlier
            command had moved it), or ``None``.
        """
        folder, fingerprint = self.stage_dir(name), made.fingerprint
        before = read_marker(folder / "started.json", set_aside=True, keys=STARTED_KEYS)
        before = before or read_marker(folder / "done.json")
        attempt = replaced.unfinished(self.root, name, fingerprint)
        aside = None
        if before is not None and before.get("fingerprint") == fingerprint:
            if not (folder / "done.json").exists():
                aside = replaced.displaced(self.root, before.get("instead_of"))
        elif before is not None or attempt is not None:
            aside = self.clear(name)
            if attempt is not None:
                attempt.rename(folder)
                before = read_marker(folder / "started.json") or {}
                aside = aside or replaced.displaced(self.root, before.get("instead_of"))
        folder.mkdir(parents=True, exist_ok=True)
        for name_of_old in ("progress.json", "done.json"):
            (folder / name_of_old).unlink(missing_ok=True)
        write_json(
            folder / "started.json",
            {
                "fingerprint": fingerprint,
                "parts": made.parts,
                "update": made.update,
                "made_by": [*self._others(name), made_by()],
                "instead_of": aside.name if aside is not None else None,
            },
        )
        return aside

    def begun_again(self, name: str, made: Made) -> None:
        """Write a finished stage's ``started.json`` where it has none that can be read."""
        marker = self.stage_dir(name) / "started.json"
        if read_marker(marker, set_aside=True, keys=STARTED_KEYS) is None:
            by = self.made_by(name)  # its last word says it, too
            write_json(marker, {**made._asdict(), "made_by": by})

    def _others(self, name: str) -> list[dict]:
        return [one for one in self.made_by(name) if differences(one, made_by())]

    def made_by(self, name: str, folder: Path | None = None) -> list[dict]:
        """Every version of code and libraries that has worked on a stage (in ``folder``), the first one first."""
        folder = self.stage_dir(name) if folder is None else folder
        made = (read_marker(folder / "started.json") or {}).get("made_by")
        made = made if isinstance(made, list) else []
        done = (read_marker(folder / "done.json") or {}).get("made_by")
        found = [one for one in [*made, done] if isinstance(one, dict)]
        return [one for number, one in enumerate(found) if one not in found[:number]]

    def finish(
        self, name: str, fingerprint: str | None, seconds: float, figures: dict, cost: dict | None = None
    ) -> None:
        """Write ``done.json``: the stage's last file, written atomically."""
        write_json(
            self.stage_dir(name) / "done.json",
            {
                "stage": name,
                "fingerprint": fingerprint,
                "update": (self.begun(name) or {}).get("update"),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "seconds": round(seconds, 3),
                "cost": cost or {},
                "figures": figures,
                "outputs": outputs.list_outputs(self.stage_dir(name)),
                "made_by": made_by(),
            },
        )

    def clear(self, name: str) -> Path | None:
        """Take what a stage wrote out of the way: its inputs changed, and its checkpoints would mix two runs.

        One rename, which a kill leaves done or not done. What took work is kept; returns where.
        """
        return replaced.move_aside(self.root, name, self.stage_dir(name))


def with_update(written: dict) -> dict[str, Any]:
    """A marker with ``update`` as `update_of` makes it, or ``None`` where it holds none that can be read."""
    update = written.get("update")
    kinds = {"settings": dict, "ranks": int, "rows": int}
    whole = isinstance(update, dict) and all(isinstance(update.get(key), kind) for key, kind in kinds.items())
    return {**written, "update": update if whole else None}


def read_config(path: Path) -> DictConfig:
    """A run's ``config.yaml``.

    Raises:
        UserError: it is not a YAML mapping.
    """
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        if not_the_file(error):
            raise
        raise UserError(f"{path} cannot be read: {first_sentence(error)}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} cannot be read: it holds no keys.")
    return config


__all__ = ["OLDEST", "STAGES", "STARTED_KEYS", "TRAINED", "RunFolder", "point_name", "read_config"]
