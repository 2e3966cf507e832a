"""Prompts that come as token ids, padded or not, and tokenizers that lack a token."""

import copy

import pytest
from datasets import Dataset

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.text.prompts import render_prompt
from ppo_vs_dpo.ppo.rollouts.prompts import PromptSet
from tests.ppo.conftest import PROMPTS, logs


def ids_of(word_tokenizer, side="left", **columns):
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.padding_side = side
    encoded = tokenizer(PROMPTS, padding="max_length", max_length=9)
    return {"input_ids": encoded["input_ids"], **({"attention_mask": encoded["attention_mask"]} | columns)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("masked", [True, False])
def test_padding_is_no_part_of_a_prompt(word_tokenizer, side, masked):
    data = ids_of(word_tokenizer, side)
    if not masked:
        del data["attention_mask"]
    found = PromptSet(Dataset.from_dict(data), word_tokenizer)
    assert found.ids == [word_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert found.prompts == PROMPTS


def test_padded_and_unpadded_train_alike(make_trainer, word_tokenizer):
    rows = []
    plain = {"input_ids": [word_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]}
    for data in (plain, ids_of(word_tokenizer)):
        trainer = make_trainer({"train_dataset": Dataset.from_dict(data)}, max_steps=1)
        trainer.train()
        rows.append({k: v for k, v in logs(trainer)[0].items() if not k.startswith("time/")})
    assert rows[0] == rows[1]


@pytest.mark.parametrize("form", ["text", "ids", "messages", "rendered", "no template"])
def test_a_chat_model_that_reads_bare_text_says_so(make_trainer, word_tokenizer, caplog, form):
    asked = [{"role": "user", "content": "the film"}]
    prompts = {"messages": asked, "rendered": render_prompt(word_tokenizer, asked)}
    data = {"prompt": [prompts.get(form, "the film")] * 4}
    tokenizer = copy.deepcopy(word_tokenizer)
    if form == "ids":
        data = {"input_ids": [word_tokenizer("the film")["input_ids"]] * 4}
    if form == "no template":
        tokenizer.chat_template = None
    with caplog.at_level("WARNING"):
        make_trainer({"train_dataset": Dataset.from_dict(data), "processing_class": tokenizer}, max_steps=1)
    said = [one for one in caplog.messages if "with no turn around it" in one]
    assert len(said) == (form == "text")


def test_a_mask_of_another_length(word_tokenizer):
    data = Dataset.from_dict({"input_ids": [[6, 7], [8, 9]], "attention_mask": [[1, 1], [1]]})
    with pytest.raises(UserError, match="row 1: input_ids has 2 entries and attention_mask 1"):
        PromptSet(data, word_tokenizer)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"input_ids": [[6, 7], [8, 99]]},
            "row 1: input_ids has 99 at place 1, and .* the ids 0 to 19",
        ),
        ({"input_ids": [[6, 7], [8, -100]]}, "row 1: input_ids has -100 at place 1"),
        ({"input_ids": [[[6, 7]], [[8]]]}, r"row 0: input_ids has \[6, 7\] at place 0"),
        ({"input_ids": ["6 7"]}, "row 0: input_ids is '6 7'"),
        ({"input_ids": [[6.5]]}, r"row 0: input_ids has 6\.5 at place 0"),
        ({"input_ids": [[6, 7], None]}, "row 1: input_ids is None"),
        ({"input_ids": [[6, 7]], "attention_mask": [None]}, "row 0: input_ids has 2 entries and attention_mask none"),
        ({"input_ids": [[6, 7]], "attention_mask": [[0, 0]]}, "row 0: the prompt is empty"),
        ({"input_ids": [[6, 7]], "position_ids": [[4, 5]]}, r"row 0: position_ids are \[4, 5\]"),
        (
            {"prompt": ["the film"], "input_ids": [[1, 6, 7]]},
            r"and input_ids are not the same tokens \(\[6, 7\]",
        ),
    ],
)
def test_ids_that_are_none(word_tokenizer, columns, said):
    with pytest.raises(UserError, match=said):
        PromptSet(Dataset.from_dict(columns), word_tokenizer)


def test_what_says_nothing_new_is_taken(word_tokenizer):
    """Holes in a mask, positions that count the real tokens, the same tokens twice; none of it goes to rewards."""
    data = {
        "input_ids": [[0, 0, 6, 7], [6, 0, 7, 8]],
        "attention_mask": [[0, 0, 1, 1], [1, 0, 1, 1]],
        "position_ids": [[1, 1, 0, 1], [0, 0, 1, 2]],
        "token_type_ids": [[0, 0, 0, 0]] * 2,
        "answer": ["a", "b"],
    }
    found = PromptSet(Dataset.from_dict(data), word_tokenizer)
    assert found.ids == [[6, 7], [6, 7, 8]]
    assert list(found.columns) == ["answer"]
    both = PromptSet(Dataset.from_dict({"prompt": ["the film"], "input_ids": [[0, 6, 7]]}), word_tokenizer)
    assert both.ids == [[6, 7]]


def test_padding_that_could_be_text(word_tokenizer):
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(UserError, match=r"row 0: input_ids begins or ends with several </s>.*attention_mask"):
        PromptSet(Dataset.from_dict({"input_ids": [[2, 2, 6, 7]]}), tokenizer)
    # One may be the beginning of the text, as in GPT-2; with a mask there is no question.
    assert PromptSet(Dataset.from_dict({"input_ids": [[2, 6, 7]]}), tokenizer).ids == [[2, 6, 7]]
    masked = Dataset.from_dict({"input_ids": [[2, 2, 6, 7]], "attention_mask": [[0, 1, 1, 1]]})
    assert PromptSet(masked, tokenizer).ids == [[2, 6, 7]]
    with pytest.raises(UserError, match="row 0: the prompt is empty"):
        PromptSet(Dataset.from_dict({"input_ids": [[2]], "attention_mask": [[0]]}), tokenizer)


def test_a_tokenizer_without_padding_or_end(make_trainer, word_tokenizer):
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.pad_token = None
    trainer = make_trainer({"processing_class": tokenizer}, max_steps=1)
    trainer.train()
    plain = make_trainer(max_steps=1)
    plain.train()
    for name in ("objective/kl", "objective/scores", "loss/policy_avg", "loss/value_avg"):
        assert logs(trainer)[0][name] == pytest.approx(logs(plain)[0][name], abs=1e-6)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="processing_class has no end-of-sequence token"):
        make_trainer({"processing_class": tokenizer})


def test_several_tokens_end_a_response(make_trainer, tiny_llama, word_tokenizer):
    """All of the generation configuration's; the response keeps the one it ended with, and counts as finished."""
    policy = tiny_llama(0, initializer_range=0.2)
    ends = [word_tokenizer.eos_token_id, 9, 12]
    policy.generation_config.eos_token_id = ends
    trainer = make_trainer({"model": policy})
    trainer.prepare()
    rollout = trainer.collect(0)
    seen = set()
    for row in range(len(rollout)):
        tokens = rollout.response_ids[row][rollout.mask[row]].tolist()
        assert not set(tokens[:-1]) & set(ends)
        assert bool(rollout.finished[row]) == (tokens[-1] in ends)
        seen.add(tokens[-1])
    assert len(seen & set(ends)) > 1
