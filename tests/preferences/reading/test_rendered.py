"""Tools, tool calls and reasoning, written out by the chat template: all of it is in the tokens, or it is refused."""

import json

import pytest

from ppo_vs_dpo.artifacts.files import read_parquet
from ppo_vs_dpo.dpo.data import dpo_dataset
from ppo_vs_dpo.models.loading.pretrained import load_tokenizer
from ppo_vs_dpo.preferences.reading.importing import mapped
from ppo_vs_dpo.preferences.reading.inspect import arguments, inspect
from ppo_vs_dpo.preferences.reading.inspect.sequence import sequence_of
from ppo_vs_dpo.preferences.reading.mappings import MappingOptions
from ppo_vs_dpo.preferences.reading.mappings.rendered import Renderer
from ppo_vs_dpo.preferences.reading.readers import read_files
from ppo_vs_dpo.preferences.reading.validation import Checker, Report, policies
from ppo_vs_dpo.sft.data import sft_dataset
from tests.preferences.files import given, steps

# As Qwen's and Hermes' templates write them.
WHOLE = (
    "{% if tools %}[TOOLS]{% for t in tools %}{{ t | tojson }}{% endfor %}[/TOOLS]{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}</call>{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "zoo", "parameters": {"type": "object"}}}
ASK = [{"role": "user", "content": "What is a llama?"}]


def call(arguments, name="zoo"):
    return {"tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


def answer(text, **more):
    return [{"role": "assistant", "content": text, **more}]


ROWS = {
    "tool calls without words, arguments as JSON text": {
        "prompt": ASK,
        "chosen": answer(None, **call('{"animal": "llama"}')),
        "rejected": answer("", **call('{"animal": "car"}')),
        "tools": [TOOL],
    },
    "tool calls, tools as JSON text, nulls of Parquet": {
        "prompt": ASK,
        "chosen": answer("I look.", **call({"animal": "llama", "town": None})),
        "rejected": answer("I look.", **call({"animal": None, "town": "car"})),
        "tools": json.dumps([TOOL]),
    },
    "reasoning": {
        "prompt": ASK,
        "chosen": answer("An animal.", reasoning_content="It spits. llama"),
        "rejected": answer("A car.", reasoning="It drives. car"),
    },
    "ShareGPT's function calls": {
        "prompt": ASK,
        "chosen": [{"from": "function_call", "value": '{"name": "zoo", "arguments": {"animal": "llama"}}'}],
        "rejected": [{"from": "function_call", "value": '{"name": "zoo", "arguments": {"animal": "car"}}'}],
    },
    "a call and its result in the prompt": {
        "prompt": [*ASK, *answer("", **call({"animal": "llama"})), {"role": "tool", "content": "It spits."}],
        "chosen": answer("llama: an animal."),
        "rejected": answer("A car."),
        "tools": [TOOL],
    },
}


@pytest.fixture
def tokenizer(byte_model):
    tokenizer = load_tokenizer(byte_model)
    tokenizer.chat_template = WHOLE
    return tokenizer


def read(tmp_path, row, tokenizer=None):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    report = Report(str(path))
    options = MappingOptions(render=Renderer(tokenizer) if tokenizer else None)
    return [row for _, row in mapped(read_files(str(path)), report, Checker(report, policies()), options)], report


@pytest.mark.parametrize("name", ROWS)
def test_the_tokens_hold_all_of_it(name, tmp_path, tokenizer):
    (row,), report = read(tmp_path, ROWS[name], tokenizer)
    assert report.problems == {}
    sequence = sequence_of(tokenizer, row)["chosen"]
    text = "".join(sequence["tokens"])
    # The template's own text of the whole conversation, up to EOS.
    assert text == row["prompt"] + row["chosen"] + tokenizer.eos_token
    said = "llama" in row["chosen"]
    assert said
    assert "car" in row["rejected"]
    trained = "".join(t for t, loss in zip(sequence["tokens"], sequence["loss"], strict=True) if loss)
    assert trained == row["chosen"] + tokenizer.eos_token
    assert ("zoo" in text) == ("tools" in ROWS[name] or "call" in name)
    if "result" in name:
        assert "It spits." in row["prompt"]


@pytest.mark.parametrize("name", ROWS)
def test_without_rendering_it_is_refused_and_says_how(name, tmp_path):
    rows, report = read(tmp_path, ROWS[name])
    assert rows == []
    assert "data.rendered=true" in report.problems["not_text"].examples[0]["detail"]


@pytest.mark.parametrize(
    ("name", "written", "what"),
    [
        ("reasoning", "<think>{{ m.reasoning_content }}</think>", "the reasoning of chosen"),
        ("tool calls, tools as JSON text, nulls of Parquet", "{{ c.function.arguments | tojson }}", "argument"),
        ("tool calls, tools as JSON text, nulls of Parquet", "{{ t | tojson }}", "a tool of the prompt"),
        ("a call and its result in the prompt", "<call>{{ c.function.name }}", "a tool call of the prompt"),
    ],
)
def test_a_template_that_leaves_something_out_is_named(name, written, what, tmp_path, tokenizer):
    assert written in WHOLE
    tokenizer.chat_template = WHOLE.replace(written, "")
    rows, report = read(tmp_path, ROWS[name], tokenizer)
    assert rows == []
    assert what in report.problems["template"].examples[0]["detail"]


def test_what_cannot_be_written_out_is_refused(tmp_path, tokenizer):
    turns = [*answer("a"), {"role": "tool", "content": "b"}, *answer("c")]
    rows, report = read(tmp_path, {"prompt": ASK, "chosen": turns, "rejected": answer("d")}, tokenizer)
    assert (rows, list(report.problems)) == ([], ["not_text"])
    rows, report = read(
        tmp_path, {"prompt": ASK, "chosen": answer("", **call("[1")), "rejected": answer("d")}, tokenizer
    )
    assert (rows, list(report.problems)) == ([], ["wrong_type"])
    picture = [{"type": "image", "url": "x"}]
    rows, report = read(tmp_path, {"prompt": ASK, "chosen": answer(picture), "rejected": answer("d")}, tokenizer)
    assert (rows, list(report.problems)) == ([], ["not_text"])


def test_data_inspect_shows_it(tmp_path, byte_model, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROWS["reasoning"]) + "\n")
    report, first = inspect(
        arguments([str(path), "--model", str(tmp_path / "model"), "--rendered"]), lambda rows: None
    )
    assert report.problems == {}
    assert report.refused == []
    assert "It spits." in first["chosen"]
    assert "It spits." in "".join(report.sequence["chosen"]["tokens"])


def test_the_call_is_in_what_dpo_and_sft_train_on(tmp_path, tokenizer):
    """Through both steps of a run, to the token ids of the stages."""
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is number {i}?"}],
            "chosen": answer("", **call({"animal": f"llama {i}"})),
            "rejected": answer("", **call({"animal": f"car {i}"})),
            "tools": [TOOL],
        }
        for i in range(20)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = given(tmp_path, tmp_path / "model", path=str(tmp_path / "pairs.jsonl"), rendered=True)
    figures, _ = steps(folder)
    assert figures["problems"] == {}
    for row in dpo_dataset(folder / "pairs" / "train.parquet", tokenizer):
        prompt, chosen, rejected = (tokenizer.decode(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
        number = prompt.split("What is number ")[1].split("?")[0]
        assert prompt.startswith("[TOOLS]")
        assert chosen == f'<call>zoo{{"animal": "llama {number}"}}</call>{tokenizer.eos_token}'
        assert rejected == f'<call>zoo{{"animal": "car {number}"}}</call>{tokenizer.eos_token}'
    examples = read_parquet(folder / "data" / "sft_train.parquet")
    for row in sft_dataset(examples, tokenizer, None, None, None):
        assert "".join(tokenizer.decode([i]) for i in row["labels"] if i != -100).startswith(
            '<call>zoo{"animal": "llama '
        )
