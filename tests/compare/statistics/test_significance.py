"""Tests hold their level, never contradict their interval, and equal what scipy and enumeration say."""

import itertools

import numpy as np
import pytest
from scipy import stats

from ppo_vs_dpo.compare.judges.scores import preference_by_score
from ppo_vs_dpo.compare.statistics.rates import win_rate_interval
from ppo_vs_dpo.compare.statistics.significance import (
    better_than_chance,
    detectable_gap,
    holm,
    label_permutation_p,
    prompts_for_equality,
    sign_flip_p,
    sign_test,
    win_rates_with_p,
)


def mean_preference(ours, theirs):
    """``(P,)`` over all pairs of draws."""
    return 0.5 + 0.5 * np.sign(ours[:, :, None] - theirs[:, None, :]).mean((1, 2))


def test_power():
    assert 100 * detectable_gap(256) == pytest.approx(8.75, abs=0.01)
    assert detectable_gap(785) <= 0.05 < detectable_gap(784)
    # Preferences that are all equal show nothing of the next prompt.
    assert detectable_gap(64, 0.0) > 0.02


def test_power_is_what_it_says():
    rng = np.random.default_rng(0)
    wins = (rng.random((256, 2000)) < 0.5 + detectable_gap(256)).astype(float)
    _, p = win_rates_with_p(wins, flips=999)
    assert np.mean(p < 0.05) == pytest.approx(0.80, abs=0.03)
    # Few seeds: by the noncentral t.
    runs, error = 3, 0.02
    gap = detectable_gap(runs, 0.5, freedom=runs - 1) / (0.5 / np.sqrt(runs)) * error
    means = 0.5 + gap + rng.normal(0, error * np.sqrt(runs), (runs, 20_000))
    assert np.mean(stats.ttest_1samp(means, 0.5).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)


def test_equality_needs_so_many():
    """Two one-sided tests at the prompts they ask for: equal policies are called equal four times in five."""
    n = prompts_for_equality(0.05)
    wins = (np.random.default_rng(1).random((n, 4000)) < 0.5).astype(float)
    inside = win_rate_interval(wins, confidence=0.9)
    assert np.mean((inside.low > 0.45) & (inside.high < 0.55)) == pytest.approx(0.8, abs=0.03)
    edge = win_rate_interval((np.random.default_rng(2).random((n, 4000)) < 0.55).astype(float), confidence=0.9)
    assert np.mean((edge.low > 0.45) & (edge.high < 0.55)) <= 0.06


@pytest.mark.parametrize("ties", [False, True])
def test_label_permutation_equals_enumeration(ties):
    rng = np.random.default_rng(4)
    ours, theirs = rng.normal(size=(3, 2)), rng.normal(size=(3, 3))
    if ties:
        ours, theirs = ours.round(), theirs.round()
    both = np.concatenate([ours, theirs], axis=1)
    of_prompt = []
    for row in both:
        splits = []
        for chosen in itertools.combinations(range(5), 2):
            rest = [one for one in range(5) if one not in chosen]
            splits.append(np.sign(row[list(chosen)][:, None] - row[rest][None]).sum())
        of_prompt.append(splits)
    sums = np.array([sum(one) for one in itertools.product(*of_prompt)])
    observed = abs(sum(np.sign(a[:, None] - b[None]).sum() for a, b in zip(ours, theirs, strict=True)))
    assert label_permutation_p(ours, theirs) == pytest.approx(np.mean(np.abs(sums) >= observed - 1e-9), abs=1e-12)


def test_label_permutation_equals_scipy_where_it_knows_the_law():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(1, 6)), rng.normal(size=(1, 9)) + 0.7
    exact = stats.mannwhitneyu(ours[0], theirs[0], method="exact").pvalue
    assert label_permutation_p(ours, theirs) == pytest.approx(exact, abs=1e-12)
    wins = (rng.random((200, 1)) < 0.57).astype(float)
    binomial = stats.binomtest(int(wins.sum()), 200).pvalue
    assert label_permutation_p(wins, 1 - wins) == pytest.approx(binomial, abs=1e-12)


@pytest.mark.parametrize("rare", [None, 0.1, 0.03])
def test_one_draw_against_four_holds_its_level(rare):
    """A rare score and different numbers of draws: swapping names calls 10 % and the interval 17 % of them
    different.
    """
    rng, found = np.random.default_rng(6), []
    for _ in range(400):
        ours, theirs = (
            rng.random((32, size)) if rare is None else (rng.random((32, size)) < rare).astype(float)
            for size in (1, 4)
        )
        exact = np.array([label_permutation_p(ours, theirs)])
        found.append(win_rates_with_p(mean_preference(ours, theirs)[:, None], exact)[1][0])
    assert np.mean(np.array(found) <= 0.05) <= 0.06


