"""The reward model: Bradley-Terry's closed forms through TRL's trainer, where the score is read, bias, report."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl.trainer.reward_config import RewardConfig

import ppo_vs_dpo.reward_model.train as reward_model_train
from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_jsonl, read_parquet, write_json, write_parquet
from ppo_vs_dpo.models.loading.pretrained import load_tokenizer, load_value_or_reward
from ppo_vs_dpo.models.training import callbacks
from ppo_vs_dpo.preferences.recipes.bradley_terry import accuracy_ceiling, label_entropy, preference_probability
from ppo_vs_dpo.reward_model.data import reward_dataset
from ppo_vs_dpo.reward_model.report import build_report, scored_pairs, warnings, write_report
from ppo_vs_dpo.reward_model.scorer import RewardScorer, read_bias, store_bias
from ppo_vs_dpo.reward_model.train import build_trainer, initial_model, run_stage
from tests.sft.test_sft import InterruptAt, fails, without_time
from tests.sft.tiny_run import context_of, make_run, weights


@pytest.fixture
def base(tiny_llama, word_tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    word_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def arguments(folder, **settings):
    defaults = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    more = {
        "per_device_train_batch_size": 64,
        "disable_tqdm": True,
        "logging_steps": 50,
        "lr_scheduler_type": "constant",
    }
    return RewardConfig(str(folder), **{**defaults, **more, "save_strategy": "no", **settings})


def pairs_of(*sides, margin=None):
    """Pairs of two answers to one prompt; each side is (chosen, rejected, how often)."""
    rows = [{"prompt": "the film was", "chosen": a, "rejected": b} for a, b, n in sides for _ in range(n)]
    if margin is not None:
        rows = [{**row, "margin": margin} for row in rows]
    return Dataset.from_list(rows)


def trained_difference(base, tmp_path, pairs, use_margin=False, steps=150):
    """Train to convergence on the whole set; score(good) - score(bad)."""
    tokenizer = load_tokenizer(base)
    model = initial_model(base, None, "zero", 0)
    dataset = reward_dataset(pairs, tokenizer, use_margin=use_margin)
    trainer = build_trainer(model, tokenizer, dataset, arguments(tmp_path, max_steps=steps, learning_rate=1e-2))
    trainer.train()
    good, bad = RewardScorer(model, tokenizer).score(["the film was"] * 2, [" good", " bad"])
    return good - bad


def test_two_items(base, tmp_path):
    """papers.md 3.6.1: 30 wins against 10 give a difference of log 3 = 1.0986."""
    found = trained_difference(base, tmp_path, pairs_of((" good", " bad", 30), (" bad", " good", 10)))
    assert found == pytest.approx(math.log(3), abs=1e-3)


def test_two_items_with_a_margin(base, tmp_path):
    """papers.md 3.6.5 (Llama 2, eq. 2): rate 0.7 and margin 1 give 1.43086, not logit 0.7."""
    q, a = 0.7, math.exp(-1)
    expected = math.log(((2 * q - 1) + math.sqrt((2 * q - 1) ** 2 + 4 * q * (1 - q) * a * a)) / (2 * (1 - q) * a))
    assert expected == pytest.approx(1.43086, abs=1e-5)
    pairs = pairs_of((" good", " bad", 28), (" bad", " good", 12), margin=1.0)
    assert trained_difference(base, tmp_path, pairs, use_margin=True) == pytest.approx(expected, abs=1e-3)
    # The column alone changes nothing: it is used only where it is asked for.
    assert trained_difference(base, tmp_path, pairs) == pytest.approx(math.log(7 / 3), abs=1e-3)


def test_untrained_head_loses_log_two(base, tmp_path):
    """papers.md 3.6.4: r = 0 gives log 2, and the gradient with respect to the margin is -sigma(-0) = -1/2."""
    tokenizer = load_tokenizer(base)
    model = initial_model(base, None, "zero", 0)
    pairs = pairs_of((" good", " very very bad", 3), (" dull", " bad", 1))
    trainer = build_trainer(model, tokenizer, reward_dataset(pairs, tokenizer), arguments(tmp_path))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    model.train()
    loss = trainer.compute_loss(model, batch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    loss.backward()
    # d loss / d head = -1/2 times the mean difference of the states that are read.
    states = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    last = batch["attention_mask"].sum(-1) - 1
    chosen, rejected = states[torch.arange(8), last].chunk(2)
    torch.testing.assert_close(
        model.score.weight.grad, -0.5 * (chosen - rejected).mean(0, keepdim=True), atol=1e-6, rtol=0
    )


def test_normal_head(tiny_llama, tmp_path):
    """Huang et al. 2024, detail 11: N(0, 1/sqrt(d+1))."""
    tiny_llama(hidden_size=4096, intermediate_size=8, num_hidden_layers=0).save_pretrained(tmp_path)
    head = initial_model(tmp_path, None, "normal", 0).score.weight
    assert head.std().item() == pytest.approx(4097**-0.5, rel=0.05)
    assert torch.equal(head, initial_model(tmp_path, None, "normal", 0).score.weight)


def test_score_does_not_depend_on_padding_or_company(base):
    """papers.md 3.6.8: the same score alone, among longer rows, with any pad length on either side."""
    torch.manual_seed(0)
    scorer = RewardScorer(load_value_or_reward(base), load_tokenizer(base), batch_size=2)
    prompts = ["the film was", "a story", "the cast was not a", "bad"]
    answers = [" good", " very very very dull and bad", "", " bright"]
    finished = [True, False, True, True]
    together = scorer.score(prompts, answers, finished)
    alone = [scorer.score([p], [a], [f])[0] for p, a, f in zip(prompts, answers, finished, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    # EOS counts: a finished answer is read one token later.
    assert abs(scorer.score(["bad"], [" bright"], [False])[0] - alone[3]) > 1e-3


def test_padding_with_eos_trains_and_reads_the_same_token(base, tmp_path):
    """Pairs that differ in their end alone: only a score read at the last real token can tell them apart."""
    tokenizer = load_tokenizer(base)
    tokenizer.pad_token = tokenizer.eos_token
    model = initial_model(base, None, "zero", 0)
    model.config.pad_token_id = tokenizer.eos_token_id
    prompt, answer, eos = (
        tokenizer("the film was")["input_ids"],
        tokenizer(" good")["input_ids"],
        tokenizer.eos_token_id,
    )
    rows = [{"chosen_ids": [*prompt, *answer, eos], "rejected_ids": [*prompt, *answer]}] * 8
    # A longer row beside them, so that the finished ones are followed by padding that looks like their own end.
    rows += [{"chosen_ids": [*prompt, *answer * 4, eos], "rejected_ids": [*prompt, *answer * 4]}] * 8
    trainer = build_trainer(
        model, tokenizer, Dataset.from_list(rows), arguments(tmp_path, max_steps=40, learning_rate=1e-2)
    )
    trainer.train()
    scorer = RewardScorer(model, tokenizer)
    finished, cut = scorer.score(["the film was"] * 2, [" good"] * 2, [True, False])
    assert finished - cut > 2.0


def test_bias(base, tmp_path):
    """papers.md 3.6.6: the mean over samples is 0, differences stay as they are; the folder carries the bias."""
    torch.manual_seed(0)
    model, tokenizer = load_value_or_reward(base), load_tokenizer(base)
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    prompts, answers = ["the film was"] * 4, [" good", " bad", " very dull", ""]
    raw = RewardScorer.load(tmp_path / "rm").score(prompts, answers)
    assert read_bias(tmp_path / "rm") == 0.0
    store_bias(tmp_path / "rm", float(np.mean(raw)))
    scorer = RewardScorer.load(tmp_path / "rm")
    centred = scorer.score(prompts, answers)
    assert np.mean(centred) == pytest.approx(0, abs=1e-6)
    assert np.diff(centred) == pytest.approx(np.diff(raw), abs=1e-6)
    assert read_bias(base / "nowhere") == 0.0


def test_too_long_a_sample_is_named(base):
    scorer = RewardScorer(load_value_or_reward(base), load_tokenizer(base))
    with pytest.raises(
        UserError, match="sample 1: prompt and completion have 72 tokens, and the reward model takes 64"
    ):
        scorer.score(["the", "the"], [" good", " good" * 70])


def test_stage(word_tokenizer, tiny_llama, tmp_path):
    settings = {"max_steps": 40, "learning_rate": 1e-2, "label_noise": 0.0}
    run = make_run(tmp_path, word_tokenizer, tiny_llama(), reward_model=settings)
    run_stage(context_of(run, "reward_model"))
    report = read_json(run.path("reward_model", "report.json"))
    assert report["accuracy"] > 0.9
    assert report["ceiling"] == 1.0
    assert report["of_ceiling"] == pytest.approx(2 * report["accuracy"] - 1)
    assert sum(row["n"] for row in report["reliability"]) == report["test_pairs"] == 20
    assert report["gold_correlation"]["pearson"] > 0.8
    assert report["sft_samples"]["mean"] == pytest.approx(0, abs=1e-5)
    figures = run.done("reward_model")["figures"]
    assert figures["pair_set"]["hash"] == "abc"
    assert figures["accuracy"] == report["accuracy"]
    assert run.path("reward_model", "reliability.png").read_bytes()[:4] == b"\x89PNG"
    # Any loader of the scorer applies the bias; its figures are those of the report.
    scorer = RewardScorer.load(run.path("reward_model", "model"))
    assert scorer.bias == figures["score_bias"] != 0
    test = read_parquet(run.path("pairs", "test.parquet"))
    delta = scored_pairs(scorer, test, None, None)["delta"]
    assert np.mean(delta > 0) == pytest.approx(report["accuracy"])


def test_the_bias_is_of_the_scores_that_are_read(word_tokenizer, tiny_llama, tmp_path, monkeypatch):
    """Where padding is the end of a sequence, transformers reads a token earlier: the report does not."""
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.pad_token, tokenizer.unk_token = tokenizer.eos_token, None
    run = make_run(tmp_path, tokenizer, tiny_llama(pad_token_id=2), reward_model={"max_steps": 2, "samples": 8})
    seen, rows = {}, [[6, 7, 9, 2], [6, 2]]

    def spy(folder, scorer, **given):
        seen.update(bias=scorer.bias, raw=[score + scorer.bias for score in scorer.score_sequences(rows)])
        return write_report(folder, scorer, **given)

    monkeypatch.setattr(reward_model_train, "write_report", spy)
    run_stage(context_of(run, "reward_model"))
    saved = RewardScorer.load(run.path("reward_model", "model"))
    assert saved.tokenizer.pad_token_id == saved.tokenizer.eos_token_id == saved.model.config.pad_token_id
    assert saved.bias == seen["bias"]
    assert saved.score_sequences(rows) == pytest.approx([score - saved.bias for score in seen["raw"]], abs=1e-5)
    # The two readings do differ here.
    saved.foreign = True
    del saved.reader
    assert abs(saved.score_sequences(rows)[0] - (seen["raw"][0] - saved.bias)) > 1e-4


def test_a_model_that_was_trained_elsewhere(word_tokenizer, tiny_llama, tmp_path):
    """reward_model.path: no weight is trained or copied; the bias is this run's, the folder stays as it was."""
    model = LlamaForSequenceClassification(LlamaConfig(**{**tiny_llama().config.to_dict(), "num_labels": 1}))
    torch.manual_seed(5)
    torch.nn.init.normal_(model.score.weight)
    theirs = tmp_path / "theirs"
    model.save_pretrained(theirs)
    word_tokenizer.save_pretrained(theirs)
    (theirs / "README.md").write_text("theirs")
    before = {file.name: file.read_bytes() for file in theirs.iterdir()}
    run = make_run(tmp_path / "run", word_tokenizer, tiny_llama(), reward_model={"path": str(theirs)})
    run_stage(context_of(run, "reward_model"))
    assert {file.name: file.read_bytes() for file in theirs.iterdir()} == before
    saved = run.path("reward_model", "model")
    assert (saved / "model.safetensors").resolve() == (theirs / "model.safetensors").resolve()
    assert not (saved / "README.md").exists()
    figures = run.done("reward_model")["figures"]
    assert figures["given"] == str(theirs)
    assert 0 <= figures["accuracy"] <= 1
    ours, alone = RewardScorer.load(saved), RewardScorer.load(theirs)
    assert (alone.bias, ours.bias) == (0.0, figures["score_bias"])
    assert ours.score(["the film was"], [" good"])[0] == pytest.approx(
        alone.score(["the film was"], [" good"])[0] - ours.bias, abs=1e-6
    )
    wrong = make_run(tmp_path / "wrong", word_tokenizer, tiny_llama(), reward_model={"path": str(tmp_path / "gone")})
    with pytest.raises(UserError, match=r"reward_model\.path=.*gone: .* Give a folder, or a name on the Hub"):
        run_stage(context_of(wrong, "reward_model"))


