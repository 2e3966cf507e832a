"""Evaluation on held-out prompts, and the best checkpoint."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from ppo_vs_dpo.artifacts.errors import UserError
from tests.ppo.conftest import logs


def test_evaluation_and_best_checkpoint(make_trainer, prompts, tmp_path):
    trainer = make_trainer(
        {"eval_dataset": prompts.select(range(8))},
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        kl_coef=0.1,
        num_eval_samples=3,
    )
    trainer.train()
    rows = logs(trainer, "eval_objective")
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert row["eval_objective"] == pytest.approx(row["eval_reward"] - 0.1 * row["eval_kl"], abs=1e-6)
        assert row["eval_kl"] >= 0
        assert row["eval_kl_se"] >= 0
        assert 0 <= row["eval_eos_rate"] <= 1
    best = max(rows, key=lambda row: row["eval_objective"])
    assert trainer.state.best_global_step == best["step"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / f"checkpoint-{best['step']}")
    for name, tensor in saved.named_parameters():
        assert torch.equal(tensor, dict(trainer.policy.named_parameters())[name])
    samples = json.loads((tmp_path / "out" / "samples" / "update-000006.json").read_text())
    assert len(samples) == 3
    assert {"prompt", "completion", "score", "reference_completion", "reference_score"} <= samples[0].keys()


def test_evaluation_of_the_untrained_policy(make_trainer, prompts):
    """KL exactly 0, and the same responses as the reference: both are drawn with the same seeds."""
    trainer = make_trainer({"eval_dataset": prompts.select(range(8))}, missing_eos_penalty=None)
    metrics = trainer.evaluate()
    assert metrics["eval_kl"] == 0
    assert metrics["eval_score"] == metrics["eval_reference_score"]
    with pytest.raises(UserError, match="no eval_dataset"):
        make_trainer().evaluate()


def test_what_happens_each_epoch(make_trainer, prompts, tmp_path):
    """``epoch`` is once through the prompts, 2 updates of 16 here, and the end of the run."""
    each = {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"}
    trainer = make_trainer({"eval_dataset": prompts.select(range(4))}, max_steps=5, **each)
    trainer.train()
    assert [row["step"] for row in logs(trainer)] == [2, 4, 5]
    assert [row["step"] for row in logs(trainer, "eval_objective")] == [2, 4, 5]
    saved = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert saved == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
