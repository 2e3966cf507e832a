"""Policies near SFT, through the stage: reweighted, bounded, honest about what nobody can see; and what is
recorded beside.
"""

import shutil

import numpy as np
import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_parquet
from ppo_vs_dpo.compare.estimates.reweighted import reweighted_values
from ppo_vs_dpo.compare.estimates.win_rates import Settings
from ppo_vs_dpo.compare.pooled.reading import load
from ppo_vs_dpo.compare.pooled.runs import pool
from tests.compare.helpers import check_schema, make_run, set_config, write_prompts
from tests.compare.test_stage import compare


@pytest.fixture(scope="module")
def run(tmp_path_factory, word_tokenizer):
    """A run whose policies moved by a hundredth of a nat."""
    root = make_run(tmp_path_factory.mktemp("near") / "run", word_tokenizer, (0, 1e-4, 8e-5, 2e-4, 5e-5))
    set_config(root, "tuning: {ppo: {settings: 12, chosen_on: validation}}")
    compare(root)
    return root


def test_win_rates_are_reweighted_and_bounded(run):
    report = read_json(run / "compare" / "report.json")
    assert report["policies"]["ppo"]["kl"]["mean"] < 0.05
    entries = {(e["policy"], e["versus"], e["judge"]): e for e in report["win_rates"]}
    for pair in (("ppo", "dpo"), ("ppo", "sft"), ("dpo", "sft"), ("ppo,kl_coef=0.0", "dpo")):
        entry = entries[*pair, "gold"]
        assert entry["test"] == "reweighted"
        # Far narrower than fresh draws, inside of what KL allows, and not far from them.
        width, raw = entry["ci"][1] - entry["ci"][0], entry["raw"]
        assert width < 0.35 * (raw["ci"][1] - raw["ci"][0])
        assert abs(entry["win_rate"] - 0.5) <= entry["allowed"]["at_most"]
        assert not entry["allowed"]["outside"]
        back = entries[pair[1], pair[0], "gold"]
        assert back["raw"]["win_rate"] == pytest.approx(1 - raw["win_rate"])
        assert back["ci"] == pytest.approx([1 - entry["ci"][1], 1 - entry["ci"][0]])
    assert "raw" not in entries["best_of_4", "sft", "gold"]
    assert entries["best_of_4", "sft", "gold"]["allowed"]["at_most"] == pytest.approx(0.3)
    assert "whatever the judge, they are at most" in report["verdict"][0]
    assert report["decision"]["primary"]["outcome"] != "beats"
    page = (run / "compare" / "report.html").read_text()
    assert "What would change this verdict" in page
    assert "12 settings tried; the main one was chosen on validation prompts" in page
    assert "was chosen by means that were not recorded" in page  # DPO's
    assert page.count('title="chosen on validation prompts among 12 settings"') == 1


def test_the_reweighted_figure_is_what_the_file_holds(run):
    """From completions.parquet alone, the estimate again; and a run that is read back has the same."""
    table = read_parquet(run / "compare" / "completions.parquet").to_pandas()
    own = table[table["policy"] == "sft"].sort_values(["prompt_id", "role", "draw"], kind="stable")
    size = int(own.groupby("prompt_id").size().iloc[0])
    scores, ppo, dpo, sft, logprob = (
        own[name].to_numpy().reshape(-1, size)
        for name in ("gold", "logprob under ppo", "logprob under dpo", "logprob under sft", "logprob")
    )
    reference = np.where(np.isfinite(logprob), logprob, sft)
    value = reweighted_values(scores, ppo - reference, dpo - reference).mean()
    report = read_json(run / "compare" / "report.json")
    entry = next(e for e in report["win_rates"] if (e["policy"], e["versus"], e["judge"]) == ("ppo", "dpo", "gold"))
    assert entry["win_rate"] == pytest.approx(value, abs=1e-9)
    again = load(run)
    assert set(again.contenders["sft"].draws.under) >= {"ppo", "dpo"}
    assert np.isfinite(again.pool.under["sft"]).all()


