"""Exact laws of choosing among samples, on spaces small enough to enumerate (papers.md 3.3 and 3.7)."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import chisquare

from ppo_vs_dpo.preferences.rejection.select import (
    acceptance,
    best_against_worst,
    best_weights,
    bradley_terry_pairs,
    pick_best,
    pick_worst,
    rejection_sample,
    rso_pairs,
)


def formula(p, r, n):
    """pi_n(y) = p(y) / P(r = r_y) [F(r_y)^n - F(r_y^-)^n] (papers.md 3.3.1)."""
    law = np.zeros_like(p)
    for value in np.unique(r):
        level = r == value
        law[level] = p[level] / p[level].sum() * (p[r <= value].sum() ** n - p[r < value].sum() ** n)
    return law


def brute_force(p, r, n):
    """The law of the project's own selection, summed over all n-tuples of draws."""
    law = np.zeros_like(p)
    for draws in itertools.product(range(len(p)), repeat=n):
        for index, weight in zip(draws, best_weights(r[list(draws)]), strict=True):
            law[index] += weight * p[list(draws)].prod()
    return law


@pytest.fixture(params=["distinct", "ties"])
def space(request):
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.ones(5))
    r = rng.normal(size=5) if request.param == "distinct" else np.array([0.0, 1.0, 1.0, 2.0, 2.0])
    return p, r


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_law(space, n):
    p, r = space
    assert brute_force(p, r, n) == pytest.approx(formula(p, r, n), abs=1e-14)


def test_raft_two_rounds_of_four_are_one_of_sixteen(space):
    """A round with infinite data gives the best-of-n law; rounds multiply (papers.md 3.3.6, M7)."""
    p, r = space
    once = brute_force(p, r, 4)
    twice = brute_force(once, r, 4)
    assert twice == pytest.approx(formula(p, r, 16), abs=1e-12)
    gains = [law @ r for law in (p, once, twice)]
    assert gains == sorted(gains)


def test_kl_of_best_of_n_is_below_its_bound(space):
    p, r = space
    for n in (2, 4):
        law = brute_force(p, r, n)
        kept = law > 0
        kl = float((law[kept] * np.log(law[kept] / p[kept])).sum())
        assert kl <= math.log(n) - (n - 1) / n


def test_rso_accepted_law_is_the_kl_regularised_optimum(space):
    """Accept with exp((r - r_max) / beta): law p e^{r/beta} / Z, rate Z e^{-r_max/beta} (papers.md 3.7), to 1e-15."""
    p, r = space
    for beta in (0.1, 0.5, 2.0):
        probability = acceptance(r, beta)
        rate = float(p @ probability)
        z = float(p @ np.exp(r / beta))
        assert rate == pytest.approx(z * math.exp(-r.max() / beta), rel=1e-14)
        assert p * probability / rate == pytest.approx(p * np.exp(r / beta) / z, abs=1e-15)
        # A higher bound than the true maximum keeps the law and costs acceptance.
        loose = acceptance(r, beta, r_max=r.max() + 1)
        assert p * loose / (p @ loose) == pytest.approx(p * probability / rate, abs=1e-15)
        assert p @ loose == pytest.approx(rate * math.exp(-1 / beta), rel=1e-14)


def test_rso_sampling_follows_the_law():
    """The first accepted of many draws, chi-square against the exact law (n large, so r_max is among the draws)."""
    rng = np.random.default_rng(0)
    p, r, beta = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 0.5, 1.0, 1.5]), 0.7
    counts = np.zeros(4)
    for _ in range(4000):
        draws = rng.choice(4, size=64, p=p)
        counts[draws[rejection_sample(r[draws], 1, beta, rng)[0]]] += 1
    target = p * np.exp(r / beta)
    assert chisquare(counts, target / target.sum() * counts.sum()).pvalue > 1e-3
    # The test can fail: draws without rejection do not follow it.
    plain = np.bincount(rng.choice(4, size=4000, p=p), minlength=4)
    assert chisquare(plain, target / target.sum() * 4000).pvalue < 1e-10


def test_rso_limits():
    rng = np.random.default_rng(0)
    scores = [0.0, 3.0, 1.0, 2.0]
    # beta -> 0: greedy, best first; beta -> infinity: everything is taken in the order drawn.
    assert rejection_sample(scores, 4, 1e-6, rng) == [1, 3, 2, 0]
    assert rejection_sample(scores, 3, 1e9, rng) == [0, 1, 2]
    assert rso_pairs(scores, 2, 1e-6, rng) == [(1, 3), (2, 0)]
    assert rso_pairs([1.0, 1.0], 1, 1.0, rng) == []


def test_best_against_worst():
    rng = np.random.default_rng(0)
    assert best_against_worst([0.5, 2.0, -1.0], rng) == [(1, 2)]
    assert best_against_worst([1.0, 1.0], rng) == []
    picks = [pick_best([1.0, 3.0, 3.0], rng) for _ in range(2000)]
    assert set(picks) == {1, 2}
    assert chisquare(np.bincount(picks)[1:]).pvalue > 1e-3
    assert pick_worst([1.0, 3.0, 3.0], rng) == 0


def test_bradley_terry_pairs_take_every_pair_once_and_label_by_the_difference():
    rng = np.random.default_rng(0)
    pairs = bradley_terry_pairs([0.0, 1.0, 2.0, 3.0], 6, rng)
    assert {frozenset(pair) for pair in pairs} == {frozenset(pair) for pair in itertools.combinations(range(4), 2)}
    wins = sum(bradley_terry_pairs([0.0, math.log(3)], 1, rng) == [(1, 0)] for _ in range(4000))
    assert wins / 4000 == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 4000))
