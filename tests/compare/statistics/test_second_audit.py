"""What a second referee found: skewed preferences, rates near 1, unequal clusters, KLs between policies, controls.

Each simulation is short; `make audit` has the long ones.
"""

import numpy as np
import pytest
from scipy import stats

from ppo_vs_dpo.compare.estimates.allowed import upper_of_direct
from ppo_vs_dpo.compare.estimates.length_control import length_controlled
from ppo_vs_dpo.compare.judges.noise import Repeated, corrected
from ppo_vs_dpo.compare.sampling.best_of_n import own_judge_p, pool_weights
from ppo_vs_dpo.compare.statistics.intervals import spread
from ppo_vs_dpo.compare.statistics.rates import rate_over, rates_over, win_rate_interval, win_rate_p
from ppo_vs_dpo.compare.statistics.significance import sign_flip_p


def covered(interval, truth):
    return np.mean((interval.low <= truth + 1e-12) & (interval.high >= truth - 1e-12))


@pytest.mark.parametrize("n", [16, 64, 128])
def test_few_wins_among_ties(n):
    """Skewed preferences: covered, no false "beats", no false "equal"; plain wins are as they were."""
    rng, trials = np.random.default_rng(n), 1500
    ours, theirs = (rng.random((n, trials)) < 0.1) * 1.0, (rng.random((n, trials, 4)) < 0.03) * 1.0
    rare = 0.5 + 0.5 * np.sign(ours[..., None] - theirs).mean(-1)
    assert covered(win_rate_interval(rare), 0.535) > 0.93
    weak = np.where(rng.random((n, trials)) < 0.05, 1.0, 0.5 - 0.05 * 0.5 / 0.95)
    p, interval = win_rate_p(weak), win_rate_interval(weak)
    assert np.mean(p <= 0.05) < 0.06
    assert np.array_equal(p <= 0.05, (interval.low > 0.5) | (interval.high < 0.5))
    inner = win_rate_interval(np.where(rng.random((n, trials)) < 0.1, 1.0, 0.5), confidence=0.9)
    assert np.mean(np.maximum(0.5 - inner.low, inner.high - 0.5) <= 0.05) < 0.06
    # Plain wins and losses: Wilson's own interval with t in place of z, of n - 1 (the variance knows its mean).
    counts = (np.arange(n)[:, None] < np.arange(n // 3, 2 * n // 3)).astype(float)
    share, a = counts.mean(axis=0), stats.t.ppf(0.975, n - 1) ** 2 / (n - 1)
    wilson = (share + a / 2 - np.sqrt(a * share * (1 - share) + a**2 / 4)) / (1 + a)
    assert win_rate_interval(counts).low == pytest.approx(wilson, abs=1e-9)


@pytest.mark.parametrize("base", [1, 4])
def test_best_of_sixteen_by_its_own_judge(base):
    """16/17, from few prompts: covered, and the control fails one report in a hundred by its exact law."""
    rng, trials, n = np.random.default_rng(base), 500, 16
    pool, drawn = rng.standard_normal((trials, n, 20)), rng.standard_normal((trials, n, base))
    weights = pool_weights(pool.reshape(-1, 20), 16).reshape(pool.shape)
    values = np.einsum("tni,tnij->tn", weights, (pool[..., :, None] > drawn[..., None, :]) * 1.0) / base
    assert covered(win_rate_interval(values.T), 16 / 17) > 0.95
    p = own_judge_p(values.mean(axis=1), 16, 20, base, n)
    assert np.mean(p <= 0.01) <= 0.025
    assert np.mean(p <= 0.2) <= 0.26
    # A pool of another law than the baseline is seen.
    assert own_judge_p(float(values.mean()) - 0.12, 16, 20, base, 200) < 0.001


def test_law_of_best_of_n_by_hand():
    """Best of 2 of 2 against one draw on one prompt: it wins in two of three orders."""
    assert own_judge_p(1.0, 2, 2, 1, 1) == pytest.approx(1.0)
    assert own_judge_p(0.0, 2, 2, 1, 1) == pytest.approx(2 / 3, abs=1e-3)


def test_dialogues_of_unequal_size():
    rng, found = np.random.default_rng(3), []
    for _ in range(25):
        labels = np.repeat(np.arange(16), rng.geometric(1 / 6, 16))
        latent = np.sqrt(0.9) * rng.standard_normal((16, 60))[labels]
        latent = latent + np.sqrt(0.1) * rng.standard_normal((len(labels), 60))
        found.append(covered(win_rate_interval((latent > 0) * 1.0, clusters=labels), 0.5))
    assert np.mean(found) > 0.925
    # Equal sizes: their means.
    values = rng.random((12, 1))
    by_pair = win_rate_interval(values, clusters=np.repeat(np.arange(6), 2))
    alone = win_rate_interval(values.reshape(6, 2).mean(1)[:, None])
    assert by_pair.ci(0) == pytest.approx(alone.ci(0))


def test_length_control_knows_of_dialogues():
    rng, found, without = np.random.default_rng(4), [], []
    for _ in range(120):
        labels = np.repeat(np.arange(40), rng.geometric(0.4, 40))
        difference = rng.normal(0, 20, len(labels))
        latent = np.tanh(difference / 20) + 2 * rng.standard_normal(40)[labels] + rng.logistic(size=len(labels))
        won = (latent > 0) * 1.0
        for list_, clusters in ((found, labels), (without, None)):
            fit = length_controlled(won, difference, clusters=clusters)
            list_.append(fit.ci[0] <= 0.5 <= fit.ci[1])
    assert np.mean(found) > 0.915 > np.mean(without)


@pytest.mark.parametrize(("theta", "n"), [(0.95, 16), (0.95, 64), (0.8, 29)])
def test_a_judge_that_was_asked_again(theta, n):
    rng, found = np.random.default_rng(5), []
    for _ in range(200):
        verdicts = ((rng.random(n) < theta)[:, None, None] ^ (rng.random((n, 2, 2)) < 0.05)).astype(float)
        squared = ((verdicts[..., 0] - verdicts[..., 1]) ** 2).mean(1)
        fit = corrected([Repeated(verdicts.mean((1, 2)), squared, squared)], confidence=0.95)
        if "ci" in fit:
            found.append(fit["ci"][0] <= theta <= fit["ci"][1])
    assert np.mean(found) > 0.92


@pytest.mark.parametrize("shared", [True, False])
def test_several_seeds_near_one(shared):
    rng, trials, truth = np.random.default_rng(6), 400, 0.95
    latent = stats.norm.ppf(truth) * np.sqrt(5.09) + 2 * rng.standard_normal((1 if shared else 3, 16, trials))
    latent = latent + 0.3 * rng.standard_normal((3, 1, trials))
    values = (rng.random((3, 16, trials)) < stats.norm.cdf(np.broadcast_to(latent, (3, 16, trials)))) * 1.0
    assert covered(rates_over(spread(list(values), shared=shared), 0.95), truth) > 0.93
    # Interval and p are one statement, and unanimous runs are not certain.
    for k in range(40):
        interval, p, _ = rate_over(list(values[:, :, k]), shared=shared)
        assert (p <= 0.05) == (not interval.low <= 0.5 <= interval.high)
    unanimous, _, units = rate_over([np.ones(10)] * 3, shared=shared)
    assert unanimous.low < 0.93
    assert units == (10 if shared else 28)


@pytest.mark.parametrize("kl", [0.1, 1.0, 4.0])
def test_the_upper_end_of_a_kl_between_policies(kl):
    """k3 alone lies below a KL of 4 nats in one report of six at n = 128."""
    rng = np.random.default_rng(7)
    ratio = kl + np.sqrt(2 * kl) * rng.standard_normal((128, 1500))
    k1, k3 = spread([ratio]), spread([np.expm1(-ratio) + ratio])
    assert np.mean(upper_of_direct(k1, k3)[1] < kl) < 0.017
    if kl == 4.0:
        assert np.mean(k3.interval(0.99).high < kl) > 0.1


def test_swaps_of_verdicts_are_counted_exactly():
    """No random seed: the binomial for plain wins, all swaps for thirds and quarters."""
    rng = np.random.default_rng(8)
    wins = (rng.random((40, 3)) < 0.6).astype(float)
    exact = [stats.binomtest(int(one.sum()), 40).pvalue for one in wins.T]
    assert sign_flip_p(wins, seed=1) == pytest.approx(exact, abs=1e-9)
    mixed = rng.choice([0, 1 / 4, 1 / 3, 1 / 2, 3 / 4, 1], size=(14, 1))
    signs = 1.0 - 2.0 * ((np.arange(2**14)[:, None] >> np.arange(14)) & 1)
    every = np.abs(signs @ (mixed - 0.5)) >= abs((mixed - 0.5).sum()) - 1e-9
    assert sign_flip_p(mixed) == pytest.approx(every.mean(), abs=1e-9)
    assert sign_flip_p(np.full((20, 1), 0.5)) == pytest.approx(1.0)


def test_skew_moves_ends_outwards_only():
    values = np.random.default_rng(9).lognormal(0, 1, (29, 4))
    both, out, plain = (spread([values], **how) for how in ({}, {"outward": True}, {"by_skewness": False}))
    both, out, plain = (one.interval(0.95) for one in (both, out, plain))
    assert out.high == pytest.approx(both.high)
    assert out.low == pytest.approx(plain.low)
    assert (both.low > plain.low).all()
