"""Choosing each method's point on validation prompts: what is reported on others has no winner's curse."""

import re
import shutil
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_parquet
from ppo_vs_dpo.compare.frontier.selected import Candidate, best, spread_of_budget
from ppo_vs_dpo.compare.pooled.runs import main as pool_main
from ppo_vs_dpo.pipeline.checking.late import compared
from tests.compare.helpers import HASH, PROMPTS, check_schema, done, make_run, set_config
from tests.compare.server import prefers_longer
from tests.compare.test_stage import compare
from tests.compare.test_stage_options import checkpoint

PAIR_SET = {"hash": HASH, "n_train": 4, "n_test": 2}


def test_no_winner_s_curse():
    """All settings equal: the chosen one's mean is right on other prompts, and too good on those that chose."""
    rng = np.random.default_rng(0)
    settings, prompts, trials = 12, 64, 4000
    seen, reported, covered = [], [], 0
    for _ in range(trials):
        # Prompts differ in how hard they are, alike for all settings.
        validation = rng.normal(size=(settings, prompts)) + rng.normal(size=prompts)
        heldout = rng.normal(size=(settings, prompts)) + rng.normal(size=prompts)
        found = best([Candidate(str(row), str(row), {}, score=values.mean()) for row, values in enumerate(validation)])
        seen.append(found.score)
        values = heldout[int(found.name)]
        reported.append(values.mean())
        half = stats.t.ppf(0.975, prompts - 1) * values.std(ddof=1) / np.sqrt(prompts)
        covered += abs(values.mean()) <= half
    error = np.std(reported) / np.sqrt(trials)
    assert abs(np.mean(reported)) < 4 * error
    assert covered / trials == pytest.approx(0.95, abs=4 * np.sqrt(0.05 * 0.95 / trials))
    # What would be reported on the prompts that chose: E max of 12 standard normals is 1.63 standard errors.
    assert np.mean(seen) == pytest.approx(1.629 / np.sqrt(prompts), abs=4 * error)


def test_equal_scores_leave_the_main_run():
    assert best([Candidate("a", "a", {}, score=1.0), Candidate("b", "b", {}, score=1.0)]).name == "a"


def test_the_curve_over_settings_tried_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(1)
    scores, heldout = rng.normal(size=6), rng.normal(size=6)
    for j, value in enumerate(spread_of_budget(scores, heldout), 1):
        of_subset = [heldout[max(rows, key=lambda row: scores[row])] for rows in combinations(range(6), j)]
        assert value == pytest.approx(np.mean(of_subset), abs=1e-12)


def two_settings(root, word_tokenizer):
    """A run with two settings of each method, and one of RLOO's."""
    make_run(root, word_tokenizer)
    done(root, "ppo", pair_set=PAIR_SET, kl_coef=0.5, updates=24)
    done(root, "ppo,kl_coef=0.0", pair_set=PAIR_SET, kl_coef=0.0)
    done(root, "dpo", pair_set=PAIR_SET, beta=2.0, steps=94)
    copied = root / "sweep" / "ppo,advantage=rloo"
    shutil.copytree(root / "ppo" / "model", copied / "model")
    done(root, "ppo,advantage=rloo", pair_set=PAIR_SET, kl_coef=0.5)
    text = (root / "config.yaml").read_text()
    (root / "config.yaml").write_text(text + "ppo: {kl_coef: 0.5, advantage: gae}\ndpo: {beta: 2.0}\n")
    set_config(root, "n_prompts: 20, select: {by: gold, prompts: 12}")
    return root


@pytest.fixture
def run(tmp_path, word_tokenizer):
    """Not compared yet."""
    return two_settings(tmp_path / "run", word_tokenizer)


@pytest.fixture(scope="module")
def compared_run(tmp_path_factory, word_tokenizer):
    """The run, and its report."""
    root = two_settings(tmp_path_factory.mktemp("selected") / "run", word_tokenizer)
    return root, compare(root)


