"""What PPO counts as its cost, against a hand count of a tiny run."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ppo_vs_dpo.ppo.watching.flops import Sizes, size_of, update_flops


def test_parameters_without_embeddings():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    assert size_of(model) == 4 * 3 + 3 + 3 * 2
    assert size_of(None) == 0


def test_equals_the_trainers_own_count_of_a_training_pass(tiny_llama, tmp_path):
    """With one model and no rollout the convention is `floating_point_ops` of transformers: 6 N a token."""
    model = tiny_llama()
    trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"))
    theirs = trainer.floating_point_ops({"input_ids": torch.ones(3, 7, dtype=torch.long)})
    assert theirs > 0
    assert update_flops(Sizes(0, size_of(model), 0, 0), 21, 1.0) - 2 * 21 * size_of(model) == theirs


def test_roles_and_passes():
    sizes = Sizes(policy=10, value=100, reference=1_000, reward=10_000)
    # sampling 10, scoring 10,000, log-probabilities and values 10 + 100 + 1,000: forward; 110: trained twice.
    assert update_flops(sizes, 5, 2.0) == pytest.approx(5 * (2 * (10 + 10_000 + 10 + 100 + 1_000) + 6 * 110 * 2))
    only = update_flops(sizes, 5, 2.0, value_only=True)
    assert update_flops(sizes, 5, 2.0) - only == pytest.approx(5 * 6 * 10 * 2)
