"""The source ``rejection`` through its two steps: pairs, best-of-n examples, resuming, memory."""

import json

import numpy as np
import pytest
import yaml
from datasets import Dataset

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_parquet
from ppo_vs_dpo.preferences.config import SOURCES
from ppo_vs_dpo.preferences.recipes.steplog import StepLog
from ppo_vs_dpo.preferences.rejection.samples import sample_and_score
from ppo_vs_dpo.preferences.schema import prompt_id
from ppo_vs_dpo.preferences.testbed import grammar
from ppo_vs_dpo.preferences.testbed.gold import gold_reward
from tests.killed import killed_after
from tests.preferences.conftest import ROOT, log_of, make_run, run_here, with_policy

GOLD = "ppo_vs_dpo.preferences.testbed.gold:gold_reward"
SMALL = {
    "source": "rejection",
    "train_prompts": 60,
    "test_prompts": 20,
    "heldout_prompts": 20,
    "sft_examples": 100,
    "samples": 6,
    "gold": GOLD,
    "prompts_per_step": 16,
}


def run_of(folder, policy, **data):
    run = with_policy(make_run(folder, {**SMALL, **data}), policy)
    run_here(run, "data")
    return run


def samples_of(run, split="train"):
    return [json.loads(line) for line in log_of(run, f"samples_{split}").read_text().splitlines()]


def test_best_against_worst_pairs_and_best_of_n_examples(tmp_path, testbed_policy):
    run = run_of(tmp_path / "run", testbed_policy)
    run_here(run, "pairs")
    figures = read_json(run / "pairs" / "done.json")["figures"]
    train = read_parquet(run / "pairs" / "train.parquet")
    samples = {row["prompt_id"]: row["samples"] for row in samples_of(run)}
    assert len(samples) == 60
    assert all(len(own) == 6 for own in samples.values())
    for row in train:
        scores = [s["score"] for s in samples[row["prompt_id"]] if s["finished"] and s["text"]]
        assert (row["chosen_score"], row["rejected_score"]) == (max(scores), min(scores))
        assert gold_reward([row["prompt"]], [row["chosen"]]) == [row["chosen_score"]]
    best = read_parquet(run / "pairs" / "best_of_n.parquet", ["prompt", "completion"])
    by_prompt = {row["prompt"]: row["chosen"] for row in train}
    assert all(by_prompt.get(row["prompt"], row["completion"]) == row["completion"] for row in best)
    assert figures["best_of_n"]["mean_score"] > figures["best_of_n"]["policy_mean_score"] + 1
    assert figures["pair_set"]["n_train"] == len(train)
    # The three kinds of prompts stay apart.
    test, heldout = (
        read_parquet(run / "pairs" / "test.parquet"),
        read_parquet(run / "data" / "prompts_heldout.parquet"),
    )
    for prompts, split in ((train["prompt"], "train"), (test["prompt"], "test"), (heldout["prompt"], "heldout")):
        assert {grammar.split_of(prompt) for prompt in prompts} == {split}


def test_rso_and_bradley_terry_from_the_command(tmp_path, testbed_policy):
    gaps = {}
    for rule, more in (("rso", {"rso_beta": 1.0}), ("bradley_terry", {}), ("best_vs_worst", {})):
        run = run_of(tmp_path / rule, testbed_policy, rule=rule, pairs_per_prompt=3, **more)
        run_here(run, "pairs")
        train = read_parquet(run / "pairs" / "train.parquet")
        assert len(train) > 60 if rule != "best_vs_worst" else len(train) <= 60
        assert all(row["chosen"] != row["rejected"] for row in train)
        gaps[rule] = np.mean(train["chosen_score"]) - np.mean(train["rejected_score"])
    assert gaps["best_vs_worst"] > gaps["rso"] > 0
    assert gaps["bradley_terry"] > 0


def test_samples_do_not_depend_on_how_many_prompts_a_step_has(tmp_path, testbed_policy):
    hashes = []
    for size in (16, 60):
        run = run_of(tmp_path / str(size), testbed_policy, prompts_per_step=size)
        run_here(run, "pairs")
        hashes.append(read_json(run / "pairs" / "done.json")["figures"]["pair_set"]["hash"])
    assert hashes[0] == hashes[1]


