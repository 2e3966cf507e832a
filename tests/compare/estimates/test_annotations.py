"""Judgements made elsewhere: AlpacaEval's own figures, and files that are not as tidy as its own."""

import csv
import gzip
import json

import numpy as np
import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.compare.estimates.annotations.__main__ import main
from ppo_vs_dpo.compare.estimates.annotations.figures import chosen_first, difficulties, statistics_of
from ppo_vs_dpo.compare.estimates.annotations.reading import load_annotations, models_in, turned
from ppo_vs_dpo.compare.estimates.length_control import length_controlled
from ppo_vs_dpo.compare.statistics.rates import wilson


@pytest.mark.real_data
def test_alpaca_eval_leaderboard(real_data, capsys):
    """`python -m ppo_vs_dpo.compare.estimates.annotations` on published annotations gives the published figures."""
    folder = real_data / "alpaca_eval"
    reference = json.loads((folder / "reference.json").read_text())
    assert main([*map(str, sorted(folder.glob("*.json.gz"))), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert reference.keys() <= found.keys()
    for model, figures in reference.items():
        controlled = figures.pop("length_controlled_minimal")
        assert {key: found[model][key] for key in figures} == pytest.approx(figures, abs=1e-9)
        assert found[model]["length_controlled_minimal_win_rate"] == pytest.approx(controlled, abs=0.3)


def rows(*preferences):
    return [{"output_1": "a" * (i % 7), "output_2": "b", "preference": p} for i, p in enumerate(preferences)]


def test_draws_and_missing_verdicts():
    found = statistics_of(rows(1, 2, 0, 1.5, None, 1.4, "nan", 7))
    assert (found["n_wins"], found["n_wins_base"], found["n_draws"], found["n_total"]) == (1, 2, 2, 5)
    assert found["n_without_preference"] == 3
    assert found["discrete_win_rate"] == pytest.approx(100 * (1 + 0.5 * 2) / 5)
    assert found["length_controlled_minimal_win_rate"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no annotations"),
        ('[{"output_1": "x", "output_2": "y"}]', "entry 0: no preference"),
        ("{broken", "line 1: not valid JSON"),
        ('[{"output_1": "x", "output_2": "y", "preference": null}]', "none of 1 annotations"),
    ],
)
def test_bad_files_are_explained(tmp_path, content, message, capsys):
    path = tmp_path / "model.json"
    path.write_text(content)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_annotations(tmp_path / "none.json")
    (tmp_path / "torn.json.gz").write_bytes(b"\x1f\x8b\x08\x00aaaa")
    with pytest.raises(UserError, match="cannot be read"):
        load_annotations(tmp_path / "torn.json.gz")


def judged(model, preferences, baseline="gpt4", start=0):
    """Annotations of one model; output lengths vary."""
    return [
        {
            "instruction": f"q{start + i}",
            "output_1": "b" * (5 + i % 11),
            "generator_1": baseline,
            "output_2": "m" * (3 + i % 13),
            "generator_2": model,
            "preference": p,
        }
        for i, p in enumerate(preferences)
    ]


def swapped(row):
    """The same judgement as a file with the other order has it."""
    other = {"output_1": row["output_2"], "output_2": row["output_1"]}
    names = {"generator_1": row["generator_2"], "generator_2": row["generator_1"]}
    return {**row, **other, **names, "preference": 3 - row["preference"] if row["preference"] else row["preference"]}


def numbers(rows):
    """The figures that are single numbers."""
    return {key: value for key, value in statistics_of(rows).items() if not isinstance(value, list)}


def test_rows_in_the_other_order_are_turned_round():
    rng = np.random.default_rng(0)
    rows = judged("mine", [*rng.uniform(1, 2, 60).tolist(), 1.5, 0, None])
    mixed = [swapped(row) if i % 3 == 0 else row for i, row in enumerate(rows)]
    found = models_in(mixed, "annotations.json")
    assert list(found) == ["mine"]
    assert numbers(found["mine"]) == pytest.approx(numbers(rows), abs=1e-9)
    # The order drawn for each row, as judges do it: the file's name says which of the two is the model.
    half = [swapped(row) if i % 2 else row for i, row in enumerate(rows)]
    found = models_in(half[::-1], "mine.json.gz")
    assert numbers(found["mine"]) == pytest.approx(numbers(rows[::-1]), abs=1e-9)
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    assert statistics_of(shuffled)["win_rate"] == pytest.approx(statistics_of(rows)["win_rate"], abs=1e-12)


def test_several_models_in_one_file(tmp_path, capsys):
    rng = np.random.default_rng(1)
    one, two = judged("one", rng.uniform(1, 2, 40).tolist()), judged("two", rng.choice([1, 2, 1.5], 40).tolist())
    mixed = [row for pair in zip(one, two, strict=True) for row in pair]
    path = tmp_path / "both.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, mixed)).encode()))
    assert main([str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"one", "two"}
    for name, rows in (("one", one), ("two", two)):
        assert found[name]["win_rate"] == pytest.approx(statistics_of(rows)["win_rate"])
    again = tmp_path / "one.json"
    again.write_text(json.dumps(one))
    assert main([str(path), str(again)]) == 2
    assert "one was read already" in capsys.readouterr().err


def test_outputs_that_are_missing_cost_the_length_control_only():
    rows = judged("m", [1, 2, 1.25, 1.5] * 10)
    bare = [{"preference": row["preference"]} for row in rows]
    found = statistics_of(bare)
    assert found["win_rate"] == statistics_of(rows)["win_rate"]
    assert found["length_controlled_minimal_win_rate"] is None
    assert "lengths are not known" in found["length_controlled_note"]
    some = [{**row, "output_1": None} if i < 4 else row for i, row in enumerate(rows)]
    found = statistics_of(some)
    assert found["n_without_length"] == 4
    assert found["n_total"] == 40
    assert found["length_controlled_minimal_win_rate"] == pytest.approx(
        statistics_of(rows[4:])["length_controlled_minimal_win_rate"], abs=1e-9
    )


def test_weighted_preferences_and_one_row():
    found = statistics_of(judged("m", [1.2, 1.9, 1.50001, 1.49999]))
    assert found["win_rate"] == pytest.approx(100 * np.mean([0.2, 0.9, 0.50001, 0.49999]))
    assert (found["n_wins"], found["n_wins_base"], found["n_draws"]) == (2, 2, 0)
    assert found["discrete_win_rate"] == 50.0
    single = statistics_of(judged("m", [2.0]))
    assert single["win_rate"] == 100.0
    assert single["standard_error"] is None


def test_difficulty_comes_from_the_other_models(tmp_path, capsys):
    """An instruction on which every model does badly is hard; the third term then explains part of the verdicts."""
    rng = np.random.default_rng(0)
    hardness = rng.normal(size=300)
    models = {
        name: judged(name, (1 + (rng.random(300) < 1 / (1 + np.exp(hardness - skill)))).tolist())
        for name, skill in (("a", 0.5), ("b", 0.0), ("c", -0.5))
    }
    hard = difficulties(models)
    values = np.array([hard["a"][f"q{i}"] for i in range(300)])
    assert np.corrcoef(values, hardness)[0, 1] > 0.4
    assert values.mean() == pytest.approx(0, abs=1e-12)
    # Not from its own verdicts: other ones leave it as it is.
    changed = {**models, "a": [{**row, "preference": 1} for row in models["a"]]}
    assert difficulties(changed)["a"] == hard["a"]
    files = []
    for name, rows in models.items():
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(rows))
    assert main([*map(str, files), "--json", "--difficulty"]) == 0
    found = json.loads(capsys.readouterr().out)
    wins = np.array([row["preference"] - 1 for row in models["a"]])
    difference = np.array([len(row["output_2"]) - len(row["output_1"]) for row in models["a"]])
    by_hand = length_controlled(wins, difference, values, regularised=True)
    assert found["a"]["length_controlled_difficulty_win_rate"] == pytest.approx(100 * by_hand.win_rate)
    assert by_hand.psi < -0.2
    assert main([str(files[0]), "--difficulty"]) == 2
    assert "no other model was judged" in capsys.readouterr().err


def judged_csv(path, verdicts):
    """A file in the shape of N+'s ``eval/oai1b.csv_judged.csv``; texts with line breaks, quotes and commas."""
    columns = ["", "Unnamed: 0", "query", "postprocessed_response", "reference_responses", "explanation", "preferred"]
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow([*columns, "shuffled_index"])
        for number, (preferred, index) in enumerate(verdicts):
            post = f'SUBREDDIT: r/pets\n\nTITLE: "Llama", {number}\n\nTL;DR:'
            texts = [f"  ours {number}" + " more" * (number % 5), f"  reference {number}" + " and" * (number % 3)]
            writer.writerow([number, number, post, *texts, "Summary A is better", preferred, index])
    return path


def test_judgements_that_nplus_released(tmp_path, capsys):
    """30 wins of 40 that have a verdict; of these 30 for what was shown first (ours is, where the index is 0)."""
    verdicts = [("ours", 0)] * 25 + [("ours", 1)] * 5 + [("reference", 1)] * 5 + [("reference", 0)] * 5 + [("", 0)]
    path = judged_csv(tmp_path / "oai1b.csv_judged.csv", verdicts)
    assert main([str(path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out).values()
    assert (found["win_rate"], found["n_total"], found["n_without_preference"]) == (75.0, 40, 1)
    assert found["chosen_first"] == 75.0
    low, high = wilson(30, 40)
    assert found["chosen_first_wilson"] == pytest.approx([100 * low, 100 * high])
    assert found["length_controlled_minimal_win_rate"] is not None


def test_a_csv_of_something_else_is_named(tmp_path, capsys):
    path = tmp_path / "other.csv"
    path.write_text("query,preferred\na,ours\n")
    assert main([str(path)]) == 2
    assert "no postprocessed_response here" in capsys.readouterr().err
    (tmp_path / "empty.csv").write_text("")
    assert main([str(tmp_path / "empty.csv")]) == 2


def test_what_was_shown_first_turns_round_with_its_row():
    row = {"preference": 2.0, "shown_first": 2, "generator_1": "a", "generator_2": "b"}
    assert turned(row)["shown_first"] == 1
    assert chosen_first([row]) == chosen_first([turned(row)])
    assert chosen_first([{"preference": 2.0}]) == {}
