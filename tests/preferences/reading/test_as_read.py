"""What the model makes of pairs, before anything is trained: text for a chat model, marks, templates."""

import copy
import shutil

import pytest
from transformers import AutoTokenizer

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_parquet
from ppo_vs_dpo.models.text.chat_template import disagreement, is_rendered, left_out, marks_inside, marks_of
from tests.preferences.conftest import CHAT_TEMPLATE, run_here
from tests.preferences.files import ROWS, given, steps, write_jsonl


def chat(**texts):
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": roles[name], "content": text}] for name, text in texts.items()}


CHAT = [chat(**row) for row in ROWS]


@pytest.fixture(scope="module")
def tokenizer(byte_model):
    return AutoTokenizer.from_pretrained(byte_model)


def with_template(byte_model, tmp_path, template, eos=None):
    folder = tmp_path / "model"
    shutil.copytree(byte_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    if eos is not None:
        tokenizer.eos_token = eos
    tokenizer.save_pretrained(folder)
    return folder


def test_plain_text_for_a_chat_model_stops_and_says_both_remedies(tmp_path, byte_model, plain_model):
    path = str(write_jsonl(tmp_path / "pairs.jsonl", [{**row, "chosen": row["chosen"].strip()} for row in ROWS]))
    with pytest.raises(UserError) as error:
        run_here(given(tmp_path, byte_model, path=path), "data")
    said = str(error.value)
    for part in ("line 1", "'Question 0?Answer 0.'", "data.conversational=true", "data.conversational=false"):
        assert part in said
    as_text, as_chat = (
        given(tmp_path, byte_model, f"run{choice}", path=path, conversational=choice) for choice in (False, True)
    )
    assert steps(as_text)[0]["train_pairs"] == steps(as_chat)[0]["train_pairs"] == 48
    assert isinstance(read_parquet(as_text / "pairs" / "train.parquet")["prompt"][0], str)
    assert isinstance(read_parquet(as_chat / "pairs" / "train.parquet")["prompt"][0], list)
    # A model without a chat template continues texts: nothing to choose.
    assert steps(given(tmp_path, plain_model, "plain", path=path))[0]["train_pairs"] == 48


def test_text_that_the_template_rendered_is_used_as_it_is(tmp_path, byte_model, tokenizer):
    rows = [
        {
            "prompt": tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True),
            "chosen": row["chosen"][0]["content"] + "</s>",
            "rejected": row["rejected"][0]["content"] + "</s>",
        }
        for row in CHAT
    ]
    assert is_rendered(tokenizer, rows[0]["prompt"])
    assert not is_rendered(tokenizer, ROWS[0]["prompt"])
    folder = given(tmp_path, byte_model, path=str(write_jsonl(tmp_path / "rendered.jsonl", rows)))
    assert steps(folder)[0]["train_pairs"] == 48


def test_marks_inside_a_text_stop_with_their_place(tmp_path, byte_model, tokenizer):
    marks = marks_of(tokenizer)
    assert {"<s>", "</s>"} <= marks
    assert marks_inside(marks, " Hello</s>", answer=True) == []
    assert marks_inside(marks, " Hello</s> and more", answer=True) == ["</s>"]
    assert marks_inside(marks, "<s>[INST] Hi [/INST]") == []
    assert marks_inside(marks, [{"role": "user", "content": "<s>[INST] Hi [/INST]"}]) == ["<s>"]
    rows = [
        *CHAT,
        chat(prompt="<s>Question?", chosen="A", rejected="B"),
        chat(prompt="Q", chosen="A</s>B", rejected="B"),
    ]
    path = str(write_jsonl(tmp_path / "pairs.jsonl", rows))
    with pytest.raises(UserError, match=r"(?s)marks \(.*\): 2.*line 61: <s> in prompt.*line 62: </s> in chosen"):
        run_here(given(tmp_path, byte_model, path=path), "data")
    dropped = given(tmp_path, byte_model, "dropped", path=path, on_problem={"marks": "drop"})
    assert steps(dropped)[0]["problems"] == {"marks": 2}


def test_a_template_that_leaves_out_the_system_message_is_found(tmp_path, byte_model, tokenizer):
    silent = copy.deepcopy(tokenizer)
    silent.chat_template = CHAT_TEMPLATE.replace("%}<|{{", "%}{% if message['role'] != 'system' %}<|{{").replace(
        "<|end|>{% endfor %}", "<|end|>{% endif %}{% endfor %}"
    )
    system = [{"role": "system", "content": "Be brief."}, *CHAT[0]["prompt"]]
    assert left_out(silent, system) == ["system"]
    assert left_out(tokenizer, system) == []
    rows = [*CHAT[:20], {**CHAT[20], "prompt": system}]
    path = str(write_jsonl(tmp_path / "pairs.jsonl", rows))
    model = with_template(byte_model, tmp_path, silent.chat_template)
    with pytest.raises(UserError, match=r"(?s)template \(.*line 21: it leaves out what system says"):
        run_here(given(tmp_path, model, path=path), "data")


def test_a_template_that_refuses_a_later_row_is_found_before_training(tmp_path, byte_model):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    rows = [*CHAT, {**CHAT[3], "prompt": [{"role": "system", "content": "x"}, *CHAT[3]["prompt"]]}]
    path = str(write_jsonl(tmp_path / "pairs.jsonl", rows))
    with pytest.raises(UserError, match=r"line 61: the chat template refuses system, user \(no system\)"):
        run_here(given(tmp_path, with_template(byte_model, tmp_path, strict), path=path), "data")


def test_the_first_sequence_is_compared_with_the_templates(tmp_path, byte_model, tokenizer):
    prompt, answer = CHAT[0]["prompt"], CHAT[0]["chosen"]
    agreeing = copy.deepcopy(tokenizer)
    agreeing.chat_template = CHAT_TEMPLATE.replace("<|end|>", "</s>\n")
    assert disagreement(agreeing, prompt, answer) is None  # what stands after EOS does not count
    assert "ends an answer with '</s>'" in disagreement(tokenizer, prompt, answer)
    thinking = copy.deepcopy(agreeing)
    thinking.chat_template = agreeing.chat_template.replace(
        "{{ message['content'] }}",
        "{% if message['role'] == 'assistant' %}<think></think>{% endif %}{{ message['content'] }}",
    )
    assert "'<think></think>" in disagreement(thinking, prompt, answer)
    # The stage says it, and what was left out, in its figures: the command prints them.
    path = str(write_jsonl(tmp_path / "pairs.jsonl", [*CHAT, CHAT[7]]))
    folder = given(tmp_path, byte_model, path=path)
    steps(folder)
    said = read_json(folder / "data" / "done.json")["figures"]["warnings"]
    assert said[0].startswith("1 of 61 rows left out: duplicate (first: ")
    assert "ends an answer with '</s>'" in said[1]
