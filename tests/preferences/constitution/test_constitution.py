"""Constitutional AI: exactly, with a programmable critic and judge, and through the step as it is run."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_jsonl, read_parquet
from ppo_vs_dpo.preferences.constitution.asking import (
    CHOOSE,
    THINK,
    Item,
    Runner,
    all_steps,
    compare_samples,
    critique_and_revise,
    draw_principle,
    load_items,
    position_bias,
    preference_log_odds,
    question,
    soft_label,
)
from ppo_vs_dpo.preferences.constitution.endpoints import PREFILL, Answer, LocalModel, Request
from ppo_vs_dpo.preferences.constitution.pairs import why_not
from ppo_vs_dpo.preferences.constitution.principles import load_constitution, load_few_shot
from ppo_vs_dpo.preferences.recipes.steplog import StepLog
from ppo_vs_dpo.preferences.testbed import reviewer
from ppo_vs_dpo.preferences.testbed.gold import gold_reward
from ppo_vs_dpo.preferences.testbed.grammar import reviews
from tests.killed import killed_after
from tests.preferences.conftest import log_of, make_run, run_here, with_policy

CRITIC = {"kind": "python", "function": "ppo_vs_dpo.preferences.testbed.reviewer:critic"}
JUDGE = {"kind": "python", "function": "ppo_vs_dpo.preferences.testbed.reviewer:judge"}
SMALL = {
    "source": "constitution",
    "constitution": "testbed",
    "critic": CRITIC,
    "judge": JUDGE,
    "rounds": 3,
    "train_prompts": 60,
    "test_prompts": 12,
    "heldout_prompts": 12,
    "sft_examples": 100,
    "batch": 16,
}


def run_of(folder, policy, **data):
    run = with_policy(make_run(folder, {**SMALL, **data}), policy)
    run_here(run, "data")
    return run


# --- constitutions -------------------------------------------------------------------------------------------------
def test_our_constitutions_load_and_every_principle_is_whole():
    for name in ("default", "testbed"):
        principles = load_constitution(name)
        assert len(principles) >= 3
        assert all(p.critique and p.revision and p.choice for p in principles)


@pytest.mark.real_data
def test_the_papers_constitution_and_examples_load(real_data):
    principles = load_constitution(str(real_data / "constitution" / "CritiqueRevisionInstructions.json"))
    assert [p.id for p in principles] == [f"harmful{number}" for number in range(16)]
    assert principles[0].critique.startswith("Identify specific ways")
    assert principles[0].revision.startswith("Please rewrite the assistant response")
    assert not any(
        mark in p.critique + p.revision for p in principles for mark in ("Request:", "Critique:", "Revision:")
    )
    messages = load_few_shot(str(real_data / "constitution" / "CritiqueRevisionFewShotPrompts.json"))
    roles = [message["role"] for message in messages]
    assert roles[0] == "user"
    assert roles[-1] == "assistant"
    assert all(a != b for a, b in itertools.pairwise(roles))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "- id: x\n  critique: c\n  revision: r\n", "principle 1: no choice"),
        ("b.yaml", "[]", "no principle"),
        ("c.yaml", "- {id: x, critique: c, revision: r, choice: d}\n" * 2, "x twice"),
        ("d.json", "{", "cannot be read"),
        ("e.json", '{"x": {"prompt": ["c"]}}', "x: needs prompt and edit_request"),
        ("f.yaml", "just text", "list of principles"),
    ],
)
def test_broken_constitutions(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        load_constitution(str(tmp_path / name))


def test_an_unknown_constitution_lists_ours():
    with pytest.raises(UserError, match=r"nothing\.yaml does not exist.*default, testbed"):
        load_constitution("nothing")


# --- exact laws ----------------------------------------------------------------------------------------------------
def test_principles_are_drawn_uniformly_and_the_same_again():
    principles = load_constitution("default")
    drawn = [draw_principle(principles, 1, f"prompt{i}", "critique", 1).id for i in range(4000)]
    counts = Counter(drawn)
    assert chisquare([counts[p.id] for p in principles]).pvalue > 1e-3
    assert drawn[:100] == [draw_principle(principles, 1, f"prompt{i}", "critique", 1).id for i in range(100)]
    assert drawn != [draw_principle(principles, 1, f"prompt{i}", "critique", 2).id for i in range(4000)]


def test_position_bias_cancels_in_logit_space_and_not_in_probabilities():
    """papers.md M8: averaging the log-odds removes an injected bias exactly; averaging probabilities does not."""
    rng = np.random.default_rng(0)
    for strength, bias in rng.normal(scale=2, size=(100, 2)):
        first, second = strength + bias, -strength + bias
        assert preference_log_odds(first, second) == pytest.approx(strength, abs=1e-12)
        assert position_bias(first, second) == pytest.approx(bias, abs=1e-12)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    averaged = (sigmoid(0.7 + 0.9) + 1 - sigmoid(-0.7 + 0.9)) / 2
    assert abs(averaged - sigmoid(0.7)) > 0.01
    assert preference_log_odds(-1.6, 0.2) == -preference_log_odds(0.2, -1.6)
    assert soft_label(0.7) == soft_label(-0.7) == pytest.approx(sigmoid(0.7), abs=1e-15)
    assert soft_label(0.0) == 0.5


def test_one_revision_mends_one_thing_and_breaks_nothing():
    """Over grammar reviews and every principle: violations never increase; enough rounds leave next to none."""
    left = Counter()
    for _, text in reviews(7, 400):
        before = reviewer.violations(text)
        for name in reviewer.FINDERS:
            revised = reviewer.mend(text, name)
            after = reviewer.violations(revised)
            assert all(after[key] <= before[key] for key in reviewer.FINDERS), (text, revised)
            if revised != text:
                assert after[name] < before[name]
        for _ in range(12):
            for name in reviewer.FINDERS:
                text = reviewer.mend(text, name)
        left += reviewer.violations(text)
    # "avoid" cannot become "recommend" where the review has that word already; nothing else is left.
    assert sum(left.values()) <= 0.02 * 400


def test_violations_never_increase_over_the_rounds_of_the_real_loop(tmp_path):
    """The loop with the programmable critic: the texts that the log has, round after round."""
    rows = [{"prompt": prompt, "prompt_id": f"p{i}", "text": text} for i, (prompt, text) in enumerate(reviews(9, 60))]

    class Helper:
        def answer(self, requests):
            texts = {row["prompt"]: row["text"] for row in rows}
            for number, request in enumerate(requests):
                yield number, Answer(texts[request.conversation], True)

    log = StepLog(tmp_path / "steps.jsonl", "x")
    items = load_items(rows, log)
    critique_and_revise(items, Runner(log, 1, 32), Helper(), reviewer.critic(), load_constitution("testbed"), 20)
    totals = np.zeros(21)
    for item in items:
        texts = [item.text("answer", 0), *(item.text("revision", round) for round in range(1, 21))]
        counts = [sum(reviewer.violations(text).values()) for text in texts]
        assert counts == sorted(counts, reverse=True)
        totals += counts
    assert totals[0] > 50
    assert totals[-1] < 0.05 * totals[0]
    # Each step is in the log once, with the principle it was made under.
    steps = list(log)
    assert len(steps) == 60 * (1 + 2 * 20)
    assert len({(step["prompt_id"], step["what"], step["round"]) for step in steps}) == len(steps)
    assert all(step["principle"] for step in steps if step["what"] != "answer")


# --- filters -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("original", "revision", "finished", "reason"),
    [
        ("A good answer.", "A better answer.", True, None),
        ("A good answer.", "A  good answer. ", True, "unchanged"),
        ("A good answer.", "", True, "empty"),
        ("A good answer.", "I'm sorry, but I can't help with that.", True, "refusal"),
        ("A good answer.", "I cannot do this.", True, "refusal"),
        ("A good answer.", "As an AI, I have no pens.", True, "refusal"),
        ("A good answer.", "I can help: use a pen.", True, None),
        ("A good answer.", "word " * 41, True, "runaway"),
        ("A good answer.", "A better ans", False, "runaway"),
    ],
)
def test_filters(original, revision, finished, reason):
    assert why_not({"text": original}, {"text": revision, "finished": finished}, max_growth=4.0) == reason


# --- through the step ----------------------------------------------------------------------------------------------
def test_revisions_become_pairs_with_provenance(tmp_path, testbed_policy):
    run = run_of(tmp_path / "run", testbed_policy)
    run_here(run, "pairs")
    figures = read_json(run / "pairs" / "done.json")["figures"]
    train = read_parquet(run / "pairs" / "train.parquet", ["prompt", "chosen", "rejected", "pair_id"])
    assert figures["pair_set"]["n_train"] == len(train) > 30
    provenance = {row["pair_id"]: row for row in read_jsonl(run / "pairs" / "provenance_train.jsonl")}
    assert set(provenance) == set(train["pair_id"])
    principles = {p.id for p in load_constitution("testbed")}
    for row in train:
        source = provenance[row["pair_id"]]
        assert source["kind"] == "revision"
        assert set(source["principles"]) <= principles
        assert len(source["principles"]) == 3
        assert source["revisions"][-1] == row["chosen"]
        assert sum(reviewer.violations(row["chosen"]).values()) < sum(reviewer.violations(row["rejected"]).values())
    # What the principles ask for is what gold pays for, here.
    gold = [np.mean(gold_reward(train["prompt"][:], train[side][:])) for side in ("chosen", "rejected")]
    assert gold[0] > gold[1] + 1
    counted = sum(sum(outcome.values()) for outcome in figures["principles"].values())
    assert counted == 60 + 12
    assert counted - sum(figures["left_out"].values()) == len(train) + figures["pair_set"]["n_test"]
    revisions = read_parquet(run / "pairs" / "revisions_train.parquet", ["prompt", "completion"])
    assert revisions["completion"][:] == train["chosen"][:]


def test_a_judge_with_a_position_bias_labels_as_one_without(tmp_path, testbed_policy):
    run = run_of(tmp_path / "run", testbed_policy, mode="feedback")
    run_here(run, "pairs")
    figures = read_json(run / "pairs" / "done.json")["figures"]
    train = read_parquet(run / "pairs" / "train.parquet")
    assert figures["position_bias"] == pytest.approx(0.7, abs=1e-9)
    for row in train:
        chosen, rejected = gold_reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert chosen > rejected
        assert row["soft_label"] == pytest.approx(1 / (1 + np.exp(rejected - chosen)), abs=1e-9)
    assert not (run / "pairs" / "revisions_train.parquet").exists()


def test_a_judge_that_reasons_first_is_clamped(tmp_path, testbed_policy):
    """Bai et al. 2022b, 4.1: probabilities after a chain of thought are kept to 40-60 %; the bias cancels before."""
    run = run_of(tmp_path / "run", testbed_policy, mode="feedback", chain_of_thought=True)
    run_here(run, "pairs")
    figures = read_json(run / "pairs" / "done.json")["figures"]
    assert figures["position_bias"] == pytest.approx(0.7, abs=1e-9)
    train = read_parquet(run / "pairs" / "train.parquet")
    provenance = {row["pair_id"]: row for row in read_jsonl(run / "pairs" / "provenance_train.jsonl")}
    labels = []
    for row in train:
        chosen, rejected = gold_reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert chosen > rejected
        assert row["soft_label"] == pytest.approx(min(0.6, 1 / (1 + np.exp(rejected - chosen))), abs=1e-9)
        labels.append(row["soft_label"])
        # What it thought, in both orders, is kept with the pair.
        first, second = provenance[row["pair_id"]]["reasoning"]
        assert f"{chosen:.2f}" in first
        assert f"{rejected:.2f}" in first
        assert first != second
    clamped = sum(label == 0.6 for label in labels)
    assert 0 < clamped < len(labels) <= 60
    assert clamped <= figures["clamped_labels"] <= clamped + 12  # and those of the test pairs
    # Two samples, two reasonings, two choices for each prompt, in that order, each once.
    steps = [(step["what"], step["round"]) for step in read_jsonl(log_of(run, "steps_train"))]
    assert set(steps) == set(all_steps("feedback", 1, chain_of_thought=True))
    order = [("sample", 0), ("sample", 1), ("reasoning", 0), ("choice", 0), ("reasoning", 1), ("choice", 1)]
    assert list(dict.fromkeys(steps)) == order
    # The limit can be another, or none.
    free = run_of(tmp_path / "free", testbed_policy, mode="feedback", chain_of_thought=True, label_clamp=1.0)
    run_here(free, "pairs")
    assert max(read_parquet(free / "pairs" / "train.parquet")["soft_label"]) > 0.9


def test_the_judge_chooses_with_its_reasoning_before_it(tmp_path):
    """What each model is given, step by step."""
    given = []

    class Helper:
        def answer(self, requests):
            given.extend(("answer", request.conversation) for request in requests)
            yield from (
                (number, Answer(f"sample {request.seed % 7919}", True)) for number, request in enumerate(requests)
            )

    class Judge:
        def answer(self, requests):
            given.extend(("reason", request.conversation) for request in requests)
            yield from ((number, Answer(f"thought {len(given)}", True)) for number, _ in enumerate(requests))

        def choose(self, questions):
            given.extend(("choose", question.conversation) for question in questions)
            yield from ((number, 1.0) for number, _ in enumerate(questions))

    log = StepLog(tmp_path / "steps.jsonl", "x")
    items = load_items([{"prompt": "Why?", "prompt_id": "p"}], log)
    principles = load_constitution("default")
    compare_samples(items, Runner(log, 1, 8), Helper(), Judge(), principles, True, "Be brief.")
    assert [kind for kind, _ in given] == ["answer", "answer", "reason", "choose", "reason", "choose"]
    # The system message is the helper's, not the judge's.
    assert given[0][1] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    for reason, choose, order in ((given[2][1], given[3][1], (0, 1)), (given[4][1], given[5][1], (1, 0))):
        first, second = (items[0].text("sample", draw) for draw in order)
        assert f"(A) {first}\n\n(B) {second}\n\n{THINK}" in reason[0]["content"]
        assert choose[:1] == reason
        assert choose[1]["content"].startswith("thought ")
        assert choose[2] == {"role": "user", "content": CHOOSE}


def test_a_system_message_is_not_part_of_the_pairs(tmp_path):
    seen = []

    class Model:
        def answer(self, requests):
            seen.extend(request.conversation for request in requests)
            yield from ((number, Answer(f"text {len(seen)}", True)) for number, _ in enumerate(requests))

    log = StepLog(tmp_path / "steps.jsonl", "x")
    items = load_items([{"prompt": "Why?", "prompt_id": "p"}], log)
    critique_and_revise(items, Runner(log, 1, 8), Model(), Model(), load_constitution("default"), 2, (), "Be brief.")
    assert len(seen) == 5
    assert all(conversation[0] == {"role": "system", "content": "Be brief."} for conversation in seen)
    assert items[0].prompt == "Why?"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"chain_of_thought": True}, r"data\.chain_of_thought is for the judge"),
        ({"mode": "feedback", "label_clamp": 0.5}, r"data\.label_clamp is 0\.5"),
        ({"mode": "feedback", "label_clamp": 1.2}, r"data\.label_clamp is 1\.2"),
        ({"mode": "revise"}, r"data\.mode is 'revise'"),
        ({"rounds": 0}, r"data\.rounds"),
    ],
)
def test_bad_settings(tmp_path, data, said):
    with pytest.raises(UserError, match=said):
        run_here(make_run(tmp_path / "run", {**SMALL, **data}), "data")


def test_both_modes_together(tmp_path, testbed_policy):
    run = run_of(tmp_path / "run", testbed_policy, mode="both", rounds=1)
    run_here(run, "pairs")
    kinds = Counter(row["kind"] for row in read_jsonl(run / "pairs" / "provenance_train.jsonl"))
    assert kinds["revision"] > 5
    assert kinds["feedback"] > 40
    assert len(read_parquet(run / "pairs" / "train.parquet")) == sum(kinds.values())


def test_a_killed_run_goes_on_without_repeating_or_losing_a_step(tmp_path, testbed_policy):
    whole = run_of(tmp_path / "whole", testbed_policy, batch=2)
    run_here(whole, "pairs")
    run = run_of(tmp_path / "killed", testbed_policy, batch=2)
    appended = "ppo_vs_dpo.preferences.recipes.steplog.StepLog.append"
    killed_after(appended, 75, "ppo_vs_dpo.preferences", str(run), "--step", "pairs")
    log = log_of(run, "steps_train")
    before = log.read_bytes()
    assert 75 <= before.count(b"\n") < 60 * 7
    run_here(run, "pairs")
    assert log.read_bytes().startswith(before)
    keys = [(step["prompt_id"], step["what"], step["round"]) for step in read_jsonl(log)]
    assert len(keys) == len(set(keys)) == 60 * 7
    pair_sets = [read_json(item / "pairs" / "done.json")["figures"]["pair_set"] for item in (whole, run)]
    assert pair_sets[0] == pair_sets[1]


def test_no_pair_at_all_is_an_error_that_says_why(tmp_path, testbed_policy):
    """A critic that never changes anything: the SFT policy asked to revise with a budget of one token."""
    run = run_of(tmp_path / "run", testbed_policy, critic={"kind": "local"}, max_new_tokens=1, rounds=1)
    with pytest.raises(UserError, match=r"no pair came out of 60 prompts; left out: \{.*(empty|runaway|unchanged)"):
        run_here(run, "pairs")


# --- a local model as judge ------------------------------------------------------------------------------------------
def test_local_choice_is_the_log_probability_of_the_two_letters(byte_model):
    import torch

    from ppo_vs_dpo.models.sampling.generation import SamplingConfig
    from ppo_vs_dpo.models.text.prompts import encode_prompt

    judge = LocalModel(str(byte_model), SamplingConfig(max_new_tokens=4))
    principle = load_constitution("default")[0]
    asked = [
        question("Hello?", principle, "one", "two"),
        question([{"role": "user", "content": "Hi"}], principle, "x", "y"),
    ]
    found = dict(judge.choose([Request(item, 0) for item in asked]))
    for number, item in enumerate(asked):
        ids = encode_prompt(judge.tokenizer, item) + judge.tokenizer(PREFILL, add_special_tokens=False)["input_ids"]
        logits = judge.model(torch.tensor([ids])).logits[0, -1]
        a, b = (judge.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB")
        assert found[number] == pytest.approx(float(logits[a] - logits[b]), abs=1e-5)


def test_a_base_model_gets_the_dialogue_as_text_and_stops_at_the_next_turn(plain_model):
    from ppo_vs_dpo.models.sampling.generation import SamplingConfig

    model = LocalModel(str(plain_model), SamplingConfig(max_new_tokens=5))
    conversation = [{"role": "user", "content": "Hi"}]
    expected = model.tokenizer("\n\nHuman: Hi\n\nAssistant:")["input_ids"]
    assert model._encode(conversation) == expected
    answers = dict(model.answer([Request(conversation, 1), Request("Hi", 2), Request("x" * 5000, 3)]))
    assert len(answers) == 3
    assert (answers[2].text, answers[2].finished) == ("", False)  # longer than the model's context
    chosen = dict(model.choose([Request("Hi", 1), Request("x" * 5000, 2), Request("Good day to you", 3)]))
    assert np.isnan(chosen[1])  # counted as "too long", not as a tie
    assert np.isfinite([chosen[0], chosen[2]]).all()


def test_items_keep_what_the_log_has():
    item = Item("p", "id", {("answer", 0): {"text": "a"}})
    assert item.text("answer", 0) == "a"


def test_the_reports_are_json(tmp_path, testbed_policy):
    run = run_of(tmp_path / "run", testbed_policy, rounds=1)
    run_here(run, "pairs")
    report = json.loads((run / "pairs" / "report.json").read_text())
    assert set(report) == {"left_out", "principles"}
