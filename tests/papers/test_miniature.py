"""Miniatures and the command: resumable, refused where they cannot be meant, one page a paper."""

import inspect
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, write_json
from ppo_vs_dpo.papers.claims import Statement, figure
from ppo_vs_dpo.papers.miniature import Miniature, code_of, report_path, run, stored
from ppo_vs_dpo.papers.page import Checked, claim_rows, document, markdown, write_pages
from ppo_vs_dpo.papers.paper import Paper, paper, papers
from ppo_vs_dpo.papers.settings import CONFIGS, full_settings
from ppo_vs_dpo.pipeline.cli import dispatch


def made(**settings) -> Paper:
    """A paper about a slope."""
    about = {"name": "nobody2026", "title": "Nobody 2026 <b>", "question": "Does it rise?", "takes": "nothing"}
    statement = Statement("it | rises", "fig. 1", "up", "slope", figure("slope"), least=0.0)
    return Paper(**{**about, "world": "a line", "statements": (statement,), **settings})


def test_what_is_there_is_not_made_again(tmp_path):
    asked = []

    def simulate(seed, settings):
        asked.append(seed)
        return {"seed": seed, "figures": {"slope": settings["slope"] + seed}}

    one = made(simulate=simulate)
    miniature = Miniature(seeds=[0, 1, 2], world={"slope": 1.0})
    first = run(one, miniature, tmp_path)
    assert asked == [0, 1, 2]
    assert run(one, miniature, tmp_path) == first == stored(tmp_path, one, miniature)
    assert asked == [0, 1, 2]
    # Killed after the second seed: only the third is made.
    report_path(tmp_path, one.name, 2).unlink()
    run(one, miniature, tmp_path)
    assert asked == [0, 1, 2, 2]
    # Other settings: everything is.
    run(one, Miniature(seeds=[0, 1, 2], world={"slope": 2.0}), tmp_path)
    assert asked == [0, 1, 2, 2, 0, 1, 2]


def test_nothing_is_claimed_before_every_seed_has_run(tmp_path):
    one = made(simulate=lambda seed, settings: {"seed": seed, "figures": {"slope": 1.0 + seed}})
    miniature = Miniature(seeds=[0, 1, 2], world={"x": 1})
    reports = run(one, miniature, tmp_path)
    assert len(Checked(one, miniature, reports).claims) == 1
    assert Checked(one, miniature, reports[:2]).claims == []
    assert "2 of 3 seeds have run; nothing is claimed" in markdown(Checked(one, miniature, reports[:2]))


def test_a_run_of_the_pipeline_is_read(tmp_path):
    one = made(read=lambda folder, seed: {"seed": seed, "figures": {"slope": float(folder.name)}})
    miniature = Miniature(seeds=[4, 5], run=["experiment=quickstart"])
    reports = run(one, miniature, tmp_path, pipeline=lambda overrides, seed: Path(str(seed * 10)))
    assert [report["figures"]["slope"] for report in reports] == [40.0, 50.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"seeds": [1], "world": {"a": 1}, "run": ["x"]}, "either a world or a run"),
        ({"seeds": [1]}, "either a world or a run"),
        ({"seeds": [], "world": {"a": 1}}, "seeds is empty"),
        ({"seeds": ["x"], "world": {"a": 1}}, "could not be converted to Integer"),
        ({"sedes": [1], "world": {"a": 1}}, "sedes"),
    ],
)
def test_miniatures_that_cannot_be_meant(tmp_path, content, message):
    (tmp_path / "one").mkdir()
    OmegaConf.save(OmegaConf.create(content), tmp_path / "one" / "mini.yaml")
    with pytest.raises(UserError, match=message):
        Miniature.load("one", tmp_path)


def test_a_miniature_without_its_maker_is_named(tmp_path):
    with pytest.raises(UserError, match="nobody2026: its miniature is a run, its module has none"):
        run(made(), Miniature(run=["experiment=quickstart"]), tmp_path)
    with pytest.raises(UserError, match="simpo2024 has no miniature"):
        Miniature.load("simpo2024")


def test_the_page_has_claims_figure_and_no_markup_of_others(tmp_path):
    one = made(
        simulate=lambda seed, settings: {"seed": seed, "figures": {"slope": -10.0 - seed}},
        draw=lambda axes, reports: axes.plot([0, 1], [0, 1]),
        published=(("slope", "3 < 4", "fig. 1"),),
        unknown=("all else",),
        explanations={"it | rises": "it falls"},
    )
    miniature = Miniature(seeds=[0, 1, 2], world={"x": 1})
    write_pages(tmp_path, Checked(one, miniature, run(one, miniature, tmp_path)))
    page = (tmp_path / "report.html").read_text()
    assert "Nobody 2026 &lt;b&gt;" in page
    assert "Nobody 2026 <b>" not in page
    assert "<svg" in page
    assert "not held" in page
    assert "it falls" in page
    assert not re.search(r"(src|href)=\"https?:", page)
    text = (tmp_path / "report.md").read_text()
    assert "it \\| rises" in text
    assert "3 &lt; 4" in text
    assert (tmp_path / "figures" / "figure.svg").is_file()
    claims = read_json(tmp_path / "claims.json")
    assert claims[0]["held"] == "not held"
    assert claims[0]["seeds"] == 3