def test_points_are_chosen_on_prompts_of_their_own(compared_run):
    run, report = compared_run
    tuning = report["settings"]["tuning"]
    assert {name: one["settings"] for name, one in tuning.items()} == {"ppo": 2, "rloo": 1, "dpo": 2}
    assert set(tuning["ppo"]["candidates"]) == {"ppo,kl_coef=0.5", "ppo,kl_coef=0.0"}
    assert tuning["rloo"]["chosen"] == "rloo,kl_coef=0.5"
    for one in tuning.values():
        scores = {name: about["score"] for name, about in one["candidates"].items()}
        assert one["chosen"] == max(scores, key=scores.get)
        assert one["chosen_on"] == "validation"
        assert one["by"] == "gold"
        assert one["prompts"] == 12
    # What the report says of a method is what it says of its chosen point, and all settings are on the frontier.
    points = {point["policy"]: point for point in report["frontier"]}
    assert set(report["policies"]) == {"sft", "ppo", "rloo", "dpo", "best_of_2", "best_of_4"}
    for method, one in tuning.items():
        for key in ("gold_reward", "kl"):
            assert points[one["chosen"]][key] == report["policies"][method][key]
        assert set(one["candidates"]) <= set(points)
    # The prompts that chose and those that are reported on have none in common.
    rows = read_parquet(run / "compare" / "completions.parquet").to_pandas()
    reported = set(rows["prompt"])
    chosen_on = set()
    for path in (run / "cache" / "completions").glob("*.parquet"):
        ids = set(read_parquet(path).to_pandas()["prompt_id"])
        if not ids & set(rows["prompt_id"]):
            chosen_on |= ids
    assert len(reported) == 20
    assert len(chosen_on) == 12
    assert len(PROMPTS) >= 32
    assert "chosen on 12 validation prompts by the gold reward" in report["verdict"][-1]
    assert "PPO kl_coef 0." in report["verdict"][-1]
    assert "of 2" in report["verdict"][-1]
    page = (run / "compare" / "report.html").read_text()
    assert "RLOO" in page
    assert (run / "compare" / "figures" / "frontier.svg").is_file()


def test_every_setting_s_price_is_counted_once(compared_run):
    report = compared_run[1]
    tuned = report["cost"]["tuned"]
    # 2.5 s each: the reward model, and every setting of the method; DPO needs no reward model.
    for name, stages in (("ppo", 3), ("rloo", 2), ("dpo", 2)):
        assert tuned[name]["settings"] == {"ppo": 2, "rloo": 1, "dpo": 2}[name]
        assert 2.5 * stages < tuned[name]["seconds"] < 2.5 * stages + 30
    curves = report["cost"]["curves"]
    assert [(row["method"], row["settings"]) for row in curves] == [
        ("ppo", 1), ("ppo", 2), ("rloo", 1), ("dpo", 1), ("dpo", 2)
    ]  # fmt: skip
    ends = {row["method"]: row for row in curves}
    for name, row in ends.items():
        # With all settings tried it is the chosen one, at the price of all.
        assert row["gold_reward"] == pytest.approx(report["policies"][name]["gold_reward"], abs=1e-12)
        assert row["seconds"] == pytest.approx(tuned[name]["seconds"], abs=0.01)


def test_a_checkpoint_may_be_chosen(run, word_tokenizer):
    for step in (8, 16):
        checkpoint(run, "ppo", step, word_tokenizer, 0.003 * step)
    set_config(run, "checkpoints: {ppo: all}")
    report = check_schema(compare(run))
    assert set(report["settings"]["tuning"]["ppo"]["candidates"]) == {
        "ppo,kl_coef=0.5", "ppo,kl_coef=0.0", "ppo,step=8", "ppo,step=16"
    }  # fmt: skip
    along = [p["policy"] for p in report["frontier"] if p["along"] == "training"]
    assert along == ["ppo,step=8", "ppo,step=16"]
    # Two trainings, not four.
    assert report["cost"]["tuned"]["ppo"]["seconds"] < 2.5 * 3 + 30
    assert max(row["settings"] for row in report["cost"]["curves"] if row["method"] == "ppo") == 2


def test_a_judge_that_reads_may_choose(run, serve):
    server = serve(prefers_longer)
    judge = (
        f"kind: llm, name: reader, model: m, base_url: '{server.url}', retries: 0, pairs: [[ppo, dpo]], n_prompts: 4"
    )
    text = (run / "config.yaml").read_text().replace("by: gold", "by: reader")
    (run / "config.yaml").write_text(text)
    set_config(run, f"judges: [{{{judge}}}]")
    report = check_schema(compare(run))
    # Five settings against the reference on 12 prompts, and the pair on 4; both orders each.
    assert len(server.requests) == (5 * 12 + 4) * 2
    for one in report["settings"]["tuning"].values():
        scores = {name: about["score"] for name, about in one["candidates"].items()}
        assert one["chosen"] == max(scores, key=scores.get)
        assert all(0 <= score <= 1 for score in scores.values())
    assert "by the judge reader" in report["verdict"][-1]


