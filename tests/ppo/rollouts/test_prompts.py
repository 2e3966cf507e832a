"""PPO's prompts in the forms that people have them."""

import pytest
from datasets import Dataset, DatasetDict

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.ppo.rollouts.prompts import TAKEN, PromptSet, as_dataset

ROWS = [{"prompt": "the film was", "topic": "film"}, {"prompt": "a story", "topic": "story"}]


def test_a_list_and_a_stream_are_what_the_data_set_is(word_tokenizer):
    whole = PromptSet(Dataset.from_list(ROWS), word_tokenizer)
    for rows in (ROWS, Dataset.from_list(ROWS).to_iterable_dataset(), iter(ROWS)):
        prompts = PromptSet(rows, word_tokenizer)
        assert (prompts.ids, prompts.prompts, prompts.columns) == (whole.ids, whole.prompts, whole.columns)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*ROWS, "a cast"], "train_dataset, row 2: a str"),
        ("prompts.jsonl", "train_dataset is a str"),
        ({"prompt": ["a"]}, "train_dataset is a dict"),
        (DatasetDict(train=Dataset.from_list(ROWS)), r"splits train; give one of them, train_dataset\['train'\]"),
        ([], "has no prompts"),
        ([*ROWS, {"prompt": [{"role": "user", "content": "a"}]}], r"prompts are str \(row 0\), list \(row 2\)"),
        ([{"prompt": 1}], "row 0: the prompt is a int; text or messages are needed"),
    ],
)
def test_other_forms_are_refused_in_a_sentence(word_tokenizer, rows, said):
    with pytest.raises(UserError, match=said):
        PromptSet(as_dataset(rows, "train_dataset"), word_tokenizer)


@pytest.mark.parametrize("name", TAKEN)
def test_a_column_of_a_name_that_is_taken_is_refused(word_tokenizer, name):
    rows = Dataset.from_list(ROWS).rename_column("topic", name)
    with pytest.raises(UserError, match=f"has a column {name}.*rename_column"):
        PromptSet(rows, word_tokenizer)
