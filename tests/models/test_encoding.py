"""Batches are encoded as single prompts and completions are; what does not fit is named."""

import pytest
from datasets import Dataset

from artifacts.errors import UserError
from models.encoding import drop_long, encode_completions, encode_pairs, encode_prompts, pair_lengths
from models.prompts import encode_completion, encode_prompt

PROMPTS = ["the film was", "a story", "bad"]
ANSWERS = [" good", " very dull and bad", ""]


def chat(texts, role):
    return [[{"role": role, "content": text}] for text in texts]


def test_texts(word_tokenizer):
    assert encode_prompts(word_tokenizer, PROMPTS) == [encode_prompt(word_tokenizer, p) for p in PROMPTS]
    expected = [encode_completion(word_tokenizer, a, f) for a, f in zip(ANSWERS, (True, False, True), strict=True)]
    assert encode_completions(word_tokenizer, ANSWERS, [True, False, True]) == expected
    assert encode_completions(word_tokenizer, ANSWERS)[2] == [word_tokenizer.eos_token_id]
    assert encode_prompts(word_tokenizer, []) == encode_completions(word_tokenizer, []) == []


def test_conversations_end_at_eos_not_after_it(word_tokenizer):
    """The template puts nothing after the answer here, but many put a line break there; it is never part of a row."""
    prompts, answers = chat(PROMPTS, "user"), chat(ANSWERS, "assistant")
    assert encode_prompts(word_tokenizer, prompts) == [encode_prompt(word_tokenizer, p) for p in prompts]
    pairs = Dataset.from_dict({"prompt": prompts, "chosen": answers, "rejected": answers[::-1], "pair_id": [1, 2, 3]})
    encoded = encode_pairs(word_tokenizer, pairs)
    assert encoded["pair_id"][:] == [1, 2, 3]
    for row in encoded:
        assert row["prompt_ids"][-1] == word_tokenizer.convert_tokens_to_ids("<|assistant|>")
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == word_tokenizer.eos_token_id
    sizes = [len(word_tokenizer(a, add_special_tokens=False)["input_ids"]) + 1 for a in ANSWERS]
    longer = [max(a, b) for a, b in zip(sizes, sizes[::-1], strict=True)]
    assert pair_lengths(encoded) == [len(p) + n for p, n in zip(encoded["prompt_ids"], longer, strict=True)]


def test_an_empty_prompt_is_named(word_tokenizer):
    with pytest.raises(UserError, match="row 1: an empty prompt"):
        encode_prompts(word_tokenizer, ["the", "", "a"])


def test_a_tokenizer_that_ends_every_text(word_tokenizer):
    """A prompt must not end: the end-of-sequence token that some tokenizers append is taken off."""
    import copy

    from tokenizers.processors import TemplateProcessing

    ending = copy.deepcopy(word_tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert ending("the film")["input_ids"][-1] == 2
    assert encode_prompts(ending, PROMPTS) == encode_prompts(word_tokenizer, PROMPTS)
    assert encode_completions(ending, ANSWERS) == encode_completions(word_tokenizer, ANSWERS)


def test_long_rows():
    rows = Dataset.from_dict({"pair_id": ["a", "b", "c"]})
    assert drop_long(rows, [3, 9, 4], 5, 8, "dpo")["pair_id"][:] == ["a", "c"]
    assert drop_long(rows, [3, 9, 4], None, None, "dpo") is rows
    with pytest.raises(UserError, match=r"dpo: row b has 9 tokens and the model takes 8. Set dpo.max_length=8"):
        drop_long(rows, [3, 9, 4], None, 8, "dpo")
    with pytest.raises(UserError, match=r"dpo.max_length is 2 tokens and the shortest of 3 rows has 3"):
        drop_long(rows, [3, 9, 4], 2, 8, "dpo")