def test_an_interrupted_run_ends_bit_for_bit_as_if_it_had_not_been(word_tokenizer, tiny_llama, tmp_path, monkeypatch):
    whole = make_run(tmp_path / "whole", word_tokenizer, tiny_llama())
    run_stage(context_of(whole, "reward_model"))
    cut = make_run(tmp_path / "cut", word_tokenizer, tiny_llama())
    with monkeypatch.context() as patch:
        patch.setattr(reward_model_train, "callbacks", lambda context: [*callbacks(context), InterruptAt(5)])
        with pytest.raises(KeyboardInterrupt):
            run_stage(context_of(cut, "reward_model"))
    run_stage(context_of(cut, "reward_model"))
    assert weights(cut.path("reward_model", "model")) == weights(whole.path("reward_model", "model"))
    assert read_json(cut.path("reward_model", "report.json")) == read_json(whole.path("reward_model", "report.json"))
    logs = [without_time(read_jsonl(run.path("reward_model", "metrics.jsonl"))) for run in (whole, cut)]
    assert logs[0][:-1] == logs[1][:-1]


def test_lora_on_conversations(word_tokenizer, tiny_llama, tmp_path):
    lora = {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    settings = {"lora": lora, "max_steps": 40, "learning_rate": 2e-2}
    run = make_run(tmp_path, word_tokenizer, tiny_llama(), conversational=True, reward_model=settings)
    run_stage(context_of(run, "reward_model"))
    assert run.done("reward_model")["figures"]["accuracy"] > 0.7
    merged = RewardScorer.load(run.path("reward_model", "model"))
    adapter = RewardScorer.load(run.path("reward_model", "adapter"))
    test = read_parquet(run.path("pairs", "test.parquet"))
    scores = [scorer.score(test["prompt"][:], test["chosen"][:]) for scorer in (merged, adapter)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    # A conversation is scored at the EOS of its answer, where the rollout ends.
    row = merged.encode(test["prompt"][:1], test["chosen"][:1])[0]
    assert row[-1] == word_tokenizer.eos_token_id
    assert row.count(word_tokenizer.eos_token_id) == 1


def test_messages_for_bad_input(word_tokenizer, tiny_llama, tmp_path):
    make = lambda name, **keys: make_run(tmp_path / name, word_tokenizer, tiny_llama(), reward_model=keys)  # noqa: E731
    stage = "reward_model"
    fails(make("head", head_init="ones"), run_stage, "must be zero or normal", stage)
    fails(make("noise", label_noise=0.7), run_stage, "must lie in [0, 0.5)", stage)
    fails(make("margin", use_margin=True), run_stage, "no column margin", stage)
    fails(make("key", sampels=3), run_stage, "reward_model.sampels: no such key. Did you mean samples?", stage)
    fails(make("short", max_length=2), run_stage, "Raise reward_model.max_length", stage)
    run = make("columns")
    write_parquet(run.path("pairs", "train.parquet"), [{"prompt": "the", "chosen": " good"}])
    fails(run, run_stage, "has no column rejected", stage)
    run = make("empty")
    write_parquet(run.path("pairs", "train.parquet"), {"prompt": [], "chosen": [], "rejected": []})
    fails(run, run_stage, "has no rows", stage)
    run = make("notest")
    write_parquet(run.path("pairs", "test.parquet"), {"prompt": [], "chosen": [], "rejected": []})
    fails(run, run_stage, "Hold some out", stage)
    run = make("nosft")
    run.path("sft", "done.json").unlink()
    fails(run, run_stage, "stage sft", stage)
    mute = copy.deepcopy(word_tokenizer)
    mute.chat_template = None
    run = make_run(tmp_path / "mute", mute, tiny_llama(), conversational=True)
    fails(run, run_stage, "has no chat template", stage)


def fake_test_set(n=400, signal=1.0, seed=0, gold_scale=2.0):
    """Scores = signal x gold + noise on made-up pairs labelled by Bradley-Terry."""
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=(2, n)) * gold_scale
    swap = rng.random(n) > preference_probability(*gold)
    gold[:, swap] = gold[::-1, swap]
    scores = signal * gold + rng.normal(size=(2, n)) * 0.3
    pairs = Dataset.from_dict({"pair_id": list(range(n)), "chosen_score": gold[0], "rejected_score": gold[1]})
    lengths = rng.integers(3, 20, size=(2, n))
    return {"delta": scores[0] - scores[1], "scores": scores, "lengths": lengths, "pairs": pairs}, gold


SAMPLES = {"scores": list(np.random.default_rng(1).normal(size=100)), "finished": [True] * 100}


def test_a_good_model_gets_no_warning():
    test, gold = fake_test_set()
    report = build_report(test, test["delta"], SAMPLES, labels_from_gold=True)
    p = preference_probability(*gold)
    assert report["ceiling"] == accuracy_ceiling(p)
    assert report["label_entropy"] == label_entropy(p)
    assert report["warnings"] == []
    assert report["margin"] == "gold_difference"
    # The share is that of fresh labels: with luck of its own it would not depend on which side was drawn as chosen.
    swapped = test["pairs"].rename_columns({"chosen_score": "rejected_score", "rejected_score": "chosen_score"})
    other = build_report({**test, "delta": -test["delta"], "pairs": swapped}, test["delta"], SAMPLES, True)
    assert other["of_ceiling"] == pytest.approx(report["of_ceiling"], abs=1e-12)
    assert other["accuracy"] == pytest.approx(1 - report["accuracy"], abs=1e-12)
    assert report["expected_accuracy"] == pytest.approx(report["accuracy"], abs=4 * 0.5 / 400**0.5)
    # The true rewards do as well as the labels allow.
    true = build_report({**test, "delta": gold[0] - gold[1]}, test["delta"], SAMPLES, labels_from_gold=True)
    assert true["of_ceiling"] == pytest.approx(1, abs=1e-12)
    assert true["loss"] == pytest.approx(report["label_entropy"], abs=0.05)
    assert true["ece"] < 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, s: {"test": {**t, "delta": -t["delta"]}}, "not better than a coin"),
        (
            lambda t, s: {
                "test": {**t, "delta": t["delta"] * (np.arange(400) % 4 != 0) - 9.0 * (np.arange(400) % 4 == 0)}
            },
            "of what the labels allow",
        ),
        (lambda t, s: {"test": {**t, "delta": np.abs(t["delta"]) + 1}}, "leaked into training"),
        (lambda t, s: {"test": {**t, "delta": t["delta"] * 40}}, "Overconfident"),
        (lambda t, s: {"test": {**t, "delta": t["delta"] * 0.05}}, "Underconfident"),
        (lambda t, s: {"train_delta": np.ones(400)}, "Over-fitted"),
        (lambda t, s: {"test": {**t, "lengths": t["scores"] * 10 + 100}}, "Scores go along with length"),
        (lambda t, s: {"test": {**t, "lengths": np.array([[9] * 400, [3] * 400])}}, "The longer answer is better"),
        (lambda t, s: {"samples": {**s, "scores": [0.5] * 100}}, "the same score"),
        (lambda t, s: {"samples": {**s, "finished": [False] * 100}}, "Only 0% of the SFT policy's samples end"),
        (lambda t, s: {"test": {**t, "scores": t["scores"][::-1]}}, "correlate with the gold reward by only"),
    ],
)
def test_each_fault_is_said_in_words(change, words):
    test, _ = fake_test_set()
    arguments = {"test": test, "train_delta": test["delta"], "samples": SAMPLES, "labels_from_gold": True}
    report = build_report(**{**arguments, **change(test, SAMPLES)})
    assert any(words in sentence for sentence in report["warnings"])