def test_a_judge_that_stops_chooses_nothing(run, serve):
    server = serve(lambda question, number: 500 if number > 20 else prefers_longer(question))
    judge = f"kind: llm, name: reader, model: m, base_url: '{server.url}', retries: 0, concurrency: 1"
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("by: gold", "by: reader"))
    set_config(run, f"judges: [{{{judge}}}]")
    with pytest.raises(UserError, match="the judge reader stopped early, and no point was chosen"):
        compare(run)


@pytest.mark.slow
def test_runs_that_chose_other_points_are_pooled_by_method(compared_run, tmp_path):
    run, first = compared_run
    other = tmp_path / "other"
    shutil.copytree(run, other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("seed: 3", "seed: 4"))
    (other / "compare" / "done.json").unlink()
    second = compare(other)
    assert pool_main([str(run), str(other), "--output", str(tmp_path / "pooled")]) == 0
    report = check_schema(read_json(tmp_path / "pooled" / "report.json"))
    assert set(report["policies"]) == set(first["policies"])
    for method in ("ppo", "rloo", "dpo"):
        own = [one["policies"][method]["gold_reward"] for one in (first, second)]
        assert report["policies"][method]["gold_reward_per_seed"] == pytest.approx(own, abs=1e-9)
        chosen = [one["settings"]["tuning"][method]["chosen"] for one in (first, second)]
        assert report["settings"]["tuning"][method]["chosen"] == chosen
    assert {p["policy"] for p in report["frontier"]} >= {"ppo,kl_coef=0.5", "ppo,kl_coef=0.0", "dpo,beta=1.0"}
    assert set(report["cost"]["tuned"]) == {"ppo", "rloo", "dpo"}
    assert report["cost"]["curves"]


def test_no_validation_prompts_is_said_before_anything_is_drawn(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("n_prompts: 20", f"n_prompts: {len(PROMPTS)}"))
    with pytest.raises(UserError, match=r"compare\.select has no validation prompts"):
        compare(run)
    assert not list((run / "cache").glob("completions/*"))


COMPARE = {"n_prompts": 100, "select": {"by": "gold", "prompts": 50}}
DATA = {"gold": "a:b", "heldout_prompts": 150}
SWEEP = {"kl_coef": 0.1, "sweep": {"kl_coef": [0.3]}}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"data": DATA, "compare": COMPARE, "ppo": SWEEP}, None),
        ({"data": {**DATA, "heldout_prompts": 100}, "compare": COMPARE, "ppo": SWEEP}, "leaves no validation prompts"),
        ({"data": {**DATA, "heldout_prompts": 130}, "compare": COMPARE, "ppo": SWEEP}, "leaves 30 for validation"),
        ({"data": {"heldout_prompts": 150}, "compare": COMPARE, "ppo": SWEEP}, r"select\.by is gold; it must be one"),
        ({"data": DATA, "compare": COMPARE}, "no method has more than one setting"),
    ],
)
def test_what_cannot_choose_is_named_before_the_first_stage(config, says):
    found = [line for line in compared(config) if "select" in line]
    assert (found == []) if says is None else (len(found) == 1 and re.search(says, found[0]))


@pytest.mark.parametrize(
    ("select", "says"),
    [
        ("{prompts: 8}", r"select\.by is None"),
        ("{by: gold, prompts: 1}", r"select\.prompts is 1"),
        ("{by: gold, promts: 8}", "Did you mean prompts"),
        ("{by: glod}", "there is no judge glod"),
        ("{by: gold}, tuning: {ppo: {settings: 2}}", "give one of them"),
    ],
)
def test_what_select_cannot_mean(tmp_path, word_tokenizer, select, says):
    root = make_run(tmp_path / "run", word_tokenizer)
    set_config(root, f"n_prompts: 20, select: {select}")
    with pytest.raises(UserError, match=says):
        compare(root)
