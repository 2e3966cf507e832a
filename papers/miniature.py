"""A paper's miniature: which seeds, in which world or by which runs, and the report of each, kept on disk."""

import ast
import inspect
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ppo_vs_dpo.artifacts.errors import UserError, first_sentence
from ppo_vs_dpo.artifacts.files import finite, read_marker, sha256_of, write_json
from ppo_vs_dpo.papers.claims import Report
from ppo_vs_dpo.papers.paper import Paper
from ppo_vs_dpo.papers.settings import CONFIGS, MINIATURE

FOLDER = Path("runs") / "papers"
WORLDS = "ppo_vs_dpo.papers.worlds"


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
            raise UserError(f"{path}: {first_sentence(error.msg or error)}") from error
        if bool(found.world) == bool(found.run):
            raise UserError(f"{path}: a miniature has either a world or a run.")
        if not found.seeds:
            raise UserError(f"{path}: seeds is empty.")
        return found

    def fingerprint(self, paper: Paper) -> str:
        """What a stored report depends on besides its seed: settings, and the code of its world."""
        return sha256_of([self.world, self.run, code_of(paper.read if self.run else paper.simulate)])


def code_of(maker: Callable[..., Any] | None) -> list[str]:
    """The code behind a report: the maker's module and the worlds it uses, less comments, docstrings, `PAPER`."""
    if maker is None:
        return []
    modules = {maker.__module__: sys.modules[maker.__module__]}
    todo = list(modules)
    while todo:
        for value in vars(modules[todo.pop()]).values():
            name = getattr(value, "__module__", None)
            if isinstance(name, str) and name.startswith(WORLDS) and name not in modules:
                modules[name] = sys.modules[name]
                todo.append(name)
    return [_bare(inspect.getsource(modules[name])) for name in sorted(modules)]


def _bare(source: str) -> str:
    tree = ast.parse(source)
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PAPER")
    ]
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and node.body and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def report_path(folder: Path, name: str, seed: int) -> Path:
    """Where the report of a seed lies."""
    return folder / name / f"seed{seed}.json"


def stored(folder: Path, paper: Paper, miniature: Miniature) -> list[Report]:
    """The reports that are there, made with these settings and this code, in the order of the seeds."""
    current = miniature.fingerprint(paper)
    found = []
    for seed in miniature.seeds:
        path = report_path(folder, paper.name, seed)
        report = read_marker(path) or {}
        if report.get("fingerprint") == current:
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

    ``pipeline`` runs the pipeline with overrides for a seed and returns the run's folder.

    Raises:
        UserError: the miniature is a run and the paper cannot read one, or the other way round.
    """
    there = {report["seed"]: report for report in stored(folder, paper, miniature)}
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
        report = {**report, "fingerprint": miniature.fingerprint(paper)}
        report.setdefault("seconds", round(time.monotonic() - started, 1))
        write_json(report_path(folder, paper.name, seed), finite(report))
        there[seed] = json.loads(json.dumps(finite(report)))
    return [there[seed] for seed in miniature.seeds]
