"""The testbed's two steps as real processes."""

import math

import pytest
import yaml
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_parquet
from ppo_vs_dpo.preferences.config import DataConfig, ReviewTestbed, data_settings
from ppo_vs_dpo.preferences.recipes.bradley_terry import preference_probability
from ppo_vs_dpo.preferences.schema import pair_id, pair_set_hash, prompt_id
from ppo_vs_dpo.preferences.testbed import grammar
from ppo_vs_dpo.preferences.testbed.gold import gold_reward
from tests.preferences.conftest import ROOT, make_run, run_here, run_step, with_policy

SMALL = {
    "source": "testbed",
    "sft_examples": 300,
    "train_prompts": 250,
    "heldout_prompts": 64,
    "pairs": 260,
    "test_pairs": 100,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, testbed_policy):
    folder = make_run(tmp_path_factory.mktemp("runs") / "a", SMALL)
    assert run_step(folder, "data").returncode == 0
    with_policy(folder, testbed_policy)
    done = run_step(folder, "pairs")
    assert done.returncode == 0, done.stderr
    return folder


def test_data_step_writes_what_the_stages_read(run):
    sft = read_parquet(run / "data" / "sft_train.parquet", ["prompt", "completion"])
    train = read_parquet(run / "data" / "prompts_train.parquet", ["prompt", "prompt_id"])
    heldout = read_parquet(run / "data" / "prompts_heldout.parquet", ["prompt", "prompt_id"])
    assert (len(sft), len(train), len(heldout)) == (300, 250, 64)
    assert train["prompt_id"][:] == [prompt_id(prompt) for prompt in train["prompt"]]
    assert not set(heldout["prompt"]) & (set(train["prompt"]) | set(sft["prompt"]))
    tokenizer = AutoTokenizer.from_pretrained(run / "data" / "tokenizer")
    text = sft["prompt"][0] + sft["completion"][0]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_pairs_follow_the_schema_and_their_own_prompts(run):
    train = read_parquet(run / "pairs" / "train.parquet", ["prompt", "chosen", "rejected", "prompt_id", "pair_id"])
    test = read_parquet(run / "pairs" / "test.parquet")
    heldout = set(read_parquet(run / "data" / "prompts_heldout.parquet")["prompt"])
    assert not set(test["prompt"]) & set(train["prompt"])
    assert not heldout & (set(train["prompt"]) | set(test["prompt"]))
    assert {grammar.split_of(prompt) for prompt in test["prompt"]} == {"test"}
    for row in [*train, *test]:
        assert row["chosen"] != row["rejected"]
        assert row["chosen"].strip()
        assert row["rejected"].strip()
        assert row["pair_id"] == pair_id(row["prompt"], row["chosen"], row["rejected"])
        assert [row["chosen_score"], row["rejected_score"]] == gold_reward(
            [row["prompt"]] * 2, [row["chosen"], row["rejected"]]
        )


def test_pairs_figures(run):
    figures = read_json(run / "pairs" / "done.json")["figures"]
    train, test = (read_parquet(run / "pairs" / f"{split}.parquet") for split in ("train", "test"))
    assert figures["pair_set"] == {
        "hash": pair_set_hash({"train": train["pair_id"], "test": test["pair_id"]}),
        "n_train": len(train),
        "n_test": len(test),
    }
    assert len(train) + len(test) + figures["dropped"] == 360
    # The chosen side wins as often as Bradley-Terry says, over all pairs.
    p = preference_probability(train["chosen_score"], train["rejected_score"])
    better = sum(a > b for a, b in zip(train["chosen_score"], train["rejected_score"], strict=True)) / len(p)
    ceiling = figures["label_ceiling"]["train"]
    assert better == pytest.approx(ceiling, abs=4 * math.sqrt(ceiling * (1 - ceiling) / len(p)))
    assert 0.6 < ceiling < 0.95


def test_pairs_do_not_depend_on_the_batch_size_and_follow_the_seed(run, tmp_path, testbed_policy):
    original = read_json(run / "pairs" / "done.json")["figures"]["pair_set"]["hash"]
    hashes = {}
    for name, seed, batch in (("same", 1, 100), ("other", 2, 512)):
        folder = make_run(tmp_path / name, {**SMALL, "generation_batch_size": batch})
        config = OmegaConf.load(folder / "config.yaml")
        config.seed = seed
        OmegaConf.save(config, folder / "config.yaml")
        run_here(folder, "data")
        with_policy(folder, testbed_policy)
        run_here(folder, "pairs")
        hashes[name] = read_json(folder / "pairs" / "done.json")["figures"]["pair_set"]["hash"]
    assert hashes["same"] == original
    assert hashes["other"] != original


def test_equal_samples_are_drawn_again_and_at_last_dropped(tmp_path, testbed_policy):
    """At hardly any temperature every sample of a prompt is the same text; at a low one it often is."""
    small = {**SMALL, "pairs": 20, "test_pairs": 10}
    folder = with_policy(make_run(tmp_path / "cold", {**small, "temperature": 1e-6}), testbed_policy)
    run_here(folder, "data")
    with pytest.raises(UserError, match=r"no pair for any of 20 prompts.*raise data\.temperature \(1e-06\)"):
        run_here(folder, "pairs")
    assert not (folder / "pairs" / "done.json").exists()

    folder = with_policy(make_run(tmp_path / "cool", {**small, "temperature": 0.01}), testbed_policy)
    run_here(folder, "data")
    run_here(folder, "pairs")
    figures = read_json(folder / "pairs" / "done.json")["figures"]
    assert figures["redrawn"] > 0
    assert figures["dropped"] > 0
    assert figures["pair_set"]["n_train"] + figures["pair_set"]["n_test"] + figures["dropped"] == 30


def test_pairs_before_sft_is_an_error(tmp_path):
    folder = make_run(tmp_path / "early", SMALL)
    with pytest.raises(UserError, match=r"stage sft of .* has not finished"):
        run_here(folder, "pairs")


def test_settings_report_every_problem_at_once():
    with pytest.raises(UserError) as error:
        data_settings({"source": "testbed", "train_promts": 5, "pairs": "many"})
    assert "data.train_promts: no such key. Did you mean train_prompts?" in str(error.value)
    assert "data.pairs" in str(error.value)
    with pytest.raises(UserError, match="Did you mean testbed"):
        data_settings({"source": "testbad"})
    with pytest.raises(UserError, match="at least 1"):
        data_settings({"source": "testbed", "pairs": 0})


def test_the_yaml_file_has_every_key_with_a_comment_and_the_defaults():
    text = (ROOT / "configs" / "data" / "testbed.yaml").read_text()
    assert yaml.safe_load(text) == vars(ReviewTestbed())
    lines = text.splitlines()
    assert all(lines[i - 1].startswith("#") for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert set(ReviewTestbed.__dataclass_fields__) <= set(DataConfig.__dataclass_fields__)