def test_reweighting_is_unbiased():
    """Over many draws of a small space the mean is the exact win rate, for a judge that is not transitive, too."""
    rng = np.random.default_rng(0)
    reference, one, two = rng.dirichlet(np.ones(6), size=3)
    scores = np.array([0.0, 1.0, 1.0, 2.0, 3.0, 5.0])
    above = np.sign(scores[:, None] - scores[None])
    truth = 0.5 + one @ above @ two / 2
    drawn = rng.choice(6, p=reference, size=(200_000, 4))
    values = reweighted_values(scores[drawn], np.log(one / reference)[drawn], np.log(two / reference)[drawn])
    assert values.mean() == pytest.approx(truth, abs=5 * values.std() / np.sqrt(len(values)))


def test_prompts_of_one_dialogue_are_one_unit(run, tmp_path, word_tokenizer):
    """Sixteen dialogues, each at two lengths: 32 prompts, 16 units, said in the report; equal prompts count once."""
    root = make_run(tmp_path / "run", word_tokenizer)
    words = [
        "the",
        "film",
        "was",
        "very",
        "good",
        "and",
        "the",
        "plot",
        "was",
        "bad",
        "and",
        "a",
        "cast",
        "was",
        "dull",
    ]
    rng, prompts = np.random.default_rng(0), []
    for _ in range(16):
        first = [{"role": "user", "content": " ".join(rng.choice(words, 9))}]
        prompts += [first, [*first, {"role": "assistant", "content": "good"}, {"role": "user", "content": "was bad"}]]
    write_prompts(root / "data" / "prompts_heldout.parquet", [*prompts, prompts[0]])
    # One dialogue was trained on: its opening, not the prompts themselves.
    write_prompts(root / "data" / "prompts_train.parquet", [[*prompts[4], {"role": "assistant", "content": "dull"}]])
    set_config(root, "near_duplicate: 1.0")
    report = compare(root)
    assert report["settings"]["near_training"] == 2
    assert any("2 of 32 prompts are near duplicates of training prompts" in warning for warning in report["warnings"])
    assert (report["settings"]["n_prompts"], report["settings"]["units"]) == (32, 16)
    assert any("32 prompts are 16 units of evidence" in warning for warning in report["warnings"])
    assert any("1 held-out prompts stood there twice" in warning for warning in report["warnings"])
    assert {entry["units"] for entry in report["win_rates"] if entry["policy"] != entry["versus"]} == {16}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tuning: {sft: {settings: 2}}", r"compare\.tuning\.sft"),
        ("tuning: {ppo: {chosen_on: test}}", "chosen_on one of fixed, validation, heldout"),
        ("tuning: {ppo: {settings: 0}}", r"compare\.tuning\.ppo"),
        ("delta: 0.7", r"compare\.delta is 0\.7"),
        ("near_duplicate: 0", r"compare\.near_duplicate is 0"),
    ],
)
def test_settings_that_cannot_be_meant(run, tmp_path, word_tokenizer, setting, message):
    root = make_run(tmp_path / "run", word_tokenizer)
    set_config(root, setting)
    with pytest.raises(UserError, match=message):
        compare(root)


def test_several_seeds_near_the_reference(run, tmp_path):
    """Reweighted in every run, over seeds and prompts together; prompts that runs share count once."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("seed: 3", "seed: 9"))
    compare(other)
    runs = [load(run), load(other)]
    report = check_schema(pool(runs, Settings()))
    entry = next(e for e in report["win_rates"] if (e["policy"], e["versus"], e["judge"]) == ("ppo", "dpo", "gold"))
    assert entry["test"] == "reweighted"
    assert entry["raw"]["test"] == "seeds and prompts"
    single = [
        next(e for e in one.report["win_rates"] if (e["policy"], e["versus"], e["judge"]) == ("ppo", "dpo", "gold"))
        for one in runs
    ]
    assert entry["per_seed"] == pytest.approx([one["win_rate"] for one in single], abs=1e-9)
    assert entry["n"] == entry["units"] == 48
    assert abs(entry["ci"][0] - 0.5) <= entry["allowed"]["at_most"] + 1e-12
    assert "these two PPO runs" in report["verdict"][0].lower().replace("ppo", "PPO")
