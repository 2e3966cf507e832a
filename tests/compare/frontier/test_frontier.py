"""Matched KL interpolates and never extrapolates; over-optimisation is marked where it is; the exact frontier."""

import numpy as np
import pytest

from ppo_vs_dpo.compare.estimates.win_rates import Settings, describe
from ppo_vs_dpo.compare.frontier.exact import exact_frontier, kl_divergence, optimal_policy, suboptimality
from ppo_vs_dpo.compare.frontier.matched import matched_win_rate, mixture_weights, over_optimised
from ppo_vs_dpo.compare.frontier.points import frontier
from ppo_vs_dpo.compare.sampling.completions import Draws
from ppo_vs_dpo.compare.sampling.contenders import PROXY, Contender
from tests.compare.sampling.test_best_of_n import law


def test_mixture_is_linear_between_neighbours():
    weights = mixture_weights(np.array([4.0, 0.0, 1.0]), 2.5)
    assert weights == pytest.approx([0.5, 0.0, 0.5])
    assert mixture_weights(np.array([4.0, 0.0, 1.0]), 4.0) == pytest.approx([1.0, 0.0, 0.0])
    assert mixture_weights(np.array([4.0, 0.0, 1.0]), 0.0) == pytest.approx([0.0, 1.0, 0.0])


@pytest.mark.parametrize("target", [-0.1, 4.2])
def test_nothing_is_extrapolated(target):
    with pytest.raises(ValueError, match="outside the curve"):
        mixture_weights(np.array([4.0, 0.0, 1.0]), target)


def test_mixture_kl_is_at_most_the_target():
    rng = np.random.default_rng(0)
    reference, one, two = rng.dirichlet(np.ones(30), size=3)
    kl = np.array([kl_divergence(one, reference), kl_divergence(two, reference)])
    weights = mixture_weights(kl, kl.mean())
    assert kl_divergence(weights @ np.stack([one, two]), reference) <= kl.mean()


def curves(rng, prompts, better):
    """Two methods whose win rate against each other depends on KL, and on `better` at equal KL."""
    kl_a = np.array([0.0, 1.0, 4.0, 9.0]) + rng.normal(0, 0.1, (prompts, 4)) * np.array([0, 1, 1, 1])
    kl_b = np.array([0.0, 2.0, 6.0]) + rng.normal(0, 0.1, (prompts, 3)) * np.array([0, 1, 1])
    strength_a = 0.1 * np.array([0.0, 1.0, 4.0, 9.0]) + better * np.array([0, 1, 1, 1])
    strength_b = 0.1 * np.array([0.0, 2.0, 6.0])
    chance = 0.5 + 0.25 * (strength_a[:, None] - strength_b[None])
    return kl_a, kl_b, (rng.random((prompts, 4, 3)) < chance).astype(float)


@pytest.mark.parametrize(("better", "expected"), [(0.0, 0.5), (0.6, 0.65)])
def test_matched_kl_removes_what_kl_bought(better, expected):
    """A's main policy has KL 9, B's 2: A wins outright, at equal KL only if it is better."""
    covered, lows = 0, []
    for trial in range(60):
        found = matched_win_rate(
            *curves(np.random.default_rng(trial), 400, better), 3, 1, resamples=150, seed=0, confidence=0.95
        )
        assert found["kl"] == pytest.approx(2.0, abs=0.05)
        covered += found["ci"][0] <= expected <= found["ci"][1]
        lows.append(found["ci"][0])
    assert covered >= 52
    assert (np.mean(np.array(lows) > 0.5) > 0.9) == (better > 0)


def test_matched_kl_beyond_a_curve_is_refused():
    kl_a, kl_b, preferences = curves(np.random.default_rng(0), 50, 0.0)
    with pytest.raises(ValueError, match="outside the curve"):
        matched_win_rate(kl_a[:, 2:], kl_b, preferences[:, 2:], 1, 1, resamples=50, seed=0, confidence=0.95)


def test_over_optimisation_is_marked_only_where_gold_falls_and_proxy_does_not():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (300, 4))
    settings = {"resamples": 300, "seed": 0, "confidence": 0.95}
    hump, rise = np.array([0.0, 2.0, 1.0, -2.0]), np.array([0.0, 1.0, 1.5, 1.6])
    marks = over_optimised(hump + noise, rise + noise, **settings)
    assert [mark["over_optimised"] for mark in marks] == [False, False, True, True]
    assert marks[3]["against"] == 1
    assert marks[3]["gold_change"] == pytest.approx(-4.0, abs=0.4)
    # Both fall: a bad policy, not an over-optimised one. Gold level within noise: nothing.
    both = over_optimised(hump + noise, hump + noise, **settings)
    assert not any(mark["over_optimised"] for mark in both)
    level = over_optimised(noise[:, :2] * 3, rise[:2] + noise[:, :2], **settings)
    assert not level[1]["over_optimised"]


