"""Token rewards, GAE and whitening against their definitions and closed forms, in float64."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from ppo_vs_dpo.ppo.algorithm import gae, token_rewards, whiten
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.rollouts.advantages import with_values
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout
from tests.ppo.conftest import GAPS, T, ones


def reference_gae(rewards, values, gamma, lam):
    """The definition, term by term: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    rewards, values = np.asarray(rewards), np.asarray(values)
    n = len(rewards)
    delta = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0) - values[t] for t in range(n)]
    return np.array([sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_its_definition(draw, gamma, lam):
    rewards, values = draw(3, T), draw(3, T)
    advantages, returns = gae(rewards, values, ones(3, T), gamma, lam)
    for row in range(3):
        expected = reference_gae(rewards[row], values[row], gamma, lam)
        np.testing.assert_allclose(advantages[row], expected, atol=1e-12)
    torch.testing.assert_close(returns, advantages + values, atol=1e-12, rtol=0)


def test_gae_lambda_1_is_rewards_to_go_minus_value(draw):
    rewards, values = draw(2, T), draw(2, T)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(gae(rewards, values, ones(2, T), 1, 1)[0], to_go - values, atol=1e-12, rtol=0)


def test_gae_lambda_0_is_the_td_error(draw):
    rewards, values = draw(2, T), draw(2, T)
    following = torch.cat([values[:, 1:], torch.zeros(2, 1)], dim=1)
    expected = rewards + 0.9 * following - values
    torch.testing.assert_close(gae(rewards, values, ones(2, T), 0.9, 0)[0], expected, atol=1e-12, rtol=0)


def test_gae_constant_value_terminal_reward():
    score, constant, lam = 1.7, 0.4, 0.95
    rewards = torch.zeros(1, T, dtype=torch.float64)
    rewards[0, -1] = score
    advantages, _ = gae(rewards, torch.full((1, T), constant, dtype=torch.float64), ones(1, T), 1, lam)
    expected = [lam ** (T - 1 - t) * (score - constant) for t in range(T)]
    np.testing.assert_allclose(advantages[0], expected, atol=1e-12)


def test_gae_zero_value_with_kl_penalties(draw):
    beta, lam, score = 0.1, 0.95, torch.tensor([1.3], dtype=torch.float64)
    kappa = draw(1, T)
    rewards = token_rewards(score, kappa, torch.zeros(1, T, dtype=torch.float64), ones(1, T), beta)
    advantages, _ = gae(rewards, torch.zeros(1, T, dtype=torch.float64), ones(1, T), 1, lam)
    expected = [
        lam ** (T - 1 - t) * 1.3 - beta * sum(lam ** (j - t) * kappa[0, j].item() for j in range(t, T))
        for t in range(T)
    ]
    np.testing.assert_allclose(advantages[0], expected, atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_exact_values_give_zero_mean_advantages(lam):
    """E[A_t | s_t] = 0 for every lambda when V is the expected return: enumerate a two-step tree."""
    generator = np.random.default_rng(0)
    first, second = generator.dirichlet(np.ones(3)), generator.dirichlet(np.ones(3), size=3)
    r1, r2 = generator.normal(size=3), generator.normal(size=(3, 3))
    v1 = (second * r2).sum(1)
    v0 = (first * (r1 + v1)).sum()
    paths = list(itertools.product(range(3), repeat=2))
    rewards = torch.tensor([[r1[a], r2[a, b]] for a, b in paths])
    values = torch.tensor([[v0, v1[a]] for a, b in paths])
    advantages, _ = gae(rewards, values, ones(9, 2), 1, lam)
    weights = torch.tensor([first[a] * second[a, b] for a, b in paths])
    assert abs((weights * advantages[:, 0]).sum()) < 1e-12
    for a in range(3):
        rows = [i for i, path in enumerate(paths) if path[0] == a]
        assert abs(sum(second[a, paths[i][1]] * advantages[i, 1].item() for i in rows)) < 1e-12


def test_gae_steps_over_gaps_and_ignores_masked_positions(draw):
    rewards, values = draw(5, T), draw(5, T)
    advantages, returns = gae(rewards, values, GAPS, 0.97, 0.9)
    for row, mask in enumerate(GAPS):
        expected = np.zeros(T)
        expected[mask.numpy()] = reference_gae(rewards[row][mask], values[row][mask], 0.97, 0.9)
        np.testing.assert_allclose(advantages[row], expected, atol=1e-12)
        np.testing.assert_allclose(returns[row][mask], expected[mask.numpy()] + values[row][mask].numpy(), atol=1e-12)
    noise = torch.where(GAPS, 0, torch.full_like(rewards, float("nan")))
    again, returns_again = gae(rewards + noise, values + noise, GAPS, 0.97, 0.9)
    assert torch.equal(advantages, again)
    assert torch.equal(returns, returns_again)


def test_gae_of_a_padded_batch_is_that_of_each_row_alone(draw):
    lengths = [7, 3, 1, 5]
    rewards, values = draw(4, T), draw(4, T)
    mask = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    advantages, _ = gae(rewards, values, mask, 1, 0.95)
    for row, length in enumerate(lengths):
        alone, _ = gae(rewards[row : row + 1, :length], values[row : row + 1, :length], ones(1, length), 1, 0.95)
        assert torch.equal(advantages[row, :length], alone[0])
        assert not advantages[row, length:].any()


def test_gae_without_columns():
    advantages, returns = gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0), 1, 0.95)
    assert advantages.shape == returns.shape == (2, 0)


def test_token_rewards_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -9.0]])
    reference = torch.tensor([[-1.5, -2.0, -2.0], [-2.0, -1.0, 7.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), logprobs, reference, mask, 0.1)
    expected = torch.tensor([[-0.05, 0.0, 2.1], [-0.1, -1.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_token_rewards_sum_to_score_minus_sequence_log_ratio(draw):
    logprobs, reference, scores = draw(5, T), draw(5, T), draw(5)
    rewards = token_rewards(scores, logprobs, reference, GAPS, 0.3)
    log_ratio = torch.where(GAPS, logprobs - reference, 0).sum(1)
    expected = torch.where(GAPS.any(1), scores - 0.3 * log_ratio, 0)
    torch.testing.assert_close(rewards.sum(1), expected, atol=1e-12, rtol=0)
    # The score is on the last real token, and nothing is at masked positions.
    bare = token_rewards(scores, logprobs, logprobs, GAPS, 0.3)
    for row, mask in enumerate(GAPS):
        where = bare[row].nonzero().squeeze(-1).tolist()
        assert where == ([int(mask.nonzero().max())] if mask.any() else [])


def test_token_rewards_ignore_masked_garbage(draw):
    logprobs, reference, scores = draw(5, T), draw(5, T), draw(5)
    clean = token_rewards(scores, logprobs, reference, GAPS, 0.3, "k3")
    dirty = torch.where(GAPS, logprobs, float("inf"))
    assert torch.equal(
        clean, token_rewards(scores, dirty, torch.where(GAPS, reference, float("nan")), GAPS, 0.3, "k3")
    )


def test_score_mask_moves_the_score():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    longer = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    zeros = torch.zeros(2, 4)
    rewards = token_rewards(torch.tensor([5.0, 6.0]), zeros, zeros, mask, 0.1, score_mask=longer)
    assert rewards.tolist() == [[0, 0, 5, 0], [0, 0, 0, 6]]


def test_whitening_over_the_mask_only(draw):
    x = 3 + 2 * draw(5, T)
    whitened = whiten(x, GAPS)
    real = whitened[GAPS]
    assert abs(real.mean()) < 1e-12
    assert abs(real.var(unbiased=False) - 1) < 1e-7
    assert not whitened[~GAPS].any()
    assert torch.equal(whitened, whiten(torch.where(GAPS, x, 1e9), GAPS))
    kept = whiten(x, GAPS, shift_mean=False)
    assert abs(kept[GAPS].mean() - x[GAPS].mean()) < 1e-12
    assert abs(whiten(x, GAPS, unbiased=True)[GAPS].var(unbiased=True) - 1) < 1e-7


def test_whitening_of_nothing_and_of_one():
    nothing = whiten(torch.randn(2, 3), torch.zeros(2, 3))
    assert not nothing.any()
    one = whiten(torch.tensor([[5.0, 1.0]]), torch.tensor([[1, 0]]), unbiased=True)
    assert one.tolist() == [[0, 0]]


def test_decoupled_and_adaptive_lambda(draw):
    """VAPO: a row's lambda goes by its length, 1 - 1/(alpha l); targets have their own, 1 giving sums of rewards."""
    rewards, values = draw(5, T), draw(5, T)
    empty = Rollout.empty([[1]] * 5, [[1] * T] * 5, [True] * 5, 0)
    rollout = dataclasses.replace(empty, rewards=rewards, values=values, mask=GAPS, value_mask=GAPS)
    args = PPOConfig(report_to="none", gamma=1.0, lam_alpha=0.5, value_lam=1.0)
    advantages, returns = with_values(rollout, args)
    lengths = GAPS.sum(1)
    for row, lam in enumerate((1 - 2 / lengths.clamp_min(1)).clamp_min(0).tolist()):
        alone, _ = gae(rewards[row : row + 1], values[row : row + 1], GAPS[row : row + 1], 1.0, lam)
        torch.testing.assert_close(advantages[row], alone[0], atol=1e-12, rtol=0)
    to_go = torch.where(GAPS, rewards, 0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, torch.where(GAPS, to_go, 0), atol=1e-12, rtol=0)
    plain = with_values(rollout, PPOConfig(report_to="none", gamma=1.0, lam=0.9))
    assert all(torch.equal(a, b) for a, b in zip(plain, gae(rewards, values, GAPS, 1.0, 0.9), strict=True))
