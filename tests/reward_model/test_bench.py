"""RewardBench 2: credits, the formula of Ties by hand, rows that are not its own."""

import json
import math

import numpy as np
import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.reward_model.bench import credit, items_of, main, report, ties_score
from tests.pipeline.chat_model import save_chat_model


def test_credit_is_shared_by_those_at_the_top():
    wrong = np.array([0.0, 1.0, 2.0])
    assert credit(np.array([3.0]), wrong) == 1.0
    assert credit(np.array([2.0]), wrong) == 0.5
    assert credit(np.array([1.5]), wrong) == 0.0
    assert credit(np.array([0.0]), np.zeros(3)) == 0.25


def test_ties_by_hand():
    """Question 1: right within 1 of each other, 2 above the wrong ones; question 2: a wrong one in between."""
    ids = ["tied:1", "ref:1", "tied:2", "ref:2"]
    values = [([4.0, 5.0], [2.0, 1.0]), ([5.0], [4.5]), ([1.0, 3.0], [2.0]), ([3.0], [0.0])]
    found = ties_score(ids, [(np.array(a), np.array(b)) for a, b in values])
    # Spreads 1 and 2; gaps 2 and -1 (tied), 0.5 and 3 (ref); the lesser 0.5 and -1.
    margin = (math.tanh(0.5 / 1 - 1) + math.tanh(-1 / 2 - 1)) / 2
    assert found["tied_accuracy"] == 0.5
    assert found["ref_accuracy"] == 1.0
    assert (found["preferred"], found["preferred_hard"]) == (0.5, 0.0)
    assert found["margin"] == pytest.approx(margin, abs=1e-12)
    assert found["score"] == pytest.approx(0.3 * 0.5 + 0.3 + 0.2 * 0.5 + 0.01 * margin, abs=1e-12)


def test_ties_without_a_partner_are_named():
    one = [(np.array([1.0]), np.array([0.0]))]
    with pytest.raises(UserError, match="question 7 has only one"):
        ties_score(["tied:7"], one)
    with pytest.raises(UserError, match="neither tied:N nor ref:N"):
        ties_score(["7"], one)


def row(number, subset="Math", **more):
    answers = {"chosen": ["a" * (3 + number)], "rejected": ["b", "c", "dd"]}
    counts = {"num_correct": 1, "num_incorrect": 3, "total_completions": 4}
    return {
        "id": str(number),
        "prompt": f"What is {number}?",
        "subset": subset,
        "models": [],
        **answers,
        **counts,
        **more,
    }


def test_the_report_averages_over_subsets():
    items = [row(1), row(2), row(3, "Focus", chosen=["x"], rejected=["yyyy", "z", "z"])]
    found = report(items, lambda prompts, answers: [float(len(answer[0]["content"])) for answer in answers])
    assert found["subsets"]["Math"] == {"score": 1.0, "items": 2, "standard_error": 0.0}
    assert found["subsets"]["Focus"]["score"] == 0.0
    assert found["average"] == 0.5


def test_the_command_scores_with_a_real_model(tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification

    folder = save_chat_model(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.save_pretrained(folder)
    ties = [row(1, "Ties", id="tied:1", chosen=["a", "b"]), row(1, "Ties", id="ref:1")]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [row(n) for n in range(6)] + ties))
    capsys.readouterr()
    assert main([str(path), "--model", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["subsets"]) == {"Math", "Ties"}
    assert found["subsets"]["Math"]["items"] == 6
    # The margin of Ties reaches -1 and weighs 0.01.
    assert -0.01 <= found["average"] <= 1.01


def test_rows_of_something_else_are_named(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "subset": "Math", "chosen": "b", "rejected": ["c"]}) + "\n")
    with pytest.raises(UserError, match="line 1: RewardBench 2 needs chosen, a list"):
        items_of(str(path))
    assert main([str(path), "--model", "none"]) == 2
    assert "needs chosen" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows"):
        items_of(str(tmp_path / "empty.jsonl"))
