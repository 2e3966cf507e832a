"""Intervals cover, tests hold their level, and everything with an oracle in scipy or on paper equals it."""

import numpy as np
import pytest
from scipy import stats

from ppo_vs_dpo.compare.estimates.statistics import (
    crossed_interval,
    detectable_gap,
    holm,
    mean_interval,
    nested_interval,
    permutation_test,
    prompts_needed,
    prompts_needed_two_arms,
    sign_test,
    two_proportion_z,
    wilson,
    win_rate_interval,
)
from ppo_vs_dpo.compare.judges.scores import preference_by_score


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (3, 10), (158, 256), (10, 10), (255, 512)])
def test_wilson_equals_scipy(wins, n):
    for confidence in (0.9, 0.95, 0.99):
        theirs = stats.binomtest(wins, n).proportion_ci(confidence, method="wilson")
        assert wilson(wins, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_takes_halves_and_nothing():
    low, high = wilson(5.5, 10)
    assert wilson(5, 10)[0] < low < 0.55 < high < wilson(6, 10)[1]
    assert wilson(0, 0) == (0.0, 1.0)


def test_two_arms_of_the_dpo_paper():
    # papers.md a.2: 158/256 against 146/256 is z = 1.08, p = .28; 80 % power at 61 against 57 needs about 2,370.
    z, p = two_proportion_z(158, 256, 146, 256)
    assert z == pytest.approx(1.08, abs=0.005)
    assert p == pytest.approx(0.28, abs=0.005)
    assert prompts_needed_two_arms(0.61, 0.57) == pytest.approx(2370, abs=5)
    assert prompts_needed_two_arms(0.617, 0.57) == pytest.approx(1710, abs=10)


def test_power_line():
    assert 100 * detectable_gap(256) == pytest.approx(8.75, abs=0.01)
    n = prompts_needed(0.05)
    assert detectable_gap(n) <= 0.05 < detectable_gap(n - 1)
    assert prompts_needed(0.0) is None


def test_power_is_what_it_says():
    rng = np.random.default_rng(0)
    n, gap = 256, detectable_gap(256)
    wins = (rng.random((n, 2000)) < 0.5 + gap).astype(float)
    p = permutation_test(wins, resamples=999)
    assert np.mean(p < 0.05) == pytest.approx(0.80, abs=0.03)


def judgements(rng, kind, n, columns):
    """Preferences with a known mean, ``(n, columns)``."""
    if kind == "wins":
        return (rng.random((n, columns)) < 0.62).astype(float), 0.62
    if kind == "ties":
        return rng.choice([0.0, 0.5, 1.0], p=[0.3, 0.2, 0.5], size=(n, columns)), 0.6
    # Four baseline draws a prompt: prompts differ in how often they are won.
    chance = rng.beta(1.2, 0.8, size=(n, columns))
    return rng.binomial(4, chance) / 4, 0.6


@pytest.mark.parametrize("kind", ["wins", "ties", "draws"])
@pytest.mark.parametrize("n", [60, 400])
def test_coverage_over_prompts(kind, n):
    preferences, truth = judgements(np.random.default_rng(3), kind, n, 2000)
    interval = win_rate_interval(preferences, resamples=600)
    assert 0.93 <= np.mean((interval.low <= truth) & (truth <= interval.high)) <= 0.97


def random_effects(rng, seeds, prompts, columns, *, of_seed, of_prompt):
    """``(S, P, K)`` wins with chances that vary by seed and by prompt; the mean is 1/2 by symmetry."""
    logit = rng.normal(0, of_seed, (seeds, 1, columns)) + rng.normal(0, of_prompt, (1, prompts, columns))
    return (rng.random((seeds, prompts, columns)) < 1 / (1 + np.exp(-logit))).astype(float)


@pytest.mark.parametrize(
    ("seeds", "of_seed", "of_prompt"), [(5, 0.4, 1.0), (5, 0.4, 0.0), (5, 0.0, 2.0), (8, 0.15, 1.0), (3, 0.8, 0.5)]
)
def test_coverage_over_seeds_and_shared_prompts(seeds, of_seed, of_prompt):
    rng = np.random.default_rng(11)
    values = random_effects(rng, seeds, 150, 500, of_seed=of_seed, of_prompt=of_prompt)
    interval = crossed_interval(values, resamples=400)
    assert 0.93 <= np.mean((interval.low <= 0.5) & (interval.high >= 0.5)) <= 0.97


def test_coverage_over_seeds_with_prompts_of_their_own():
    rng = np.random.default_rng(5)
    chance = 1 / (1 + np.exp(-rng.normal(0, 0.3, (6, 1, 500))))
    values = (rng.random((6, 120, 500)) < chance).astype(float)
    interval = nested_interval(list(values), resamples=1000)
    assert 0.93 <= np.mean((interval.low <= 0.5) & (interval.high >= 0.5)) <= 0.97


def test_ignoring_seeds_would_not_cover():
    """The negative control: prompts alone, where seeds differ, give intervals that are far too narrow."""
    rng = np.random.default_rng(11)
    values = random_effects(rng, 5, 150, 500, of_seed=0.4, of_prompt=0.0)
    naive = mean_interval(values.reshape(-1, 500), resamples=400)
    assert np.mean((naive.low <= 0.5) & (naive.high >= 0.5)) < 0.75


@pytest.mark.parametrize("n", [10, 100])
def test_false_positives_of_the_permutation_test(n):
    rng = np.random.default_rng(n)
    assert 0.04 <= np.mean(permutation_test(rng.random((n, 4000)), resamples=999) <= 0.05) <= 0.06
    # Many equal sums (ties, few draws) make the test a little shy, never bold.
    discrete = rng.choice([0.0, 0.25, 0.5, 0.75, 1.0], size=(n, 4000))
    assert np.mean(permutation_test(discrete, resamples=999) <= 0.05) <= 0.06


def test_permutation_equals_scipy_where_exact():
    rng = np.random.default_rng(0)
    preferences = rng.choice([0.0, 0.5, 1.0], size=(9, 3), p=[0.2, 0.2, 0.6])
    for column in preferences.T:
        theirs = stats.permutation_test(
            (column - 0.5,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
        )
        # scipy doubles the smaller tail; the null distribution is symmetric, so that is the two-sided count.
        assert permutation_test(column[:, None])[0] == pytest.approx(min(1.0, theirs.pvalue), abs=1e-12)


def test_permutation_monte_carlo_is_near_the_exact_one():
    rng = np.random.default_rng(1)
    wins = (rng.random(200) < 0.57).astype(float)
    exact = stats.binomtest(int(wins.sum()), 200).pvalue
    assert permutation_test(wins[:, None], resamples=20000)[0] == pytest.approx(exact, abs=0.01)
    assert sign_test(wins) == pytest.approx(exact, abs=1e-12)


def test_sign_test_leaves_ties_out():
    assert sign_test(np.array([1.0] * 8 + [0.5] * 50 + [0.0] * 2)) == pytest.approx(stats.binomtest(8, 10).pvalue)
    assert sign_test(np.full(5, 0.5)) == 1.0


def test_holm_against_the_definition():
    p = np.array([0.01, 0.04, 0.03, 0.005])
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_holm_keeps_the_family_error():
    rng = np.random.default_rng(0)
    p = rng.random((4000, 10))
    any_false = np.mean([(holm(row) <= 0.05).any() for row in p])
    assert any_false == pytest.approx(0.05, abs=0.012)


def test_unanimous_preferences_get_wilsons_interval():
    interval = win_rate_interval(np.ones((40, 1)))
    assert interval.ci(0) == pytest.approx(wilson(40, 40))
    assert interval.low[0] < 0.95


def test_intervals_are_reproducible_and_paired():
    rng = np.random.default_rng(0)
    preferences = rng.random((50, 2))
    first, second = (win_rate_interval(preferences, seed=4) for _ in range(2))
    assert first.ci(0) == second.ci(0)
    both = np.concatenate([preferences, 1 - preferences], axis=1)
    interval = win_rate_interval(both, seed=4)
    assert interval.low[2:] == pytest.approx(1 - interval.high[:2], abs=1e-12)


def test_one_prompt_says_nothing():
    low, high = win_rate_interval(np.array([[0.75]])).ci(0)
    assert high - low > 0.7
    assert np.isnan(mean_interval(np.array([3.0])).low)


def test_one_seed_is_the_plain_interval():
    values = np.random.default_rng(0).random((40, 2))
    plain = mean_interval(values)
    for pooled in (crossed_interval(values[None]), nested_interval([values])):
        assert pooled.low == pytest.approx(plain.low)


def test_a_policy_against_itself_is_one_half_with_an_interval():
    """On the same draws exactly; with the two sides of a pair the win rates add up to 1 exactly."""
    scores = np.random.default_rng(0).normal(size=(80, 4)).round(1)
    weights = np.full(scores.shape, 0.25)
    preference, ties = preference_by_score(scores, scores, weights, weights)
    assert preference == pytest.approx(np.full(80, 0.5), abs=1e-15)
    assert ties.min() >= 0.25 - 1e-12
    low, high = win_rate_interval(preference[:, None]).ci(0)
    assert low < 0.5 < high
    others = np.random.default_rng(1).normal(size=(80, 4)).round(1)
    one, _ = preference_by_score(scores, others, weights, weights)
    two, _ = preference_by_score(others, scores, weights, weights)
    assert (one + two == 1.0).all()