@pytest.mark.parametrize("n", [16, 29, 64, 256])
def test_plain_wins_hold_their_level_and_no_seed_decides(n):
    """Exactly, over all counts of wins; the verdict on 20 of 29 does not hang on a seed."""
    counts = np.arange(n + 1)
    preferences = (np.arange(n)[:, None] < counts).astype(float)
    exact = np.array([label_permutation_p(column[:, None], 1 - column[:, None]) for column in preferences.T])
    interval, p = win_rates_with_p(preferences, exact)
    called = (interval.low > 0.5) | (interval.high < 0.5)
    assert stats.binom.pmf(counts, n, 0.5)[called].sum() <= 0.05
    assert (called == (p <= 0.05)).all()
    if n == 29:
        assert not called[20]


def test_interval_and_p_never_contradict():
    rng = np.random.default_rng(8)
    for n in (5, 10, 29, 200):
        preferences = rng.choice([0.0, 0.5, 1.0], p=[0.1, 0.6, 0.3], size=(n, 200))
        interval, p = win_rates_with_p(preferences, flips=999)
        assert (((interval.low > 0.5) | (interval.high < 0.5)) == (p <= 0.05)).all()
    # Four wins, no loss and 508 ties decide nothing.
    few = np.concatenate([np.ones(4), np.full(508, 0.5)])[:, None]
    interval, p = win_rates_with_p(few)
    assert p[0] > 0.05
    assert interval.low[0] <= 0.5


@pytest.mark.parametrize("n", [10, 100])
def test_false_positives_of_swapping_names(n):
    rng = np.random.default_rng(n)
    assert 0.04 <= np.mean(sign_flip_p(rng.random((n, 4000)), flips=999) <= 0.05) <= 0.06
    # Many equal sums (ties, few draws) make the test a little shy, never bold.
    discrete = rng.choice([0.0, 0.25, 0.5, 0.75, 1.0], size=(n, 4000))
    assert np.mean(sign_flip_p(discrete, flips=999) <= 0.05) <= 0.06


def test_swapping_names_equals_scipy_where_exact():
    rng = np.random.default_rng(0)
    preferences = rng.choice([0.0, 0.5, 1.0], size=(9, 3), p=[0.2, 0.2, 0.6])
    for column in preferences.T:
        theirs = stats.permutation_test(
            (column - 0.5,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
        )
        # scipy doubles the smaller tail; the null distribution is symmetric, so that is the two-sided count.
        assert sign_flip_p(column[:, None])[0] == pytest.approx(min(1.0, theirs.pvalue), abs=1e-12)


def test_random_swaps_are_near_the_exact_test():
    rng = np.random.default_rng(1)
    wins = (rng.random(200) < 0.57).astype(float)
    exact = stats.binomtest(int(wins.sum()), 200).pvalue
    assert sign_flip_p(wins[:, None], flips=20_000)[0] == pytest.approx(exact, abs=0.01)
    assert sign_test(wins) == pytest.approx(exact, abs=1e-12)


def test_clusters_are_swapped_as_one():
    rng = np.random.default_rng(3)
    once = rng.integers(0, 2, (40, 1500)).astype(float)
    twice, labels = np.repeat(once, 2, axis=0), np.repeat(np.arange(40), 2)
    assert np.mean(sign_flip_p(twice, flips=499) <= 0.05) > 0.1
    assert np.mean(sign_flip_p(twice, flips=499, clusters=labels) <= 0.05) <= 0.06


def test_sign_test_leaves_ties_out():
    assert sign_test(np.array([1.0] * 8 + [0.5] * 50 + [0.0] * 2)) == pytest.approx(stats.binomtest(8, 10).pvalue)
    assert sign_test(np.full(5, 0.5)) == 1.0


def test_better_than_chance():
    assert better_than_chance(60, 100)
    assert not better_than_chance(57, 100)
    assert not better_than_chance(13, 29)
    assert not better_than_chance(0, 0)


def test_holm_against_the_definition():
    p = np.array([0.01, 0.04, 0.03, 0.005])
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_holm_keeps_the_family_error():
    rng = np.random.default_rng(0)
    p = rng.random((4000, 10))
    any_false = np.mean([(holm(row) <= 0.05).any() for row in p])
    assert any_false == pytest.approx(0.05, abs=0.012)


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
