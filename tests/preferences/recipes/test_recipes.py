"""The two recipes from the command line, in miniature: pairs are made, the reward model and DPO train on them."""

import subprocess
from pathlib import Path

import pytest

from ppo_vs_dpo.artifacts.files import read_json, read_parquet
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.preferences.recipes.iterative_dpo import command, program
from tests.preferences.conftest import ROOT, make_run

SMALL = [
    "data.sft_examples=1500",
    "data.train_prompts=200",
    "data.test_prompts=60",
    "data.heldout_prompts=32",
    "sft.num_train_epochs=1",
    "reward_model.num_train_epochs=1",
    "dpo.num_train_epochs=1",
]


def run(*arguments, timeout=900):
    done = subprocess.run([*arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["constitution", "rejection"])
def test_a_recipe_feeds_the_reward_model_and_dpo(recipe, tmp_path):
    run(
        program(),
        f"experiment={recipe}",
        f"output_dir={tmp_path}",
        "stages=[data,sft,pairs,reward_model,dpo]",
        *SMALL,
    )
    folder = tmp_path / recipe
    pairs, reward_model, dpo = (read_json(folder / stage / "done.json") for stage in ("pairs", "reward_model", "dpo"))
    assert pairs["figures"]["pair_set"]["n_train"] == len(read_parquet(folder / "pairs" / "train.parquet")) > 100
    assert (folder / "reward_model" / "model" / "config.json").is_file()
    assert (folder / "dpo" / "model" / "config.json").is_file()
    hashes = {stage["figures"]["pair_set"]["hash"] for stage in (pairs, reward_model, dpo)}
    assert len(hashes) == 1


@pytest.mark.slow
def test_iterative_dpo_raises_the_reward_models_score(tmp_path):
    run(
        program(),
        "experiment=quickstart",
        "name=first",
        f"output_dir={tmp_path}",
        "stages=[data,sft,pairs,reward_model]",
        "data.sft_examples=3000",
        "data.train_prompts=1000",
        "data.pairs=1000",
        "data.test_pairs=200",
    )
    overrides = ["data.train_prompts=200", "data.test_prompts=30", "data.heldout_prompts=32", "dpo.num_train_epochs=1"]
    said = run(program(), "iterate", str(tmp_path / "first"), "--rounds", "1", *overrides)
    rows = read_json(tmp_path / "first-iterative-dpo.json")
    assert [row["round"] for row in rows] == [1, 2]
    assert rows[1]["mean_score"] > rows[0]["mean_score"] + 0.2
    assert rows[1]["policy"].endswith("first-round1/dpo/model")
    assert "DPO, round 1" in said
    # What the first run held out is still held out.
    for number in (1, 2):
        heldout = read_parquet(tmp_path / f"first-round{number}" / "data" / "prompts_heldout.parquet")["prompt"][:]
        assert heldout == read_parquet(tmp_path / "first" / "data" / "prompts_heldout.parquet")["prompt"][:32]


def test_rounds_follow_each_other_and_overrides_win(tmp_path):
    start = RunFolder(make_run(tmp_path / "first", {"source": "testbed"}))
    first, second, last = (command(start, number, 2, ["data.samples=16"]) for number in (1, 2, 3))
    assert f"model.path={tmp_path / 'first' / 'sft' / 'model'}" in first
    assert f"model.path={tmp_path / 'first-round1' / 'dpo' / 'model'}" in second
    assert f"data.reward_model={tmp_path / 'first' / 'reward_model' / 'model'}" in last
    assert "stages=[data,sft,pairs,dpo]" in second
    assert "stages=[data,sft,pairs]" in last
    assert first[-1] == "data.samples=16"
    assert not any(item.startswith("seed=") for item in command(start, 1, 2, ["seed=5"])[:-1])


def test_a_run_without_a_reward_model_is_refused(tmp_path):
    folder = make_run(tmp_path / "first", {"source": "testbed"})
    done = subprocess.run([program(), "iterate", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "stage data" in done.stderr
    assert "Traceback" not in done.stderr
    assert Path(folder).is_dir()