def test_accuracy_by_batch_and_by_policies():
    """Columns of TL;DR's comparisons; the pair of policies has no order; rows that do not say are left out."""
    test, _ = fake_test_set(n=6)
    right = [True, False, True, True, False, True]
    delta = np.where(right, 1.0, -1.0)
    batch = ["batch3", "batch3", "batch4", "batch4", "batch4", None]
    wrote = ["sup1", "ref", "sup1", "ref", "ref", "sup1"], ["ref", "sup1", "sup1", "sup1", None, "ref"]
    columns = {"batch": batch, "chosen_policy": wrote[0], "rejected_policy": wrote[1]}
    pairs = Dataset.from_dict({**test["pairs"].to_dict(), **columns})
    report = build_report({**test, "delta": delta, "pairs": pairs}, delta, SAMPLES, labels_from_gold=True)
    found = {name: (one["accuracy"], one["n"]) for name, one in report["by_batch"].items()}
    assert found == {"batch3": (0.5, 2), "batch4": (2 / 3, 3)}
    found = {name: (one["accuracy"], one["n"]) for name, one in report["by_policies"].items()}
    assert found == {"ref against sup1": (0.75, 4), "sup1 against sup1": (1.0, 1)}
    assert "by_batch" not in build_report(test, delta, SAMPLES, labels_from_gold=False)


