"""Every claim on stored reports: those that say what the paper says, and those that say the opposite."""

import copy
import json
from pathlib import Path

import pytest

from ppo_vs_dpo.papers.claims import HELD, NOT_HELD
from ppo_vs_dpo.papers.miniature import Miniature
from ppo_vs_dpo.papers.paper import paper, papers
from ppo_vs_dpo.papers.settings import CONFIGS, MINIATURE

STORED = json.loads((Path(__file__).parent / "reports.json").read_text(encoding="utf-8"))
CHECKED = [one.name for one in papers() if one.statements]


def reports(figures: dict[str, list[float]]) -> list[dict]:
    """``{"name": [a, b, c]}`` as three seeds' reports."""
    count = len(next(iter(figures.values())))
    return [
        {"seed": seed, "figures": {name: values[seed] for name, values in figures.items()}} for seed in range(count)
    ]


def test_every_paper_with_claims_has_a_miniature_and_stored_reports():
    assert set(STORED) == set(CHECKED)
    for name in CHECKED:
        one = paper(name)
        miniature = Miniature.load(name)
        assert (one.read if miniature.run else one.simulate) is not None
        assert one.world
        assert len(miniature.seeds) >= 3
        assert all(statement.source and statement.expected and statement.quantity for statement in one.statements)
    assert {path.parent.name for path in CONFIGS.glob(f"*/{MINIATURE}.yaml")} == set(CHECKED)


@pytest.mark.parametrize("name", CHECKED)
def test_reports_that_say_what_the_paper_says(name):
    claims = paper(name).claims(reports(STORED[name]["right"]))
    assert [claim.statement.text for claim in claims if claim.held != HELD] == []


@pytest.mark.parametrize("name", CHECKED)
def test_reports_that_say_the_opposite(name):
    claims = paper(name).claims(reports(STORED[name]["wrong"]))
    assert [claim.statement.text for claim in claims if claim.held != NOT_HELD] == []


@pytest.mark.parametrize("name", CHECKED)
def test_an_explanation_belongs_to_a_claim(name):
    texts = {statement.text for statement in paper(name).statements}
    assert set(paper(name).explanations) <= texts
    assert len(texts) == len(paper(name).statements)


@pytest.mark.parametrize("name", CHECKED)
def test_seeds_that_disagree_decide_nothing_about_a_mean(name):
    right, wrong = reports(STORED[name]["right"]), reports(STORED[name]["wrong"])
    mixed = copy.deepcopy([right[0], wrong[1], right[2]])
    for statement, claim in zip(paper(name).statements, paper(name).claims(mixed), strict=True):
        assert claim.held != HELD
        if statement.always:
            assert claim.held == NOT_HELD
