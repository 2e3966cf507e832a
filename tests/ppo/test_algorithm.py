"""The pure functions against closed forms (enumeration, numpy, hand-worked numbers), in float64."""

import itertools

import numpy as np
import pytest
import torch

from ppo.algorithm import (
    AdaptiveKL,
    FixedKL,
    explained_variance,
    gae,
    kl_estimate,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)

T = 7


@pytest.fixture
def draw():
    """Random float64 tensors from one seeded generator."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return make


def ones(*shape):
    return torch.ones(*shape, dtype=torch.bool)


GAPS = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 0, 1, 1, 0, 1, 0],
        [0, 0, 1, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
    ],
    dtype=torch.bool,
)


# ------------------------------------------------------------------------------------------------ GAE


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


# ------------------------------------------------------------------------------------------------ rewards


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


# ------------------------------------------------------------------------------------------------ KL estimators


@pytest.fixture
def two_policies(draw):
    logits = draw(6).requires_grad_()
    return logits, torch.log_softmax(logits, 0), torch.log_softmax(draw(6), 0)


def test_estimators_in_expectation(two_policies):
    _, ours, reference = two_policies
    pi = ours.exp().detach()
    kl = (pi * (ours - reference)).sum()
    expect = {k: (pi * kl_estimate(ours, reference, k)).sum() for k in ("k1", "k2", "k3")}
    assert abs(expect["k1"] - kl) < 1e-12
    assert abs(expect["k3"] - kl) < 1e-12
    assert abs(expect["k2"] - (pi * (ours - reference) ** 2).sum() / 2) < 1e-12
    assert abs(expect["k2"] - kl) > 1e-3  # k2 is biased
    assert (kl_estimate(ours, reference, "k3") >= 0).all()


def test_gradients_of_estimators_as_losses(two_policies):
    logits, ours, reference = two_policies
    pi = ours.exp()
    fixed = pi.detach()

    def gradient(x):
        return torch.autograd.grad(x, logits, retain_graph=True)[0]

    reverse = gradient((pi * (ours - reference)).sum())
    forward = gradient((reference.exp() * (reference - ours)).sum())
    as_loss = {k: gradient((fixed * kl_estimate(ours, reference, k)).sum()) for k in ("k1", "k2", "k3")}
    assert as_loss["k1"].abs().max() < 1e-12
    torch.testing.assert_close(as_loss["k2"], reverse, atol=1e-12, rtol=0)
    torch.testing.assert_close(as_loss["k3"], forward, atol=1e-12, rtol=0)
    in_reward = gradient((fixed * kl_estimate(ours, reference, "k1").detach() * ours).sum())
    torch.testing.assert_close(in_reward, reverse, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("mu", "tolerance"), [(0.1, 5e-6), (1.0, 5e-4)])
def test_estimators_of_gaussians(mu, tolerance):
    """q = N(0,1), p = N(mu,1): KL mu^2/2, k2 high by the factor 1 + mu^2/4, std of k1 2/mu times KL. By quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    ours, theirs = torch.tensor(-(nodes**2) / 2), torch.tensor(-((nodes - mu) ** 2) / 2)
    k1, k2, k3 = (kl_estimate(ours, theirs, k).numpy() for k in ("k1", "k2", "k3"))
    kl = mu**2 / 2
    assert abs((weights * k1).sum() - kl) < tolerance
    assert abs((weights * k3).sum() - kl) < tolerance
    assert abs((weights * k2).sum() / kl - 1 - mu**2 / 4) < tolerance
    assert abs(((weights * (k1 - kl) ** 2).sum()) ** 0.5 / kl - 2 / mu) < tolerance


def test_unknown_estimator():
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


# ------------------------------------------------------------------------------------------------ whitening


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


# ------------------------------------------------------------------------------------------------ losses


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


# ------------------------------------------------------------------------------------------------ KL controllers


def test_adaptive_controller():
    """Twice the target, 512 episodes, horizon 10,000: x 1.01024 (Ziegler et al. 2019)."""
    controller = AdaptiveKL(0.2, 6.0, 10_000)
    controller.update(12.0, 512)
    assert controller.coef == pytest.approx(0.2 * 1.01024, rel=1e-12)
    controller.update(6.0, 512)
    assert controller.coef == pytest.approx(0.2 * 1.01024, rel=1e-12)
    controller.update(-100.0, 512)  # clipped at -20 %
    assert controller.coef == pytest.approx(0.2 * 1.01024 * (1 - 0.2 * 512 / 10_000), rel=1e-12)
    other = AdaptiveKL(1.0, 6.0, 10_000)
    other.load_state_dict(controller.state_dict())
    assert other.coef == controller.coef
    with pytest.raises(ValueError, match="positive"):
        AdaptiveKL(0.2, 0.0, 10_000)


def test_fixed_controller():
    controller = FixedKL(0.2)
    controller.update(100.0, 512)
    assert controller.coef == 0.2
