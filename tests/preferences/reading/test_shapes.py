"""Files as they are out there: public sets in their exact shape, and the ways in which people break them."""

import pytest

from ppo_vs_dpo.preferences.reading.importing import mapped
from ppo_vs_dpo.preferences.reading.mappings import MappingOptions
from ppo_vs_dpo.preferences.reading.readers import read_files
from ppo_vs_dpo.preferences.reading.validation import Checker, Report, policies
from ppo_vs_dpo.preferences.schema import OPTIONAL_NUMBERS, OPTIONAL_TEXTS
from tests.preferences.reading.shapes_broken import BROKEN
from tests.preferences.reading.shapes_public import PUBLIC, RATED, lines


def read(tmp_path, ending, content, **options):
    path = tmp_path / f"pairs{ending}"
    path.write_text(content, encoding="utf-8")
    report = Report(str(path))
    checker = Checker(report, policies())
    return [row for _, row in mapped(read_files(str(path)), report, checker, MappingOptions(**options))], report


def as_written(text):
    return text if isinstance(text, str) else [{"role": role, "content": content} for role, content in text]


def check(row, pair):
    for side, text in zip(("prompt", "chosen", "rejected"), pair, strict=True):
        assert row[side] == as_written(text)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_set(tmp_path, name):
    ending, content, format, pair, numbers = PUBLIC[name]
    (row,), report = read(tmp_path, ending, content)
    assert report.format == format
    assert report.problems == {}
    check(row, pair)
    assert {name: row[name] for name in OPTIONAL_NUMBERS if name in row} == numbers


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_set_as_a_conversation_and_as_text(tmp_path, name):
    """In either form the question is the prompt's and the answer the assistant's."""
    ending, content, _, pair, _ = PUBLIC[name]
    (row,), _ = read(tmp_path, ending, content, conversational=True)
    assert row["prompt"][-1]["role"] == "user"
    assert [turn["role"] for turn in row["chosen"]] == ["assistant"]
    chosen = pair[1] if isinstance(pair[1], str) else pair[1][-1][1]
    assert row["chosen"][-1]["content"] == chosen.strip()
    (row,), _ = read(tmp_path, ending, content, conversational=False)
    assert isinstance(row["prompt"], str)
    assert row["chosen"].strip() == chosen.strip()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one(tmp_path, name):
    ending, content, expected = BROKEN[name]
    rows, report = read(tmp_path, ending, content)
    if len(expected) == 2:
        kind, words = expected
        assert rows == []
        assert list(report.problems) == [kind]
        assert words in report.problems[kind].examples[0]["detail"]
        return
    assert set(report.problems) <= {"several_turns"}
    check(rows[0], expected)
    assert not {"margin", "chosen_score"} & set(rows[0])


@pytest.mark.parametrize("name", ["system_prompt", "sys_message", "developer"])
def test_what_the_message_says_waves_a_column_through(tmp_path, name):
    """An empty name stands for the part, whatever its column is called."""
    content = lines({name: "Be brief.", "prompt": "Hi", "chosen": "Hello.", "rejected": "What?"})
    (row,), report = read(tmp_path, ".jsonl", content, columns={"system": ""})
    assert report.problems == {}
    check(row, ("Hi", "Hello.", "What?"))
    (row,), _ = read(tmp_path, ".jsonl", content, columns={"system": name})
    assert row["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_scores_that_say_the_opposite_are_counted(tmp_path):
    row = {"history": "Hi", "human_ref_A": "Hello.", "human_ref_B": "What?", "labels": 1, "score_A": 1, "score_B": 9}
    kept, report = read(tmp_path, ".jsonl", lines(row))
    assert len(kept) == 1
    assert report.problems["scores"].examples[0]["detail"] == "chosen_score 1, rejected_score 9"


def test_batch_and_policies_of_a_summary_are_kept(tmp_path):
    ending, content, *_ = PUBLIC["openai/summarize_from_feedback (comparisons)"]
    (row,), _ = read(tmp_path, ending, content)
    assert {name: row[name] for name in OPTIONAL_TEXTS} == {
        "batch": "batch3",
        "chosen_policy": "ref",
        "rejected_policy": "sup1",
    }


def test_ratings_that_make_no_pair_are_counted(tmp_path):
    rows = [RATED | {"response": text, "helpfulness": 3} for text in ("Fur.", "A hat.")]
    alone = RATED | {"prompt": "Name a river.", "response": "The Rhine.", "helpfulness": 4}
    kept, report = read(tmp_path, ".jsonl", lines(*rows, alone))
    assert kept == []
    assert report.rows == 3
    assert report.filtered == {"tie": 1, "one answer to a prompt: nothing to compare it with": 1}


def test_there_are_enough_of_them():
    assert len(PUBLIC) >= 20
    assert len(BROKEN) >= 10
