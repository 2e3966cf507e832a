"""Intervals cover, over prompts and over seeds; what has an oracle in scipy or on paper equals it."""

import numpy as np
import pytest
from scipy import stats

from ppo_vs_dpo.compare.statistics.intervals import by_cluster, jackknife, mean_interval, spread, without_each
from ppo_vs_dpo.compare.statistics.rates import wilson, win_rate_interval, win_rate_p


def coverage(interval, truth):
    """Share of columns whose interval holds the truth."""
    return np.mean((interval.low <= truth + 1e-12) & (interval.high >= truth - 1e-12))


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (3, 10), (158, 256), (10, 10), (255, 512)])
def test_wilson_equals_scipy(wins, n):
    for confidence in (0.9, 0.95, 0.99):
        theirs = stats.binomtest(wins, n).proportion_ci(confidence, method="wilson")
        assert wilson(wins, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_takes_halves_and_nothing():
    low, high = wilson(5.5, 10)
    assert wilson(5, 10)[0] < low < 0.55 < high < wilson(6, 10)[1]
    assert wilson(0, 0) == (0.0, 1.0)


def preferences_with(rng, kind, n, columns):
    """Preferences with a known mean, ``(n, columns)``."""
    if kind == "wins":
        return (rng.random((n, columns)) < 0.62).astype(float), 0.62
    if kind == "near 1":
        return (rng.random((n, columns)) < 0.9).astype(float), 0.9
    if kind == "ties":
        return rng.choice([0.0, 0.5, 1.0], p=[0.3, 0.2, 0.5], size=(n, columns)), 0.6
    # Four baseline draws a prompt: prompts differ in how often they are won.
    chance = rng.beta(1.2, 0.8, size=(n, columns))
    return rng.binomial(4, chance) / 4, 0.6


@pytest.mark.parametrize("kind", ["wins", "near 1", "ties", "draws"])
@pytest.mark.parametrize("n", [16, 60, 400])
def test_win_rates_are_covered(kind, n):
    preferences, truth = preferences_with(np.random.default_rng(3), kind, n, 3000)
    least = 0.93 if n > 16 else 0.925
    assert least <= coverage(win_rate_interval(preferences), truth) <= 0.985


def test_several_draws_are_not_given_wilsons_width():
    """Four draws a side: preferences are steady, and the interval is half as wide as that of plain wins and losses."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.random((64, 1000, 4)), rng.random((64, 1000, 4))
    preferences = 0.5 + 0.5 * np.sign(ours[..., :, None] - theirs[..., None, :]).mean((-1, -2))
    interval = win_rate_interval(preferences)
    assert 0.93 <= coverage(interval, 0.5) <= 0.97
    low, high = wilson(32, 64)
    assert (interval.high - interval.low).mean() < 0.55 * (high - low)


@pytest.mark.parametrize("n", [16, 29, 128, 512])
@pytest.mark.parametrize("log_deviation", [0.5, 1.0])
def test_skewed_kl_is_covered(n, log_deviation):
    """KLs differ between prompts by orders of magnitude; a t interval would miss the truth above it in 15
    % (n = 16).
    """
    rng = np.random.default_rng(n)
    values = rng.lognormal(-(log_deviation**2) / 2, log_deviation, size=(n, 8000))
    assert 0.928 <= coverage(mean_interval(values), 1.0) <= 0.97
    if n == 16 and log_deviation == 1.0:
        assert coverage(mean_interval(values, by_skewness=False), 1.0) < 0.88


def test_without_skewness_it_is_the_t_interval():
    values = np.random.default_rng(0).normal(size=(20, 3))
    ours = mean_interval(values, by_skewness=False)
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert ours.low == pytest.approx(theirs.low, abs=1e-9)
    assert ours.high == pytest.approx(theirs.high, abs=1e-9)
    p = spread([values], by_skewness=False).p_value(0.1)
    assert p == pytest.approx(stats.ttest_1samp(values, 0.1).pvalue, abs=1e-9)


def test_p_value_is_where_the_interval_touches():
    rng = np.random.default_rng(2)
    for shared in (True, False):
        found = spread([rng.exponential(size=(30, 4)) for _ in range(3)], shared=shared)
        p = found.p_value(1.1)
        for column in range(4):
            interval = found.interval(1 - p[column])
            edge = interval.high if found.mean[column] < 1.1 else interval.low
            assert edge[column] == pytest.approx(1.1, abs=1e-6)


def over_seeds(rng, seeds, prompts, columns, *, of_seed, of_prompt, shared, draws=1):
    """``(S, P, K)`` preferences around 1/2, with chances that vary by seed and by prompt."""
    chance = 0.5 + rng.normal(0, of_seed, (seeds, 1, columns))
    chance = chance + rng.normal(0, of_prompt, (1 if shared else seeds, prompts, columns))
    return rng.binomial(draws, np.clip(chance, 0, 1)) / draws


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("of_seed", "of_prompt", "draws"), [(0, 0, 1), (0, 0.3, 1), (0.02, 0.3, 20), (0.1, 0.1, 4)])
def test_seeds_and_prompts_are_covered(shared, seeds, of_seed, of_prompt, draws):
    rng = np.random.default_rng(11)
    values = over_seeds(rng, seeds, 64, 1200, of_seed=of_seed, of_prompt=of_prompt, shared=shared, draws=draws)
    found = spread(list(values), shared=shared)
    # Two seeds that share strong prompts are covered a little too well: t with one degree of freedom on both parts.
    assert 0.935 <= coverage(found.interval(0.95), 0.5) <= (0.992 if seeds == 2 else 0.985)
    assert np.mean(found.p_value(0.5) <= 0.05) <= 0.065


def test_ignoring_what_runs_share_would_not_cover():
    """The negative control: a t-test over run means calls prompts that all runs share a difference."""
    rng = np.random.default_rng(1)
    values = over_seeds(rng, 5, 64, 800, of_seed=0, of_prompt=0.3, shared=True, draws=20)
    assert np.mean(stats.ttest_1samp(values.mean(axis=1), 0.5).pvalue <= 0.05) > 0.25
    assert np.mean(spread(list(values), shared=True).p_value(0.5) <= 0.05) < 0.065


def test_two_seeds_by_hand():
    """[.55] and [.60] alone: t with one degree of freedom, where a bootstrap of two values knows three means."""
    values = [np.full((40, 1), rate) + 1e-9 * np.random.default_rng(0).normal(size=(40, 1)) for rate in (0.55, 0.60)]
    low, high = spread(values, by_skewness=False).interval(0.95).ci(0)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 1, 0.575, 0.025), abs=1e-6)


def test_seeds_that_agree_by_luck_are_not_believed():
    rng = np.random.default_rng(0)
    one = (rng.random((200, 1)) < 0.6).astype(float)
    low, high = spread([one, one[::-1]]).interval(0.95).ci(0)
    error = one.std(ddof=1) / np.sqrt(400)
    assert high - low == pytest.approx(1.96 * error, rel=0.02)


def test_clusters_are_one_unit():
    """Every prompt twice: as if there were half as many; and the share of a ratio, clusters of unequal
    size included.
    """
    rng = np.random.default_rng(5)
    values = rng.integers(0, 2, (32, 2000)).astype(float)
    twice, labels = np.repeat(values, 2, axis=0), np.repeat(np.arange(32), 2)
    assert coverage(win_rate_interval(twice), 0.5) < 0.9
    assert coverage(win_rate_interval(twice, clusters=labels), 0.5) >= 0.94
    once, again = win_rate_interval(values), win_rate_interval(twice, clusters=labels)
    assert once.low == pytest.approx(again.low)
    sizes = rng.integers(1, 6, 60)
    labels = np.repeat(np.arange(60), sizes)
    of_cluster = rng.normal(0, 0.2, (60, 1500))
    uneven = np.clip(0.5 + of_cluster[labels] + rng.normal(0, 0.1, (len(labels), 1500)), 0, 1)
    assert by_cluster(uneven, labels).mean(axis=0) == pytest.approx(uneven.mean(axis=0))
    assert coverage(mean_interval(uneven), 0.5) < 0.85
    assert 0.925 <= coverage(mean_interval(uneven, clusters=labels), 0.5) <= 0.97


def test_jackknife_of_a_mean_is_the_mean():
    values = np.random.default_rng(0).random((30, 2))
    pseudo = jackknife(without_each(values), values.mean(axis=0))
    assert pseudo == pytest.approx(values, abs=1e-12)


def test_unanimous_preferences_get_wilsons_interval():
    low, high = win_rate_interval(np.ones((40, 1))).ci(0)
    assert high == 1.0
    # z becomes t with 39 degrees of freedom.
    assert low == pytest.approx(40 / (40 + stats.t.ppf(0.975, 39) ** 2))
    assert win_rate_p(np.ones((40, 1)))[0] < 1e-6


def test_both_directions_mirror_each_other():
    preferences = np.random.default_rng(0).random((50, 2))
    both = win_rate_interval(np.concatenate([preferences, 1 - preferences], axis=1))
    assert both.low[2:] == pytest.approx(1 - both.high[:2], abs=1e-12)


def test_one_prompt_says_nothing():
    low, high = win_rate_interval(np.array([[0.75]])).ci(0)
    assert (low, high) == (0.0, 1.0)
    assert np.isnan(mean_interval(np.array([3.0])).low)


def test_one_seed_is_the_plain_interval():
    values = np.random.default_rng(0).random((40, 2))
    plain = mean_interval(values)
    for shared in (True, False):
        assert spread([values], shared=shared).interval(0.95).low == pytest.approx(plain.low)
