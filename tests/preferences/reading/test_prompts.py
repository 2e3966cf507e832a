"""Prompts and SFT examples in the shapes that people have."""

import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.preferences.reading.mappings import UnmappableError
from ppo_vs_dpo.preferences.reading.prompts import prompt_of, read_examples, read_prompts
from tests.preferences.conftest import make_run, run_here
from tests.preferences.files import write_jsonl
from tests.preferences.reading.shapes_public import turns

USER = turns("Hi")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi"}, "Hi"),
        ({"prompt": None, "question": "Hi"}, "Hi"),
        ({"messages": turns("Hi", "Hello.")}, USER),
        ({"conversations": turns("Hi", "Hello.", roles=("human", "gpt"), names=("from", "value"))}, USER),
        ({"prompt": str(USER)}, USER),
        ({"instruction": "Translate.", "input": "Lama", "output": "Llama"}, "Translate.\nLama"),
        ({"instruction": "Say hi.", "input": "", "output": "Hi"}, "Say hi."),
        ({"system": "Be brief.", "prompt": "Hi"}, [{"role": "system", "content": "Be brief."}, *USER]),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello."}, USER),
    ],
)
def test_the_prompt_of_a_row(row, prompt):
    assert prompt_of(row) == prompt


def test_what_is_no_prompt_is_named():
    with pytest.raises(UnmappableError, match="no prompt"):
        prompt_of({"answer": "x"})
    with pytest.raises(UnmappableError, match="tool_calls"):
        prompt_of({"messages": [{"role": "user", "content": "Hi", "tool_calls": [{"x": 1}]}]})


def test_a_dialogue_as_a_prompt_becomes_its_turns(tmp_path):
    rows = [{"prompt": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:"}]
    path = str(write_jsonl(tmp_path / "x.jsonl", rows))
    assert list(read_prompts(path, conversational=True)) == [turns("Hi", "Hello.", "And?")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": " Hello."},
        {"prompt": USER, "completion": "Hello."},
        {"messages": turns("Hi", "Hello.")},
        {"conversations": turns("Hi", "Hello.", roles=("human", "gpt"), names=("from", "value"))},
        {"instruction": "Hi", "input": "", "output": "Hello."},
    ],
)
def test_sft_examples(tmp_path, row):
    path = str(write_jsonl(tmp_path / "x.jsonl", [row]))
    assert list(read_examples(path, conversational=True)) == [(USER, turns("Hi", "Hello.")[1:])]


def test_examples_that_do_not_end_with_the_assistant_are_named(tmp_path):
    path = str(write_jsonl(tmp_path / "x.jsonl", [{"messages": USER}]))
    with pytest.raises(UserError, match=r"x\.jsonl, line 1: messages does not end with the assistant's words"):
        list(read_examples(path, conversational=True))
    path = str(write_jsonl(tmp_path / "y.jsonl", [{"prompt": "Hi", "completion": turns("Hello.")}]))
    with pytest.raises(UserError, match="begin and end with the assistant's words"):
        list(read_examples(path, conversational=True))


def test_text_prompts_for_a_chat_model_stop_too(tmp_path, byte_model, plain_model):
    """The sources that make their pairs from prompts: rejection sampling, constitutions."""
    path = str(write_jsonl(tmp_path / "x.jsonl", [{"prompt": f"Question {n}?"} for n in range(20)]))
    data = {
        "source": "rejection",
        "prompts_path": path,
        **{"train_prompts": 10, "test_prompts": 2, "heldout_prompts": 2},
        "gold": "ppo_vs_dpo.preferences.testbed.gold:gold_reward",
    }
    with pytest.raises(UserError, match=r"(?s)x\.jsonl: plain text.*conversational=true.*conversational=false"):
        run_here(make_run(tmp_path / "a", data, model={"path": str(byte_model)}), "data")
    run_here(make_run(tmp_path / "b", {**data, "conversational": True}, model={"path": str(byte_model)}), "data")
    run_here(make_run(tmp_path / "c", data, model={"path": str(plain_model)}), "data")
