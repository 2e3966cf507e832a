"""Files as they are out there: public sets in their exact shape, and the ways in which people break them."""

import pytest

from ppo_vs_dpo.preferences.reading.importing import mapped
from ppo_vs_dpo.preferences.reading.mappings import MappingOptions
from ppo_vs_dpo.preferences.reading.readers import read_files
from ppo_vs_dpo.preferences.reading.validation import Checker, Report, policies
from ppo_vs_dpo.preferences.schema import OPTIONAL_NUMBERS
from tests.preferences.reading.shapes_broken import BROKEN
from tests.preferences.reading.shapes_public import PUBLIC


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


def test_there_are_enough_of_them():
    assert len(PUBLIC) >= 20
    assert len(BROKEN) >= 10
