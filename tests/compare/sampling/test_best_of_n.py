"""Best-of-n against brute force, the exact law on an enumerable space, and the closed forms (papers.md 3.3)."""

import itertools
import math

import numpy as np
import pytest
from scipy.special import comb

from ppo_vs_dpo.compare.judges.scores import preference_by_score
from ppo_vs_dpo.compare.sampling.best_of_n import beirami_kl, kl_bound, pool_weights
from ppo_vs_dpo.compare.sampling.completions import Draws
from ppo_vs_dpo.compare.sampling.contenders import PROXY, best_of, best_of_n_kl, realised_best


def law(p, r, n):
    """Exact law of best-of-n on a finite space, ties in proportion to p (papers.md 3.3.1)."""
    out = np.zeros_like(p)
    for value in np.unique(r):
        same = r == value
        out[same] = p[same] / p[same].sum() * (p[r <= value].sum() ** n - p[r < value].sum() ** n)
    return out


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_law_is_what_all_tuples_give(n):
    """papers.md 3.3.1 by brute force: every n-tuple of draws, its winner, ties shared."""
    p, r = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.0, 1.0, 1.0, 0.5])
    brute = np.zeros(4)
    for drawn in itertools.product(range(4), repeat=n):
        best = [i for i in drawn if r[i] == max(r[list(drawn)])]
        for i in best:
            brute[i] += np.prod(p[list(drawn)]) / len(best)
    assert law(p, r, n) == pytest.approx(brute, abs=1e-15)


def kl(p, q):
    here = p > 0
    return float((p[here] * np.log(p[here] / q[here])).sum())


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_pool_estimator_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(n)
    proxy, gold = rng.normal(size=(2, 1, 7))
    chosen = [max(subset, key=lambda i: proxy[0, i]) for subset in itertools.combinations(range(7), n)]
    assert (pool_weights(proxy, n) * gold).sum() == pytest.approx(gold[0, chosen].mean(), abs=1e-14)


def test_pool_weights_formula_and_ties():
    weights = pool_weights(np.array([[0.1, 0.2, 0.3, 0.4, 0.5]]), 3)[0]
    assert weights == pytest.approx([comb(i - 1, 2) / comb(5, 3) for i in range(1, 6)], abs=1e-15)
    tied = pool_weights(np.array([[1.0, 3.0, 3.0, 2.0]]), 2)[0]
    assert tied[1] == tied[2]
    assert tied.sum() == pytest.approx(1.0, abs=1e-15)
    subsets = [(i, j) for i, j in itertools.combinations(range(4), 2)]
    assert tied[1] + tied[2] == pytest.approx(sum(1 in s or 2 in s for s in subsets) / 6, abs=1e-15)


def test_large_pools_do_not_overflow():
    weights = pool_weights(np.arange(60_000.0)[None], 30_000)
    assert np.isfinite(weights).all()
    assert weights.sum() == pytest.approx(1.0, abs=1e-9)


def test_pool_too_small():
    with pytest.raises(ValueError, match="pool of at least 5"):
        pool_weights(np.zeros((1, 4)), 5)


def test_pool_estimator_is_unbiased_for_the_exact_law():
    rng = np.random.default_rng(0)
    p, proxy, gold = rng.dirichlet(np.ones(12)), rng.integers(0, 6, 12).astype(float), rng.normal(size=12)
    drawn = rng.choice(12, size=(40_000, 8), p=p)
    estimate = (pool_weights(proxy[drawn], 4) * gold[drawn]).sum(1)
    assert estimate.mean() == pytest.approx(law(p, proxy, 4) @ gold, abs=4 * estimate.std() / math.sqrt(len(estimate)))


def test_law_composes():
    rng = np.random.default_rng(1)
    p, r = rng.dirichlet(np.ones(12)), rng.integers(0, 4, size=12).astype(float)
    assert law(law(p, r, 4), r, 4) == pytest.approx(law(p, r, 16), abs=1e-14)


@pytest.mark.parametrize(
    ("n", "bound"), [(1, 0), (2, 0.1931), (4, 0.6363), (16, 1.8351), (64, 3.1745), (1024, 5.9324), (60_000, 10.0021)]
)
def test_bound_of_the_papers(n, bound):
    assert kl_bound(n) == pytest.approx(bound, abs=5e-5)


