"""The training loop on a model of ten thousand parameters: what it computes, seen from outside."""

from pathlib import Path

import pytest
import torch

from ppo_vs_dpo import ppo
from ppo_vs_dpo.models.passes.logprobs import response_logprobs
from tests.ppo.conftest import logs, same, untimed


def test_first_pass_of_every_rollout(make_trainer):
    """N+: with one epoch of one minibatch, ratio exactly 1, approx-KL and clip fraction 0, policy loss about 0."""
    trainer = make_trainer(num_ppo_epochs=1, num_mini_batches=1, max_steps=3)
    trainer.train()
    for row in logs(trainer):
        assert row["val/ratio"] == pytest.approx(1, abs=1e-6)
        assert row["val/ratio_max"] == pytest.approx(1, abs=1e-5)
        assert row["policy/approxkl_avg"] < 1e-10
        assert row["policy/clipfrac_avg"] == 0
        assert row["val/clipfrac_avg"] == 0
        assert abs(row["loss/policy_avg"]) < 1e-6
        assert row["val/first_ratio_deviation"] < 1e-5
    # The policy is the reference at first: KL exactly what rounding leaves.
    assert abs(logs(trainer)[0]["objective/kl"]) < 1e-5
    assert logs(trainer)[2]["objective/kl"] > 1e-4


def test_learns_and_keeps_close(make_trainer):
    """Reward rises; a larger coefficient holds the policy closer to the reference."""
    settings = {
        "max_steps": 12,
        "rollout_batch_size": 64,
        "per_device_train_batch_size": 64,
        "num_ppo_epochs": 4,
        "learning_rate": 6e-3,
    }
    far, near = make_trainer(kl_coef=0.0, **settings), make_trainer(kl_coef=1.0, **settings)
    far.train()
    near.train()
    first, last = logs(far)[0], logs(far)[-1]
    assert last["objective/scores"] > first["objective/scores"] + 0.5
    assert logs(near)[-1]["objective/kl"] < 0.5 * last["objective/kl"]


def test_same_seed_same_run_and_another_seed_another(make_trainer, weights):
    runs = []
    for seed in (3, 3, 4):
        trainer = make_trainer(seed=seed)
        trainer.train()
        runs.append((weights(trainer), untimed(logs(trainer))))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert not same(runs[0][0], runs[2][0])


@pytest.mark.parametrize("size", [1, 2, 8])
def test_micro_batch_size_does_not_change_the_update(make_trainer, weights, size):
    """1 x 8, 2 x 4 and 8 x 1 give the same update (fp32, 1e-6), with responses of different lengths."""
    whole = make_trainer(per_device_train_batch_size=16, num_mini_batches=1, num_ppo_epochs=1, optim="sgd")
    cut = make_trainer(
        per_device_train_batch_size=size,
        gradient_accumulation_steps=16 // size,
        rollout_batch_size=None,
        num_mini_batches=1,
        num_ppo_epochs=1,
        optim="sgd",
    )
    whole.train()
    cut.train()
    assert cut.rollout_size == 16
    expected, got = weights(whole), weights(cut)
    assert max((expected[n] - got[n]).abs().max() for n in expected) < 1e-6
    for a, b in zip(logs(whole), logs(cut), strict=True):
        for name in ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "val/ratio", "objective/rlhf_reward"):
            assert a[name] == pytest.approx(b[name], abs=1e-6)


def test_metrics_are_over_real_tokens(make_trainer):
    """The logged figures are those of the rollout, worked out again row by row without padding."""
    trainer = make_trainer()
    trainer.prepare()
    rollout = trainer.collect(0)
    from ppo_vs_dpo.ppo.watching.metrics import rollout_metrics

    rollout.ref_logprobs = rollout.ref_logprobs + 0.1 * torch.randn(rollout.mask.shape)  # also at padding
    got = rollout_metrics(rollout, 0.3)
    assert rollout.lengths().unique().numel() > 1
    rows = [
        (rollout.logprobs[i, :n] - rollout.ref_logprobs[i, :n], rollout.entropy[i, :n], rollout.values[i, :n])
        for i, n in enumerate(rollout.lengths().tolist())
    ]
    kl = sum(row[0].sum() for row in rows) / len(rows)
    tokens = sum(len(row[0]) for row in rows)
    assert got["objective/kl"] == pytest.approx(float(kl), abs=1e-5)
    assert got["objective/kl_per_token"] == pytest.approx(float(kl) * len(rows) / tokens, abs=1e-6)
    assert got["policy/entropy"] == pytest.approx(float(sum(row[1].sum() for row in rows)) / tokens, abs=1e-5)
    assert got["response/length"] == tokens / len(rows)
    assert got["objective/rlhf_reward"] == pytest.approx(float(rollout.final_scores.mean() - 0.3 * kl), abs=1e-5)


def test_rollout_numbers_are_those_of_plain_forward_passes(make_trainer, tiny_llama, word_tokenizer):
    """Log-probabilities without padding, one row at a time, in the collected rollout; rewards and returns add up."""
    trainer = make_trainer(local_rollout_forward_batch_size=5, kl_coef=0.3)
    trainer.prepare()
    rollout = trainer.collect(0)
    for row in range(len(rollout)):
        one = rollout.select([row])
        logprobs, _ = response_logprobs(trainer.policy, one.batch())
        n = int(one.mask.sum())
        torch.testing.assert_close(rollout.logprobs[row, :n], logprobs[0, :n].detach(), atol=1e-5, rtol=0)
        ratio = (rollout.logprobs[row, :n] - rollout.ref_logprobs[row, :n]).sum()
        torch.testing.assert_close(
            rollout.rewards[row].sum(), rollout.final_scores[row] - 0.3 * ratio, atol=1e-5, rtol=0
        )
    real = rollout.advantages[rollout.mask]
    assert abs(real.mean()) < 1e-6
    assert abs(real.var(unbiased=False) - 1) < 1e-5


def test_the_road_stays_short():
    """What PPO does, from the equations to the loop, is under 1,200 lines in all: somebody can read it in an hour."""
    room = Path(ppo.__file__).parent
    road = ("algorithm.py", "rollouts/rollout.py", "rollouts/collect.py", "updates/update.py", "trainer.py")
    assert sum(len((room / name).read_text(encoding="utf-8").splitlines()) for name in road) < 1200