@pytest.mark.slow
def test_a_killed_run_goes_on_without_repeating_or_losing_a_prompt(tmp_path, testbed_policy):
    whole = run_of(tmp_path / "whole", testbed_policy, prompts_per_step=4)
    run_here(whole, "pairs")
    run = run_of(tmp_path / "killed", testbed_policy, prompts_per_step=4)
    appended = "ppo_vs_dpo.preferences.recipes.steplog.StepLog.append"
    killed_after(appended, 3, "ppo_vs_dpo.preferences", str(run), "--step", "pairs")
    assert not (run / "pairs" / "done.json").exists()
    log = log_of(run, "samples_train")
    before = log.read_bytes()
    assert 8 <= before.count(b"\n") < 60
    # And the last line torn, as a full disk leaves it.
    log.write_bytes(before[:-30])
    run_here(run, "pairs")
    after = log.read_bytes()
    assert after.startswith(before[:-30])
    ids = [row["prompt_id"] for row in StepLogView(log)]
    assert sorted(ids) == sorted(set(ids))
    assert len(ids) == 60
    figures = [read_json(item / "pairs" / "done.json")["figures"]["pair_set"] for item in (whole, run)]
    assert figures[0] == figures[1]


class StepLogView(StepLog):
    """Reads a log without asking what it was made from."""

    def __init__(self, path):
        self.path, self._file = path, None


def test_a_log_of_other_settings_is_started_anew(tmp_path):
    log = StepLog(tmp_path / "steps.jsonl", {"n": 1})
    log.append([{"a": 1}, {"a": 2}])
    assert list(StepLog(tmp_path / "steps.jsonl", {"n": 1})) == [{"a": 1}, {"a": 2}]
    assert list(StepLog(tmp_path / "steps.jsonl", {"n": 2})) == []
    assert list(StepLog(tmp_path / "steps.jsonl", {"n": 1})) == [{"a": 1}, {"a": 2}]  # and found again
    assert list(tmp_path.iterdir()) == [log.path]  # no other file can be lost, and these steps with it


def test_no_more_than_a_step_of_texts_is_held(tmp_path):
    """64 samples for 1,000 prompts, 32 MB of text: sampled, scored, paired and best-of-n within a tenth of that."""
    import tracemalloc

    from ppo_vs_dpo.artifacts.run import RunFolder
    from ppo_vs_dpo.artifacts.stage import StageContext
    from ppo_vs_dpo.preferences.config import RejectionSampling
    from ppo_vs_dpo.preferences.rejection.pairs import Counts, _write_best, _write_pairs

    asked = []

    class FakeSampler:
        def draw(self, prompts, ids, samples):
            asked.append(len(prompts) * samples)
            return [[{"text": f"{draw:02d}" * 250, "finished": True} for draw in range(samples)] for _ in prompts]

    prompts = ({"prompt": f"p{i}", "prompt_id": prompt_id(f"p{i}")} for i in range(1000))
    log = StepLog(tmp_path / "log.jsonl", "x")
    context = StageContext(RunFolder(make_run(tmp_path / "run", SMALL)), "pairs")
    tracemalloc.start()
    sample_and_score(prompts, log, FakeSampler(), lambda p, t, f: [float(x[:2]) for x in t], 64, 8)
    ids = _write_pairs(context, RejectionSampling(gold=GOLD, samples=64), "train", log, Counts())
    best = _write_best(context, log)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(asked) == 8 * 64
    assert sum(asked) == sum(len(row["samples"]) for row in log) == 64_000
    assert len(ids) == best["examples"] == 1000
    assert log.path.stat().st_size > 32e6
    assert most < 3.2e6


def test_an_earlier_run_lends_its_prompts_and_keeps_its_heldout_ones(tmp_path, testbed_policy):
    first = run_of(tmp_path / "first", testbed_policy)
    second = run_of(tmp_path / "second", testbed_policy, prompts_path=str(first), train_prompts=30)
    third = run_of(tmp_path / "third", testbed_policy, prompts_path=str(first / "data"), train_prompts=30)
    for name, count in (("train", 30), ("test", 20), ("heldout", 20)):
        same = [read_parquet(run / "data" / f"prompts_{name}.parquet")["prompt"][:] for run in (second, third)]
        assert same[0] == same[1]
        lent = read_parquet(first / "data" / f"prompts_{name}.parquet")["prompt"][:]
        assert read_parquet(second / "data" / f"prompts_{name}.parquet")["prompt"][:] == lent[:count]
    assert (second / "data" / "tokenizer" / "tokenizer.json").is_file()