def test_the_table_has_every_paper_and_counts_a_shared_run_once():
    miniature = Miniature(seeds=[1, 2], run=["experiment=quickstart"])
    reports = [{"seed": seed, "figures": {"slope": 1.0 + seed}, "seconds": 60.0} for seed in (1, 2)]
    both = [Checked(made(name=name), miniature, reports) for name in ("a", "b")]
    text = document(both)
    assert "2 papers, 2 claims: 2 not decided by so little; 2.0 minutes in all" in text
    assert text.count("| it \\| rises (fig. 1) |") == 2


def test_the_command(tmp_path, capsys):
    folder = ["--folder", str(tmp_path)]
    assert dispatch(["paper", *folder, "list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{one.name} " in listed for one in papers())
    assert "not run yet; nothing is claimed" in listed
    assert "there is none" in listed
    assert dispatch(["paper", "show", "nplus2024"]) == 0
    shown = capsys.readouterr().out
    assert "ppo.kl_coef: 0.05" in shown
    assert "hyperparameter table" in shown
    assert dispatch(["paper", *folder, "run", "raft2023", "--table", str(tmp_path / "papers.md")]) == 0
    assert "Two rounds with K samples are one with K^2" in capsys.readouterr().out
    assert "**held**" in (tmp_path / "papers.md").read_text()
    assert dispatch(["paper", *folder, "list"]) == 0
    assert re.search(r"in miniature: \d+ held", capsys.readouterr().out)


# The fast third of the miniatures: seconds each.
FAST = ("gao2022", "raft2023", "cai2022", "ziegler2019", "coste2023")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_what_the_table_says_is_found_again(name, tmp_path):
    table = (Path(__file__).parents[2] / "docs" / "papers.md").read_text(encoding="utf-8")
    assert dispatch(["paper", "--folder", str(tmp_path), "run", name]) == 0
    one = paper(name)
    found = one.claims(stored(tmp_path, one, Miniature.load(name)))
    assert len(found) == len(one.statements) > 0
    for row in claim_rows(found):
        claim, verdict = row[0], row[-1]
        lines = [line for line in table.splitlines() if line.startswith(f"| {claim} |")]
        assert [line.endswith(f"{verdict} |") for line in lines] == [True], row


def test_the_fast_third_is_a_third():
    assert 3 * len(FAST) >= sum((CONFIGS / one.name / "mini.yaml").is_file() for one in papers())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "daa2023"], "there is no paper 'daa2023'. Did you mean daa2024"),
        (["run"], "which paper"),
        (["run", "gao2022", "seed=1"], "fixed"),
        (["run", "gao2022", "--full"], "never released"),
        (["run", "dpo2023", "--full"], "3 full configurations; name one: --full hh|sentiment|tldr"),
        (["run", "dpo2023", "--full", "imdb"], "no full configuration 'imdb'"),
        (["run", "dpo2023", "--full", "sentiment"], "data.max_new_tokens: Budget of a response in tokens"),
        (["run", "--all", "--full"], "usage"),
    ],
)
def test_what_the_command_refuses(words, message):
    with pytest.raises(UserError) as refused:
        dispatch(["paper", *words])
    assert message in str(refused.value)


def test_a_full_run_that_does_not_fit_is_refused_with_its_plan(capsys):
    with pytest.raises(UserError, match=r"nplus2024/6\.9b does not fit 1 x l40s-48gb"):
        dispatch(["paper", "run", "nplus2024", "--full", "6.9b", "--gpu", "l40s-48gb", "--gpus", "1"])
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_full_settings_of_every_paper_are_listed_once():
    names = [f"{one.name}/{setting}" for one in papers() for setting in full_settings(one.name)]
    assert len(names) == len(set(names)) >= 30
    assert paper("dpo2023").name == "dpo2023"


def test_a_report_is_made_again_when_the_code_of_its_world_changes(monkeypatch):
    one = paper("tang2024")
    miniature = Miniature.load("tang2024")
    before = miniature.fingerprint(one)
    used = code_of(one.simulate)
    assert len(used) == 3  # its own module, the methods, and the tree that these use
    from ppo_vs_dpo.papers.worlds import tree

    path = Path(tree.__file__)
    source = path.read_text(encoding="utf-8")
    real = inspect.getsource

    def changed(old, new):
        assert old in source
        monkeypatch.setattr(inspect, "getsource", lambda m: source.replace(old, new) if m is tree else real(m))
        return miniature.fingerprint(one)

    assert changed("The world of one seed.", "A world.") == before
    assert changed("ACTIONS = 3", "ACTIONS = 4") != before


def test_reports_of_another_shape_are_not_claims(tmp_path):
    miniature = Miniature(seeds=[0], world={"x": 1})
    write_json(report_path(tmp_path, "nobody2026", 0), {"seed": 0, "figures": {}})
    assert stored(tmp_path, made(), miniature) == []
