"""A paper's miniature: which seeds, in which world or by which runs, and the report of each, kept on disk."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import finite, read_json, sha256_of, write_json
from ppo_vs_dpo.papers.claims import Report
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.settings import CONFIGS, MINIATURE

FOLDER = Path("runs") / "papers"


@dataclass
class Miniature:
    """``configs/paper/NAME/mini.yaml``.

    Attributes:
        seeds: one report each. Settings were chosen on the first; the others were run once with them.
        world: settings of the paper's own world (``Paper.simulate``).
        run: a run of the pipeline for each seed, as on the command line (``Paper.read`` reads its folder).
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    world: dict[str, Any] = field(default_factory=dict)
    run: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, name: str, folder: Path = CONFIGS) -> "Miniature":
        """Of a paper.

        Raises:
            UserError: there is none, an unknown key, a wrong type, or both a world and runs.
        """
        path = folder / name / f"{MINIATURE}.yaml"
        if not path.is_file():
            raise UserError(f"{name} has no miniature ({path} does not exist); its claims were not checked.")
        try:
            found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.load(path)))
        except OmegaConfBaseException as error:
            raise UserError(f"{path}: {str(error.msg or error).splitlines()[0]}") from error
        if bool(found.world) == bool(found.run):
            raise UserError(f"{path}: a miniature has either a world or a run.")
        if not found.seeds:
            raise UserError(f"{path}: seeds is empty.")
        return found

    def fingerprint(self) -> str:
        """What a stored report depends on besides its seed."""
        return sha256_of([self.world, self.run])


def report_path(folder: Path, name: str, seed: int) -> Path:
    """Where the report of a seed lies."""
    return folder / name / f"seed{seed}.json"


def stored(folder: Path, name: str, miniature: Miniature) -> list[Report]:
    """The reports that are there and were made with these settings, in the order of the seeds."""
    found = []
    for seed in miniature.seeds:
        path = report_path(folder, name, seed)
        if path.is_file():
            report = read_json(path)
            if report.get("fingerprint") == miniature.fingerprint():
                found.append(report)
    return found


def run(
    paper: Paper,
    miniature: Miniature,
    folder: Path,
    pipeline: Callable[[list[str], int], Path] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Report]:
    """Make the reports that are missing; what is there with the same settings is not made again.

    Args:
        paper: whose.
        miniature: its settings.
        folder: where reports lie.
        pipeline: runs the pipeline with overrides for a seed and returns the run's folder.
        say: told what is going on.

    Raises:
        UserError: the miniature is a run and the paper cannot read one, or the other way round.
    """
    there = {report["seed"]: report for report in stored(folder, paper.name, miniature)}
    maker = paper.read if miniature.run else paper.simulate
    if maker is None:
        raise UserError(
            f"{paper.name}: its miniature is a {'run' if miniature.run else 'world'}, its module has none."
        )
    for seed in miniature.seeds:
        if seed in there:
            say(f"{paper.name}, seed {seed}: there already")
            continue
        say(f"{paper.name}, seed {seed} ...")
        started = time.monotonic()
        if miniature.run:
            report = maker(pipeline(miniature.run, seed), seed)
        else:
            report = maker(seed, miniature.world)
        report = {**report, "fingerprint": miniature.fingerprint()}
        report.setdefault("seconds", round(time.monotonic() - started, 1))
        write_json(report_path(folder, paper.name, seed), finite(report))
        there[seed] = json.loads(json.dumps(finite(report)))
    return [there[seed] for seed in miniature.seeds]
