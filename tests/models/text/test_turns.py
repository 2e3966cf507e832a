"""Answers of several turns: the template's conversation, the assistant's words alone marked."""

import copy

import pytest
import torch
from datasets import Dataset

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.dpo.data import PairCollator, dpo_dataset
from ppo_vs_dpo.models.text.encoding import encode_answers, encode_completions, encode_prompts
from ppo_vs_dpo.models.text.prompts import completion_text, encode_completion, encode_prompt
from ppo_vs_dpo.models.text.turns import encode_turns
from ppo_vs_dpo.reward_model.data import reward_dataset
from ppo_vs_dpo.sft.data import sft_dataset


def turns(*texts):
    """The assistant speaks first."""
    return [{"role": ("assistant", "user")[n % 2], "content": text} for n, text in enumerate(texts)]


PROMPT = [{"role": "user", "content": "the film was"}]
THREE = turns("good", "a story", "dull and bad")
# As in most chat models, a turn ends with EOS.
ENDING = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.fixture
def tokenizer(word_tokenizer):
    found = copy.deepcopy(word_tokenizer)
    found.chat_template = ENDING
    return found


def test_the_sequence_is_the_templates_and_the_mask_the_assistants_words(tokenizer):
    ids, mask = encode_turns(tokenizer, PROMPT, THREE)
    whole = tokenizer.apply_chat_template([*PROMPT, *THREE], tokenize=True, return_dict=True)["input_ids"]
    assert [*encode_prompt(tokenizer, PROMPT), *ids] == whole[: len(encode_prompt(tokenizer, PROMPT)) + len(ids)]
    eos = tokenizer.eos_token_id
    own = [token for token, marked in zip(ids, mask, strict=True) if marked]
    assert own == [*tokenizer("good")["input_ids"], eos, *tokenizer("dull and bad")["input_ids"], eos]
    others = [token for token, marked in zip(ids, mask, strict=True) if not marked]
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    assert others == [user, *tokenizer("a story")["input_ids"], eos, assistant]
    unfinished, its_mask = encode_turns(tokenizer, PROMPT, THREE, finished=False)
    assert (unfinished, its_mask) == (ids[:-1], mask[:-1])


def test_each_turn_is_what_it_is_as_a_single_answer(tokenizer):
    """What is trained at a turn is what is sampled there: the conversation before it, its words, EOS."""
    ids, mask = encode_turns(tokenizer, PROMPT, THREE)
    before = [*PROMPT, *THREE[:2]]
    head, tail = encode_prompt(tokenizer, before), encode_completion(tokenizer, THREE[2:])
    assert [*encode_prompt(tokenizer, PROMPT), *ids] == [*head, *tail]
    assert mask[-len(tail) :] == [1] * len(tail)


def test_single_answers_beside_them_stay_as_they_are(tokenizer):
    one = turns("good")
    ids, masks = encode_answers(tokenizer, [PROMPT] * 3, [one, THREE, one], [True, True, False])
    assert [ids[0], ids[2]] == encode_completions(tokenizer, [one, one], [True, False])
    assert (masks[0], masks[2]) == (None, None)
    assert (ids[1], masks[1]) == encode_turns(tokenizer, PROMPT, THREE)


def test_what_cannot_be_one_sequence_is_refused(tokenizer):
    with pytest.raises(UserError, match="begin and end with the assistant's words"):
        encode_turns(tokenizer, PROMPT, THREE[:2])
    # As reasoning models do: earlier answers lose their reasoning.
    tokenizer.chat_template = ENDING.replace(
        "m['content']", "(m['content'] if m['role'] == 'user' or loop.last else 'bad')"
    )
    with pytest.raises(UserError, match=r"writes the turn 'good' otherwise.*several_turns=drop"):
        encode_turns(tokenizer, PROMPT, THREE)
    with pytest.raises(UserError, match=r"3 messages \(assistant, user, assistant\)"):
        completion_text(THREE)


def test_every_branch_trains_on_the_assistants_words_alone(tokenizer):
    other = turns("bad", "a cast", "good", "the acting", "dull")
    pairs = Dataset.from_dict({"prompt": [PROMPT] * 2, "chosen": [THREE, turns("good")], "rejected": [other, THREE]})
    rows = dpo_dataset(pairs, tokenizer)
    batch = PairCollator(pad_token_id=tokenizer.pad_token_id)(list(rows))
    start = len(encode_prompt(tokenizer, PROMPT))
    for row, answer in enumerate([THREE, turns("good"), other, THREE]):
        ids, mask = (
            encode_turns(tokenizer, PROMPT, answer)
            if len(answer) > 1
            else (encode_completion(tokenizer, answer), None)
        )
        expected = torch.zeros_like(batch["completion_mask"][row])
        expected[start : start + len(ids)] = torch.tensor(mask or [1] * len(ids))
        assert torch.equal(batch["completion_mask"][row], expected)
        assert batch["input_ids"][row, start : start + len(ids)].tolist() == ids
        assert batch["attention_mask"][row].sum() == start + len(ids)
    # The reward model reads the whole conversation, at its end.
    scored = reward_dataset(pairs, tokenizer)
    assert scored["chosen_ids"][0] == encode_turns(tokenizer, PROMPT, THREE)[0]
    # SFT.
    examples = Dataset.from_dict({"prompt": [PROMPT] * 2, "completion": [THREE, turns("good")]})
    learned = sft_dataset(examples, tokenizer, None, None, None)
    ids, mask = encode_turns(tokenizer, PROMPT, THREE)
    own = [token for token, marked in zip(ids, mask, strict=True) if marked]
    assert [label for label in learned["labels"][0] if label != -100] == own
    assert sft_dataset(examples, tokenizer, False, None, None)["labels"][0] == learned["input_ids"][0]
    assert encode_prompts(tokenizer, [PROMPT])[0] + ids == learned["input_ids"][0]
