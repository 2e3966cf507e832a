"""Margins as data have them: known in some rows only, NaN, infinite."""

import math

import pytest
import torch
from datasets import Dataset

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.reward_model.data import PairCollator, reward_dataset, without_margin


def pairs(margins):
    rows = [
        {"prompt": "the film was", "chosen": " good", "rejected": " bad", "pair_id": f"p{n}", "margin": margin}
        for n, margin in enumerate(margins)
    ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("unknown", [None, float("nan")])
def test_an_unknown_margin_is_none_and_said(word_tokenizer, unknown):
    dataset = reward_dataset(pairs([1.5, unknown, 0.0]), word_tokenizer, use_margin=True)
    batch = PairCollator(pad_token_id=word_tokenizer.pad_token_id)(list(dataset))
    assert torch.equal(batch["margin"], torch.tensor([1.5, 0.0, 0.0]))
    assert without_margin(dataset) == ["1 of 3 pairs have no margin; their loss is the plain one."]
    assert without_margin(dataset.select([0, 2])) == []
    assert without_margin(reward_dataset(pairs([1.5, unknown]), word_tokenizer)) == []


def test_margins_that_are_no_numbers_are_named(word_tokenizer):
    with pytest.raises(UserError, match="no pair has a margin"):
        reward_dataset(pairs([math.nan, math.nan]), word_tokenizer, use_margin=True)
    with pytest.raises(UserError, match="pair p1 has the margin inf"):
        reward_dataset(pairs([1.0, math.inf]), word_tokenizer, use_margin=True)
