"""The losses of policy and value model, by hand and against the exact gradient, in float64."""

import numpy as np
import pytest
import torch

from ppo_vs_dpo.ppo.algorithm import (
    gae,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from ppo_vs_dpo.ppo.watching.metrics import explained_variance
from tests.ppo.conftest import GAPS, T, ones


def test_first_pass_has_ratio_one(draw):
    logprobs = draw(5, T).requires_grad_()
    advantages = whiten(draw(5, T), GAPS)
    loss, stats = policy_loss(logprobs, logprobs.detach(), advantages, GAPS, 0.2)
    assert abs(loss.item()) < 1e-12
    assert stats["ratio_mean"] == 1
    assert stats["ratio_max"] == 1
    assert stats["approx_kl"] == 0
    assert stats["clip_fraction"] == 0
    # Its gradient is that of the plain policy gradient.
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, torch.where(GAPS, -advantages / GAPS.sum(), 0), atol=1e-12, rtol=0)
    values, returns = draw(5, T), draw(5, T)
    vf_loss, vf_stats = value_loss(values, values, returns, GAPS, 0.2)
    assert abs(vf_loss - 0.5 * ((values - returns) ** 2)[GAPS].mean()) < 1e-12
    assert vf_stats["clip_fraction"] == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [
        (1.5, 1.0, False),  # good action, already more likely: stop
        (0.5, -1.0, False),  # bad action, already less likely: stop
        (1.5, -1.0, True),  # bad action, more likely: keep pushing
        (0.5, 1.0, True),
        (1.1, 1.0, True),
        (0.9, -1.0, True),
    ],
)
def test_where_the_clip_stops_the_gradient(ratio, advantage, flows):
    logprobs = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    loss, stats = policy_loss(
        logprobs, torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[advantage]]), ones(1, 1), 0.2
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert (gradient.item() != 0) == flows
    assert stats["clip_fraction"] == (0.0 if flows else 1.0)
    clipped = min(max(ratio, 0.8), 1.2)
    assert loss.item() == pytest.approx(-min(ratio * advantage, clipped * advantage))
    assert stats["approx_kl"].item() == pytest.approx(np.log(ratio) ** 2 / 2)


def test_losses_ignore_masked_garbage(draw):
    logprobs, old, advantages = draw(5, T).requires_grad_(), draw(5, T), draw(5, T)
    nan = torch.where(GAPS, 0, float("nan"))
    loss, stats = policy_loss(logprobs, old, advantages, GAPS, 0.2)
    dirty, dirty_stats = policy_loss(logprobs, old + nan, advantages + nan, GAPS, 0.2)
    assert torch.equal(loss, dirty)
    assert all(torch.equal(stats[name], dirty_stats[name]) for name in stats)
    (gradient,) = torch.autograd.grad(dirty, logprobs)
    assert gradient.isfinite().all()
    assert not gradient[~GAPS].any()
    assert torch.equal(
        value_loss(old, advantages, logprobs, GAPS, 0.2)[0],
        value_loss(old + nan, advantages + nan, logprobs, GAPS, 0.2)[0],
    )


def test_value_loss_by_hand():
    # V moved from 0 to 1 towards 2: clipped at 0.2, the larger error counts: (0.2 - 2)^2 = 3.24.
    # V moved from 0 to 1 away from -1: the unclipped error 4 counts.
    values = torch.tensor([[1.0, 1.0, 50.0]])
    loss, stats = value_loss(
        values, torch.zeros(1, 3), torch.tensor([[2.0, -1.0, 0.0]]), torch.tensor([[1, 1, 0]]), 0.2
    )
    assert loss.item() == pytest.approx(0.5 * (3.24 + 4) / 2)
    assert stats["clip_fraction"] == 0.5
    unclipped, _ = value_loss(
        values, torch.zeros(1, 3), torch.tensor([[2.0, -1.0, 0.0]]), torch.tensor([[1, 1, 0]]), None
    )
    assert unclipped.item() == pytest.approx(0.5 * (1 + 4) / 2)


def test_micro_batches_add_up_to_the_minibatch(draw):
    logprobs, old, advantages = draw(5, T), draw(5, T), draw(5, T)
    whole, _ = policy_loss(logprobs, old, advantages, GAPS, 0.2)
    parts = [
        policy_loss(logprobs[i : i + 1], old[i : i + 1], advantages[i : i + 1], GAPS[i : i + 1], 0.2, GAPS.sum())[0]
        for i in range(5)
    ]
    torch.testing.assert_close(sum(parts), whole, atol=1e-12, rtol=0)


def test_empty_masks_give_zero():
    zeros, none = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, dtype=torch.bool)
    loss, stats = policy_loss(zeros, zeros.detach(), zeros.detach(), none, 0.2)
    assert loss == 0
    assert stats["ratio_max"] == 0
    assert value_loss(zeros, zeros.detach(), zeros.detach(), none, 0.2)[0] == 0
    assert masked_mean(torch.full((2, 3), float("nan")), none) == 0


def test_score_function_expectation_is_the_gradient_of_the_objective(draw):
    """Bandit, T = 1: E[(r - beta log pi/p) grad log pi] = grad J, through our own rewards, GAE and loss."""
    logits, beta, k = draw(6).requires_grad_(), 0.4, 6
    rewards, reference = draw(k), torch.log_softmax(draw(k), 0)
    ours = torch.log_softmax(logits, 0)
    objective = (ours.exp() * rewards).sum() - beta * (ours.exp() * (ours - reference)).sum()
    (expected,) = torch.autograd.grad(objective, logits, retain_graph=True)
    column = ours[:, None]
    token = token_rewards(rewards, column.detach(), reference[:, None], ones(k, 1), beta)
    advantages, _ = gae(token, torch.zeros(k, 1, dtype=torch.float64), ones(k, 1), 1, 0.95)
    # Each arm weighted by its probability: the expectation over samples.
    weighted = advantages * ours.exp().detach()[:, None]
    loss, _ = policy_loss(column, column.detach(), weighted, ones(k, 1), 0.2, count=1)
    (gradient,) = torch.autograd.grad(-loss, logits)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


def test_shifting_reward_and_value_together_changes_no_advantage(draw):
    scores, values, shift = draw(4), draw(4, T), 3.7
    zeros = torch.zeros(4, T, dtype=torch.float64)
    plain, _ = gae(token_rewards(scores, zeros, zeros, ones(4, T), 0.1), values, ones(4, T), 1, 0.95)
    moved, _ = gae(token_rewards(scores + shift, zeros, zeros, ones(4, T), 0.1), values + shift, ones(4, T), 1, 0.95)
    torch.testing.assert_close(plain, moved, atol=1e-12, rtol=0)
    # The reward alone: by shift x lam^(T-1-t).
    alone, _ = gae(token_rewards(scores + shift, zeros, zeros, ones(4, T), 0.1), values, ones(4, T), 1, 0.95)
    decay = 0.95 ** torch.arange(T - 1, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(alone - plain, (shift * decay).expand(4, T), atol=1e-12, rtol=0)


def test_explained_variance(draw):
    returns = draw(5, T)
    assert explained_variance(returns, returns, GAPS) == pytest.approx(1)
    assert explained_variance(torch.full_like(returns, 3.0), returns, GAPS) == pytest.approx(0, abs=1e-12)
    assert explained_variance(-returns, returns, GAPS) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones_like(returns), GAPS) == 0