def test_bound_is_met_without_atoms_and_never_passed():
    rng = np.random.default_rng(2)
    fine = np.full(10_000, 1e-4)
    assert kl(law(fine, rng.permutation(10_000).astype(float), 64), fine) == pytest.approx(kl_bound(64), abs=1e-3)
    coarse = np.random.default_rng(0).dirichlet(np.ones(8))
    for n in (1, 2, 4, 16, 64, 1024):
        assert kl(law(coarse, np.arange(8.0), n), coarse) <= kl_bound(n) + 1e-12


def test_beirami_is_close_where_the_bound_is_not():
    p, r = np.random.default_rng(0).dirichlet(np.ones(8)), np.random.default_rng(5).normal(size=8)
    for n in (4, 16, 64):
        best = law(p, r, n)
        estimate = float(best @ beirami_kl(np.log(p), n))
        assert abs(estimate - kl(best, p)) < 0.05
        assert estimate < kl_bound(n)
    assert kl_bound(64) - kl(law(p, r, 64), p) > 0.5


def test_beirami_tends_to_the_bound():
    assert beirami_kl(np.array([-60.0, -1000.0]), 16) == pytest.approx(kl_bound(16), abs=1e-9)
    assert beirami_kl(np.array([-3.0]), 1) == pytest.approx(0.0, abs=1e-12)


def test_gaussian_selection_has_no_hump():
    # papers.md 3.3.8: gold after selecting by gold + noise is E[max_n] / sqrt(1 + sigma^2); E[max_4] = 1.0294.
    rng = np.random.default_rng(3)
    gold = rng.normal(size=(60_000, 4))
    weights = pool_weights(gold + rng.normal(size=gold.shape), 4)
    assert (weights * gold).sum(1).mean() == pytest.approx(1.0294 / math.sqrt(2), abs=0.012)


def test_win_rate_against_one_draw():
    """papers.md 3.3.4: n / (n + 1) without ties; with ties worth a half strictly between 1/2 and that."""
    rng = np.random.default_rng(4)
    continuous, coarse = rng.normal(size=(2, 8000, 16)), rng.integers(0, 3, size=(2, 8000, 16)).astype(float)
    for n in (2, 4, 8):
        for scores, low, high in ((continuous, n / (n + 1) - 0.01, n / (n + 1) + 0.01), (coarse, 0.5, n / (n + 1))):
            pool, others = scores
            rates, _ = preference_by_score(pool, others, pool_weights(pool, n), np.full(others.shape, 1 / 16))
            assert low < rates.mean() < high


def test_proxy_never_falls_with_n():
    """papers.md 3.3.6: what is selected by has a mean that does not fall with n, prompt by prompt."""
    proxy = np.random.default_rng(5).normal(size=(50, 20)).round(1)
    means = np.stack([(pool_weights(proxy, n) * proxy).sum(1) for n in range(1, 21)])
    assert (np.diff(means, axis=0) >= -1e-12).all()
    assert means[0] == pytest.approx(proxy.mean(1))
    assert means[-1] == pytest.approx(proxy.max(1))


def test_kl_of_best_of_n_over_another_policy():
    """KL(bon || ref) = KL(bon || pi) + E_bon log pi / ref, against the exact law on an enumerable space."""
    rng = np.random.default_rng(6)
    reference, policy, r = rng.dirichlet(np.ones(400)), rng.dirichlet(np.ones(400)), rng.normal(size=400)
    n, prompts, size = 4, 4000, 8
    drawn = rng.choice(400, size=(prompts, size), p=policy)
    k1 = np.log(policy / reference)[drawn]
    draws = Draws(
        "ppo", "pool", 1.0, [], [], np.ones(drawn.shape), np.ones(drawn.shape), {"k1": k1}, {PROXY: r[drawn]}
    )
    contender = best_of(draws, n)
    chosen = drawn[np.arange(prompts), realised_best(draws, n)]
    found = best_of_n_kl(contender, np.log(policy)[chosen])
    best = law(policy, r, n)
    error = 4 * found["estimate"].std() / math.sqrt(prompts)
    assert found["estimate"].mean() == pytest.approx(kl(best, reference), abs=error + 0.01)
    assert kl(best, reference) <= found["bound"] + error