def test_without_gold_the_ceiling_is_unknown_or_given():
    test, _ = fake_test_set(signal=0.1)
    bare = {**test, "pairs": test["pairs"].remove_columns(["chosen_score", "rejected_score"])}
    report = build_report(bare, test["delta"], SAMPLES, labels_from_gold=False)
    assert (report["ceiling"], report["of_ceiling"], report["gold_correlation"]) == (None, None, None)
    assert report["margin"] == "score_difference"
    assert build_report(bare, test["delta"], SAMPLES, False, label_noise=0.3)["ceiling"] == 0.7
    weak = {**report, "accuracy": 0.55, "accuracy_interval": [0.52, 0.58]}
    assert any("published reward models reach" in sentence for sentence in warnings(weak))
    margins = bare["pairs"].add_column("margin", list(range(400)))
    assert build_report({**bare, "pairs": margins}, test["delta"], SAMPLES, False)["margin"] == "margin"


def test_gold_scores_that_did_not_make_the_labels_set_no_ceiling(word_tokenizer, tiny_llama, tmp_path):
    """The pairs' done.json says whether labels were drawn from gold; scores of another kind are not probabilities."""
    run = make_run(tmp_path, word_tokenizer, tiny_llama())
    run_stage(context_of(run, "reward_model"))
    assert read_json(run.path("reward_model", "report.json"))["ceiling"] is None
    done = run.done("pairs")
    done["figures"]["label_ceiling"] = {"train": 0.9, "test": 0.9}
    write_json(run.path("pairs", "done.json"), done)
    run_stage(context_of(run, "reward_model"))
    report = json.loads(run.path("reward_model", "report.json").read_text())
    assert report["ceiling"] == pytest.approx(1 / (1 + math.exp(-2)))
