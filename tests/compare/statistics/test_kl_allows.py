"""What a KL allows: the bound equals its closed form, is attained, and no judge beats it."""

import numpy as np
import pytest
from scipy.special import rel_entr

from ppo_vs_dpo.compare.statistics.kl_allows import (
    Allowed,
    best_of_n,
    best_of_n_against,
    phi,
    tilted_rank,
    via_reference,
)


def divergence(p, q):
    """KL(p || q) in nats."""
    return float(rel_entr(p, q).sum())


@pytest.mark.parametrize(
    ("kl", "points"), [(0.001, 1.3), (0.003, 2.2), (0.01, 4.1), (0.1, 12.8), (0.5, 27.4), (1, 36.5), (2, 45.0)]
)
def test_known_values(kl, points):
    assert 100 * phi(kl) == pytest.approx(points, abs=0.06)
    assert phi(kl) < np.sqrt(kl / 6) < np.sqrt(kl / 2)


def test_shape():
    assert phi(0.0) == 0.0
    assert phi(1e-10) == pytest.approx(np.sqrt(1e-10 / 6), rel=1e-6)
    assert phi(50.0) == 0.5
    kls = np.geomspace(1e-9, 15, 300)
    values = np.array([phi(one) for one in kls])
    assert (np.diff(values) > 0).all()
    slopes = np.diff(values) / np.diff(kls)
    assert (np.diff(slopes) <= 1e-9 * slopes[0]).all()  # concave: Jensen over prompts holds


def test_sharp():
    """The tilt of a uniform rank, judged by that rank, attains it."""
    ranks = (np.arange(200_000) + 0.5) / 200_000
    for slope in (0.1, 1.0, 5.0):
        law = np.exp(slope * ranks)
        law /= law.sum()
        kl = divergence(law, np.full(len(ranks), 1 / len(ranks)))
        assert tilted_rank(slope) == pytest.approx((law @ ranks - 0.5, kl), abs=1e-8)
        assert phi(kl) == pytest.approx(law @ ranks - 0.5, abs=1e-8)


def judge(rng, size):
    """A judge of ``size`` completions: h + h' = 1. By score, by coarse score, noisy and not transitive,
    hard and not.
    """
    kind = rng.integers(4)
    if kind < 2:
        score = rng.standard_normal(size) if kind == 0 else rng.integers(0, 3, size)
        return (np.sign(score[:, None] - score[None]) + 1) / 2
    drawn = rng.random((size, size)) if kind == 2 else rng.integers(0, 2, (size, size)).astype(float)
    upper = np.triu(drawn, 1)
    made = upper + np.tril(1 - drawn.T, -1)
    made[np.diag_indices(size)] = 0.5
    return made


def test_no_judge_beats_it():
    """Policies tilted along the judge's own opinion, several prompts at once, against every bound there is."""
    rng = np.random.default_rng(1)
    for _ in range(3000):
        prompts, size, n = rng.integers(1, 4), rng.integers(2, 12), int(rng.choice([2, 4, 16]))
        rates, kls, reverse = np.zeros(4), np.zeros(3), 0.0
        for _ in range(prompts):
            h = judge(rng, size)
            law = rng.dirichlet(np.full(size, rng.choice([0.3, 1.0, 5.0]))) + 1e-9
            law /= law.sum()
            liked = h @ law
            policies = []
            for sign in (1, -1):
                slope = sign * rng.exponential(rng.choice([0.1, 1.0, 5.0]))
                tilted = law * np.exp(slope * liked + rng.standard_normal(size) * rng.choice([0, 0.3]))
                policies.append(tilted / tilted.sum())
            a, b = policies
            order = np.argsort(liked) if rng.random() < 0.7 else rng.permutation(size)
            best = np.zeros(size)
            best[order] = np.diff(np.r_[0.0, np.cumsum(law[order]) ** n])
            rates += np.array([a @ h @ law, a @ h @ b, best @ h @ law, best @ h @ b]) / prompts
            kls += np.array([divergence(a, law), divergence(b, law), divergence(a, b)]) / prompts
            reverse += divergence(law, a) / prompts
        away = np.abs(rates - 0.5) - 1e-9
        assert away[0] <= phi(kls[0])
        assert away[0] <= phi(reverse)
        assert away[1] <= phi(kls[2])
        assert away[1] <= via_reference(kls[0], kls[1])
        assert away[2] <= best_of_n(n)
        assert away[3] <= best_of_n_against(n, kls[1])


def test_best_of_n_by_its_own_judge():
    """n/(n+1), and 1/2 for n = 1."""
    assert 0.5 + best_of_n(4) == pytest.approx(0.8)
    assert best_of_n(1) == 0.0
    assert best_of_n_against(1, 0.1) == pytest.approx(phi(0.1))


def test_average_first():
    """The bound of the mean KL, not the mean of bounds: the latter is too small where KLs are noisy."""
    noisy = 0.003 * np.random.default_rng(0).lognormal(-0.5, 1, 5000)
    assert np.mean([phi(one) for one in noisy[:500]]) < 0.92 * phi(noisy[:500].mean())


def test_an_interval_is_cut_or_left_outside():
    allowed = Allowed(0.03, 0.04, "KL")
    assert allowed.cut([0.4, 0.9]) == ([0.46, 0.54], False)
    assert allowed.cut([0.49, 0.51]) == ([0.49, 0.51], False)
    assert allowed.cut([0.6, 0.9]) == ([0.6, 0.9], True)


def test_cut_intervals_cover_with_the_truth_at_the_bound():
    """KLs from 29 skewed prompts, their upper ends at 99 %; the win rate lies where the bound is."""
    from ppo_vs_dpo.compare.statistics.intervals import mean_interval
    from ppo_vs_dpo.compare.statistics.rates import win_rate_interval

    rng = np.random.default_rng(2)
    kls, deviation, n, runs = (0.03, 0.01), 0.6, 29, 800
    truth = 0.5 + via_reference(*kls)
    rates = win_rate_interval((rng.random((n, runs)) < truth).astype(float))
    upper = [
        mean_interval(k * rng.lognormal(-(deviation**2) / 2, deviation, (n, runs)), confidence=0.98).high for k in kls
    ]
    held, outside, widths = 0, 0, []
    for k in range(runs):
        allowed = Allowed(truth - 0.5, via_reference(upper[0][k], upper[1][k]), "KL")
        (low, high), out = allowed.cut(rates.ci(k))
        held, outside = held + (low <= truth <= high), outside + out
        widths.append(high - low)
    assert held / runs >= 0.925
    assert outside / runs <= 0.02
    assert np.mean(widths) < 0.75 * np.mean(rates.high - rates.low)