def test_imdb_prefixes(tmp_path, testbed_policy):
    texts = [
        f"This film number {i} was rather long<br /><br />and I liked it a lot because of its plot." for i in range(90)
    ]
    Dataset.from_dict({"text": texts, "label": [1] * 90}).to_parquet(tmp_path / "imdb.parquet")
    sizes = {"train_prompts": 40, "test_prompts": 10, "heldout_prompts": 10, "sft_examples": 50}
    path = str(tmp_path / "imdb.parquet")
    run = make_run(tmp_path / "run", {**SMALL, **sizes, "prompts_path": path, "prefix_words": [4, 8]})
    run_here(run, "data")
    sft = read_parquet(run / "data" / "sft_train.parquet")
    heldout = read_parquet(run / "data" / "prompts_heldout.parquet")["prompt"][:]
    clean = {" ".join(text.replace("<br />", " ").split()) for text in texts}
    assert all(row["prompt"] + row["completion"] in clean for row in sft)
    assert all(4 <= len(prompt.split()) <= 8 for prompt in [*sft["prompt"], *heldout])
    assert not any((row["prompt"] + row["completion"]).startswith(tuple(heldout)) for row in sft)


def test_prompts_from_a_file_are_split_by_fingerprint(tmp_path, testbed_policy):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Prompt {i}?"}) + "\n" for i in range(50)) * 2)
    sizes = {"train_prompts": 30, "test_prompts": 10, "heldout_prompts": 10}
    run = make_run(tmp_path / "run", {**SMALL, **sizes, "prompts_path": str(path), "conversational": True})
    run_here(run, "data")
    found = {name: read_parquet(run / "data" / f"prompts_{name}.parquet") for name in ("train", "test", "heldout")}
    assert [len(rows) for rows in found.values()] == [30, 10, 10]
    assert len({identity for rows in found.values() for identity in rows["prompt_id"]}) == 50
    assert found["train"]["prompt"][0][0]["role"] == "user"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"rule": "best"}, r"data\.rule"),
        ({"samples": 1}, r"data\.samples"),
        ({"gold": None}, r"data\.reward_model or data\.gold"),
        ({"rso_beta": 0}, r"data\.rso_beta"),
        ({"prefix_words": [8, 2]}, r"data\.prefix_words"),
        ({"prompts_path": "nowhere.jsonl"}, "does not exist"),
    ],
)
def test_bad_settings(tmp_path, data, said):
    with pytest.raises(UserError, match=said):
        run_here(make_run(tmp_path / "run", {**SMALL, **data}), "data")


def test_a_scorer_that_is_not_there(tmp_path, testbed_policy):
    for more, said in (
        ({"reward_model": str(tmp_path), "scorer": "nowhere:Class"}, r"data\.scorer"),
        ({"reward_model": str(tmp_path / "nothing")}, "nothing does not exist"),
    ):
        run = run_of(tmp_path / said[:5].strip("."), testbed_policy, **more)
        with pytest.raises(UserError, match=said):
            run_here(run, "pairs")


def test_a_reward_model_scores(tmp_path, testbed_policy):
    import torch

    from ppo_vs_dpo.models.loading.pretrained import load_tokenizer, load_value_or_reward
    from ppo_vs_dpo.reward_model.scorer import RewardScorer

    torch.manual_seed(0)
    model = load_value_or_reward(testbed_policy)
    model.save_pretrained(tmp_path / "rm")
    load_tokenizer(testbed_policy).save_pretrained(tmp_path / "rm")
    run = run_of(tmp_path / "run", testbed_policy, gold=None, reward_model=str(tmp_path / "rm"))
    run_here(run, "pairs")
    row = samples_of(run)[0]
    texts, finished = ([sample[key] for sample in row["samples"]] for key in ("text", "finished"))
    expected = RewardScorer.load(tmp_path / "rm").score([row["prompt"]] * 6, texts, finished)
    assert [sample["score"] for sample in row["samples"]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["rejection", "constitution"])
def test_yaml_files_have_every_key_with_a_comment(name):
    text = (ROOT / "configs" / "data" / f"{name}.yaml").read_text()
    values = yaml.safe_load(text)
    cls = SOURCES[values["source"]]
    assert list(values) == list(cls.__dataclass_fields__)
    lines = text.splitlines()
    assert all(
        lines[i - 1].strip().startswith("#")
        for i, line in enumerate(lines)
        if line and not line.strip().startswith("#")
    )