def on_frontier(name, method, point, kl, gold, proxy):
    """A contender with 200 prompts around given figures."""
    noise = np.random.default_rng(0).normal(0, 0.1, (200, 1))
    ones = np.ones_like(noise)
    measures = dict.fromkeys(("kl", "k1", "k3"), kl + 0 * noise)
    scores = {"gold": gold + noise, PROXY: proxy + noise}
    draws = Draws(name, "sample", 1.0, [], [], ones, ones, measures, scores)
    return Contender(name, method, draws, ones, point)


def test_checkpoints_are_a_line_in_the_order_of_training():
    """KL may fall along training; an early checkpoint of higher KL is not over-optimised against the end."""
    settings = Settings(200)
    contenders = [
        on_frontier("ppo", "ppo", {}, 3.0, 2.8, 2.8),
        on_frontier("ppo,kl_coef=1.0", "ppo", {"kl_coef": 1.0}, 1, 1, 1),
    ]
    early = [
        on_frontier("ppo,step=16", "ppo", {"step": 16}, 3.7, 2.6, 2.8),
        on_frontier("ppo,step=8", "ppo", {"step": 8}, 4, 2.5, 2.7),
    ]
    figures = {c.name: describe(c, ["gold", PROXY], settings, None) for c in [*contenders, *early]}
    points = frontier(contenders, early, figures, settings)
    assert [(p["policy"], p["along"]) for p in points] == [
        ("ppo,kl_coef=1.0", "sweep"),
        ("ppo", "sweep"),
        ("ppo,step=8", "training"),
        ("ppo,step=16", "training"),
    ]
    assert not any(p["over_optimised"] for p in points)
    # Training that goes on too long: the main policy is held against its own checkpoint.
    contenders[0] = on_frontier("ppo", "ppo", {}, 9.0, 1.0, 3.0)
    figures["ppo"] = describe(contenders[0], ["gold", PROXY], settings, None)
    marked = {p["policy"]: p for p in frontier(contenders, early, figures, settings)}
    assert marked["ppo"]["over_optimised"]
    assert (marked["ppo"]["against"], marked["ppo"]["along"]) == ("ppo,step=16", "sweep")
    assert marked["ppo"]["gold_change"] == pytest.approx(-1.6)


def test_gao_hump_on_an_enumerable_space():
    """papers.md M2: a proxy that cannot express a penalty: best-of-n's gold peaks and falls; proxy never falls."""
    bits = ((np.arange(2**10)[:, None] >> np.arange(10)) & 1).astype(float)
    reference = np.prod(np.where(bits == 1, 0.35, 0.65), axis=1)
    weights = np.random.default_rng(0).uniform(0.3, 1.0, 10)
    proxy, gold = bits @ weights, bits @ weights - 2 * np.maximum(0, bits.sum(1) - 5)
    points = [law(reference, proxy, n) for n in (1, 4, 16, 64, 256, 4096)]
    proxies, golds = np.array([p @ proxy for p in points]), np.array([p @ gold for p in points])
    assert (np.diff(proxies) > 0).all()
    peak = int(golds.argmax())
    assert 0 < peak < 5
    assert golds[-1] < golds[0]
    curve = exact_frontier(reference, proxy, np.geomspace(1e-3, 1e3, 600))
    for point in points:  # never above the exact frontier
        kl, reward = kl_divergence(point, reference), float(point @ proxy)
        assert reward <= np.interp(kl, curve[:, 0], curve[:, 1]) + 1e-3


def test_optimum_and_gap():
    """papers.md 3.1: J* = beta log Z is never beaten, and the gap to it is beta KL(pi || pi*)."""
    rng = np.random.default_rng(1)
    reference, reward = rng.dirichlet(np.ones(8)), rng.normal(size=8)
    for beta in (0.1, 0.5, 2.0):
        best = optimal_policy(reference, reward, beta)
        assert suboptimality(best, reference, reward, beta) == pytest.approx(0.0, abs=1e-12)
        for policy in rng.dirichlet(np.ones(8), size=50):
            gap = suboptimality(policy, reference, reward, beta)
            assert gap == pytest.approx(beta * kl_divergence(policy, best), abs=1e-12)
            assert gap > 0
    # The slope of the frontier is beta.
    (kl_a, r_a), (kl_b, r_b) = exact_frontier(reference, reward, np.array([0.5 + 1e-5, 0.5 - 1e-5]))
    assert (r_b - r_a) / (kl_b - kl_a) == pytest.approx(0.5, abs=1e-6)
