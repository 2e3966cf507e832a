"""What the branches trained on: one hash where the tokens are the same, another where they are not."""

import pytest
from datasets import Dataset

from ppo_vs_dpo.compare.sampling.policies import pair_differences
from ppo_vs_dpo.dpo.data import dpo_dataset
from ppo_vs_dpo.models.text.trained_on import trained_on
from ppo_vs_dpo.reward_model.data import reward_dataset

PAIRS = Dataset.from_list(
    [
        {"prompt": "the film was", "chosen": " good", "rejected": " bad", "pair_id": "a"},
        {"prompt": "a story", "chosen": " very dull and bad", "rejected": " good", "pair_id": "b"},
        {"prompt": "a cast", "chosen": " bright", "rejected": " dull", "pair_id": "c"},
    ]
)


def test_both_branches_give_one_hash_in_any_order(word_tokenizer):
    reward, dpo = reward_dataset(PAIRS, word_tokenizer), dpo_dataset(PAIRS, word_tokenizer)
    first = trained_on(reward, 3, 1.0)
    assert first["hash"] == trained_on(dpo, 3)["hash"] == trained_on(dpo.select([2, 0, 1]), 3)["hash"]
    assert (first["pairs"], first["left_out"], first["epochs"]) == (3, 0, 1.0)


@pytest.mark.parametrize("change", [{"chosen": " bad"}, {"prompt": "a story"}, {"rejected": " good"}])
def test_one_other_token_is_another_hash(word_tokenizer, change):
    rows = PAIRS.to_list()
    other = Dataset.from_list([{**rows[0], **change}, *rows[1:]])
    assert (
        trained_on(dpo_dataset(other, word_tokenizer), 3)["hash"]
        != trained_on(dpo_dataset(PAIRS, word_tokenizer), 3)["hash"]
    )


def test_tokens_do_not_run_from_one_side_into_the_next():
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}]
    moved = [{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}]
    hashes = [trained_on(Dataset.from_list(some), 1)["hash"] for some in (rows, moved)]
    assert len(set(hashes)) == 2


def test_a_limit_of_one_branch_alone_is_said(word_tokenizer):
    longest = max(dpo_dataset(PAIRS, word_tokenizer).map(lambda row: {"n": len(row["chosen_ids"])})["n"])
    reward = trained_on(reward_dataset(PAIRS, word_tokenizer), 3, 1.0)
    short = trained_on(dpo_dataset(PAIRS, word_tokenizer, max_length=longest), 3, 1.0)
    assert 0 < short["left_out"] < 3
    soft = {"reward_model": False, "dpo": False}
    assert pair_differences({"reward_model": reward, "dpo": reward}, soft) == []
    (said,) = pair_differences({"reward_model": reward, "dpo": short}, soft)
    assert "reward model and dpo did not train on the same pairs: 3 against" in said
    assert "max_length" in said
    (said,) = pair_differences({"reward_model": reward, "dpo": reward}, {"reward_model": True, "dpo": False})
    assert said == "the reward model took the pairs' soft labels, dpo took every pair for certain."
    (said,) = pair_differences({"reward_model": reward, "dpo": {**reward, "epochs": 0.25}}, soft)
    assert said == "dpo saw 25% of its 3 training pairs."
