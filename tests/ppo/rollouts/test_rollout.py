"""The rollout: shapes, cropping, partitions, files."""

import pytest
import torch

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.ppo.rollouts.advantages import extend_by_one
from ppo_vs_dpo.ppo.rollouts.cutting import micro_batches, minibatches
from ppo_vs_dpo.ppo.rollouts.rollout import FIELDS, Rollout


@pytest.fixture
def rollout():
    """Three rows; prompts of 1 to 3 tokens, responses of 1 to 4."""
    made = Rollout.empty([[5], [5, 6, 7], [8, 9]], [[1, 2, 3, 4], [1], [1, 2]], [True, False, True], pad_id=0)
    made.rewards = torch.arange(12.0).reshape(3, 4)
    return made


def test_shapes(rollout):
    assert len(rollout) == 3
    assert rollout.prompt_ids.tolist() == [[0, 0, 5], [5, 6, 7], [0, 8, 9]]
    assert rollout.response_ids.tolist() == [[1, 2, 3, 4], [1, 0, 0, 0], [1, 2, 0, 0]]
    assert rollout.lengths().tolist() == [4, 1, 2]
    assert set(vars(rollout)) == set(FIELDS)


def test_select_cuts_common_padding_off(rollout):
    part = rollout.select([2, 1])
    assert part.prompt_ids.tolist() == [[0, 8, 9], [5, 6, 7]]
    assert part.response_ids.tolist() == [[1, 2], [1, 0]]
    assert part.rewards.tolist() == [[8, 9], [4, 5]]
    batch = rollout.select([0]).batch()
    assert batch.input_ids.tolist() == [[5, 1, 2, 3, 4]]
    assert batch.prompt_length == 1
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]]


def test_batch_masks_say_what_is_real(rollout):
    batch = rollout.batch()
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0]]
    assert torch.equal(batch.response_mask, rollout.mask)


def test_minibatches_are_a_partition_that_depends_on_seed_update_and_epoch():
    rollout = Rollout.empty([[5]] * 12, [[1]] * 12, [True] * 12, 0)
    first = minibatches(len(rollout), 3, seed=1, update=0, epoch=0)
    assert sorted(torch.cat(first).tolist()) == list(range(12))
    assert [len(rows) for rows in first] == [4, 4, 4]
    again = minibatches(len(rollout), 3, seed=1, update=0, epoch=0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    others = [
        minibatches(len(rollout), 3, 1, 0, 1),
        minibatches(len(rollout), 3, 1, 1, 0),
        minibatches(len(rollout), 3, 2, 0, 0),
    ]
    assert all(not torch.equal(torch.cat(first), torch.cat(other)) for other in others)


def test_micro_batches_put_similar_lengths_together(rollout):
    assert [rows.tolist() for rows in micro_batches(rollout.extents.total, 2)] == [[1, 2], [0]] or [
        rows.tolist() for rows in micro_batches(rollout.extents.total, 2)
    ] == [[2, 1], [0]]
    assert [len(rows) for rows in micro_batches(rollout.extents.total, 1)] == [1, 1, 1]


def test_micro_batches_under_a_token_budget():
    """Neither rows nor tokens beyond the limits, every row once; a row over the budget goes alone."""
    lengths = [1, 2, 2, 3, 5, 9, 4, 1]
    rollout = Rollout.empty([[5]] * 8, [[1] * n for n in lengths], [True] * 8, 0)
    groups = [rows.tolist() for rows in micro_batches(rollout.extents.total, 3, tokens=9)]
    assert [sorted(lengths[row] + 1 for row in rows) for rows in groups] == [[2, 2, 3], [3, 4], [5], [6], [10]]
    assert sorted(row for rows in groups for row in rows) == list(range(8))
    assert [len(rows) for rows in micro_batches(rollout.extents.total, 3, tokens=1000)] == [3, 3, 2]
    assert [len(rows) for rows in micro_batches(rollout.extents.total, 8, tokens=1)] == [1] * 8


def test_save_and_load(rollout, tmp_path):
    rollout.save(tmp_path / "rollout.safetensors")
    loaded = Rollout.load(tmp_path / "rollout.safetensors")
    assert all(torch.equal(getattr(rollout, name), getattr(loaded, name)) for name in FIELDS)
    (tmp_path / "torn.safetensors").write_bytes(b"x" * 20)
    for name in ("torn", "missing"):
        with pytest.raises(UserError, match=f"{name}.safetensors"):
            Rollout.load(tmp_path / f"{name}.safetensors")


def test_gather_on_one_process_is_itself(rollout):
    assert rollout.gather() is rollout


def test_extend_by_one():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    assert extend_by_one(mask).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
