"""The papers: what each asks, what it claims, what is not known about it, and where its check lives."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.settings import nearest
from ppo_vs_dpo.papers.claims import Claim, Report, Statement

# Name -> the module below `papers` that declares PAPER.
MODULES = {
    "dpo2023": "direct.dpo2023",
    "nplus2024": "recipes.nplus2024",
    "xu2024": "direct.xu2024",
    "ivison2024": "recipes.ivison2024",
    "gao2022": "overoptimisation.gao2022",
    "daa2024": "overoptimisation.daa2024",
    "coste2023": "overoptimisation.coste2023",
    "noukhovitch2024": "direct.noukhovitch2024",
    "tang2024": "direct.tang2024",
    "swamy2025": "direct.swamy2025",
    "singhal2023": "overoptimisation.singhal2023",
    "raft2023": "recipes.raft2023",
    "cai2022": "recipes.cai2022",
    "ziegler2019": "recipes.ziegler2019",
    "stiennon2020": "recipes.stiennon2020",
    "rloo2024": "recipes.rloo2024",
    "instructgpt2022": "recipes.instructgpt2022",
    "tulu3_2024": "recipes.tulu3_2024",
    "simpo2024": "direct.simpo2024",
}


@dataclass(frozen=True)
class Paper:
    """A paper and its check.

    Attributes:
        name: of its folder in configs/paper.
        title: authors, year, title, arXiv number.
        question: what it asks, a sentence.
        takes: what its full configurations take, as published, with the source.
        statements: its claims that the miniature looks at.
        published: the paper's own numbers beside which ours stand: (what, number, source).
        unknown: what nobody published.
        world: what the miniature runs in, a sentence.
        simulate: ``(seed, settings) -> report``, where the miniature needs no trainer; else ``None``.
        read: ``(run folder, seed) -> report``, where the miniature is a run of the pipeline; else ``None``.
        draw: ``(axes, reports)`` draws the paper's figure from our reports.
        explanations: for claims that did not hold: the statement's text -> our best guess why.
    """

    name: str
    title: str
    question: str
    takes: str
    statements: tuple[Statement, ...] = ()
    published: tuple[tuple[str, str, str], ...] = ()
    unknown: tuple[str, ...] = ()
    world: str = ""
    simulate: Callable[[int, dict[str, Any]], Report] | None = None
    read: Callable[[Any, int], Report] | None = None
    draw: Callable[[Any, Sequence[Report]], None] | None = None
    explanations: dict[str, str] = field(default_factory=dict)

    def claims(self, reports: Sequence[Report]) -> list[Claim]:
        """Every claim checked on the reports of all seeds."""
        return [statement.claim(reports) for statement in self.statements]


def module_of(name: str) -> ModuleType:
    """The module of a paper.

    Raises:
        UserError: there is no paper of that name.
    """
    if name not in MODULES:
        raise UserError(f"there is no paper {name!r}.{nearest(name, list(MODULES))} `ppo-vs-dpo paper list` has them.")
    return importlib.import_module(f"ppo_vs_dpo.papers.{MODULES[name]}")


def paper(name: str) -> Paper:
    """A paper by its name.

    Raises:
        UserError: there is none of that name.
    """
    return module_of(name).PAPER


def papers() -> list[Paper]:
    """All papers, in the order of `MODULES`."""
    return [paper(name) for name in MODULES]
