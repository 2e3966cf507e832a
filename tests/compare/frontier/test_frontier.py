"""Matched KL interpolates and never extrapolates; over-optimisation is marked where it is; the exact frontier."""

from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import brentq

from ppo_vs_dpo.compare.estimates.win_rates import PairTable, Settings, describe
from ppo_vs_dpo.compare.frontier.exact import kl_divergence, optimal_policy, suboptimality
from ppo_vs_dpo.compare.frontier.matched import Mixture, matched_values
from ppo_vs_dpo.compare.frontier.overoptimised import over_optimised
from ppo_vs_dpo.compare.frontier.points import Compared, frontier, matched_kl
from ppo_vs_dpo.compare.sampling.completions import Draws
from ppo_vs_dpo.compare.sampling.contenders import PROXY, Contender
from ppo_vs_dpo.compare.statistics.intervals import mean_interval
from ppo_vs_dpo.tests.compare.helpers import exact_frontier
from tests.compare.sampling.test_best_of_n import law


def tilted(slope, size=1201):
    """The law of density e^{slope u} on a grid of [0, 1], where the reference is uniform, and its KL to it."""
    grid = (np.arange(size) + 0.5) / size
    law = np.exp(slope * grid)
    law /= law.sum()
    return law, kl_divergence(law, np.full(size, 1 / size))


def slope_at(target):
    """The slope whose tilt has this KL."""
    return brentq(lambda slope: tilted(slope)[1] - target, 1e-6, 300)


def wins(one, two):
    """Win rate of two laws on the grid by its order."""
    return float(one @ (np.cumsum(two) - two / 2))


def mixture_of(rng, below, above, prompts, draws=2, deviation=0.0):
    """What is measured of two laws: their KLs (noisy by prompt), and draws with both probabilities."""
    (a, kl_a), (b, kl_b) = below, above
    of_a, of_b = (rng.choice(len(law), p=law, size=(prompts, draws)) for law in (a, b))
    noise = rng.lognormal(-(deviation**2) / 2, deviation, size=(2, prompts))
    return Mixture(kl_a * noise[0], kl_b * noise[1], np.log(b[of_a] / a[of_a]), np.log(a[of_b] / b[of_b])), of_a, of_b


def test_the_mixture_has_the_kl_it_says():
    """The mixture's own KL, not the interpolated one: exactly, from the laws themselves, at every weight."""
    rng = np.random.default_rng(0)
    reference, one, two = rng.dirichlet(np.ones(30), size=3)
    kl_one, kl_two = kl_divergence(one, reference), kl_divergence(two, reference)
    # Every completion as a draw, weighted by repetition: 20,000 draws of each law.
    of_one, of_two = (rng.choice(30, p=law, size=(1, 20_000)) for law in (one, two))
    mixture = Mixture(np.array([kl_one]), np.array([kl_two]), np.log(two / one)[of_one], np.log(one / two)[of_two])
    for weight in (0.0, 0.1, 0.5, 0.9, 1.0):
        exact = kl_divergence((1 - weight) * one + weight * two, reference)
        assert mixture.kl(weight)[0] == pytest.approx(exact, abs=0.012)
        assert exact <= (1 - weight) * kl_one + weight * kl_two + 1e-12
    near, far = tilted(slope_at(0.5)), tilted(slope_at(3.0))
    mixture, *_ = mixture_of(rng, near, far, 4000)
    for target in (0.6, 1.5, 2.9):
        weight = mixture.weight_at(target)
        law = (1 - weight) * near[0] + weight * far[0]
        assert kl_divergence(law, np.full(len(law), 1 / len(law))) == pytest.approx(target, rel=0.03)


@pytest.mark.parametrize("prompts", [29, 128])
def test_matched_win_rates_are_covered(prompts):
    """Both methods on one exact frontier, KLs noisy by prompt: the mixture's true win rate is inside."""
    below, above, near = (tilted(slope_at(kl)) for kl in (0.8, 1.3, 1.0))
    weight = brentq(
        lambda w: kl_divergence((1 - w) * below[0] + w * above[0], np.full(1201, 1 / 1201)) - near[1], 0, 1
    )
    truth, held, found = wins((1 - weight) * below[0] + weight * above[0], near[0]), 0, []
    rng = np.random.default_rng(3)
    for _ in range(300):
        mixture, of_below, of_above = mixture_of(rng, below, above, prompts, deviation=0.3)
        kl_near = near[1] * rng.lognormal(-0.02, 0.2, prompts)
        theirs = rng.choice(1201, p=near[0], size=(prompts, 1))
        preferences = [0.5 + 0.5 * np.sign(ours - theirs).mean(axis=1) for ours in (of_below, of_above)]
        values, estimated = matched_values(mixture, kl_near, *preferences)
        interval = mean_interval(values, by_skewness=False)
        held += interval.low <= truth <= interval.high
        found.append(estimated)
    assert 0.92 <= held / 300 <= 0.985
    assert np.mean(found) == pytest.approx(weight, abs=0.06)
    assert truth == pytest.approx(0.5, abs=0.02)


def judged(contenders, better):
    """Preferences of every two contenders with chances by name."""
    rng = np.random.default_rng(5)
    pairs = [(b.name, a.name) for a, b in combinations(contenders, 2)]
    chance = [0.5 + better.get(one, 0) - better.get(two, 0) for one, two in pairs]
    preferences = (rng.random((200, len(pairs))) < chance).astype(float)
    return PairTable(pairs, preferences, 0 * preferences)


def test_kinds_of_matched_kl():
    """Matched where the sweep encloses the nearer KL, one-sided where it does not, as they are where KLs are equal."""
    ppo, dpo = on_frontier("ppo", "ppo", {}, 3.0, 1, 1), on_frontier("dpo", "dpo", {}, 1.0, 1, 1)
    table = judged([ppo, dpo], {"ppo": 0.1})
    found = matched_kl([Compared([ppo, dpo], table=table)], "ppo", "dpo", Settings())
    assert (found["kind"], found["policy"], found["kl"], found["kl_versus"]) == (
        "one-sided",
        "dpo",
        pytest.approx(1.0, abs=0.05),
        pytest.approx(3.0, abs=0.05),
    )
    close = on_frontier("ppo,kl_coef=1.0", "ppo", {"kl_coef": 1.0}, 0.5, 1, 1)
    everyone = [ppo, dpo, close]
    table = judged(everyone, {"ppo": 0.1})
    # Without log-probabilities of one point's completions under the other there is no mixture.
    assert matched_kl([Compared(everyone, table=table)], "ppo", "dpo", Settings())["kind"] == "one-sided"
    for one, other in ((ppo, close), (close, ppo)):
        one.draws.measures["logprob"] = 0 * one.weights
        one.draws.under[other.name] = 0 * one.weights - 2.0
    found = matched_kl([Compared(everyone, table=table)], "ppo", "dpo", Settings())
    assert (found["kind"], found["policy"], found["versus"]) == ("matched", "ppo", "dpo")
    assert sum(found["points"]["ppo"].values()) == pytest.approx(1.0)
    assert found["ci"][0] < found["win_rate"] < found["ci"][1]
    assert (found["p"] <= 0.05) == (not found["ci"][0] <= 0.5 <= found["ci"][1])
    # Eight wins of eight are no certainty, and too few for a verdict.
    for one in everyone:
        one.draws.measures = {key: value[:8] for key, value in one.draws.measures.items()}
        one.draws.under, one.weights = {key: value[:8] for key, value in one.draws.under.items()}, one.weights[:8]
    unanimous = PairTable(
        table.pairs, np.tile([float(two != "ppo") for _, two in table.pairs], (8, 1)), np.zeros((8, 3))
    )
    few = matched_kl([Compared(everyone, table=unanimous)], "ppo", "dpo", Settings())
    assert few["kind"] == "matched"
    assert max(abs(end - 0.5) for end in few["ci"]) == pytest.approx(0.5)
    assert min(abs(end - 0.5) for end in few["ci"]) < 0.3
    assert (few["decided"], few["p"] > 1e-3) == (8, True)
    # As they are: the figure of the report, not another one.
    entry = {"policy": "dpo", "versus": "ppo", "win_rate": 0.3, "ci": [0.2, 0.4], "p": 0.01, "length_controlled": None}
    level = on_frontier("ppo", "ppo", {}, 1.0, 1, 1)
    dpo = on_frontier("dpo", "dpo", {}, 1.0, 1, 1)
    same = matched_kl([Compared([level, dpo], table=judged([level, dpo], {}))], "ppo", "dpo", Settings(), entry=entry)
    assert (same["kind"], same["win_rate"], same["p"]) == ("equal", pytest.approx(0.7), 0.01)
    # Not shown to differ is not shown to be alike: few prompts of noisy KLs.
    level = on_frontier("ppo", "ppo", {}, 1.0, 1, 1)
    found = matched_kl([Compared([level, dpo], table=judged([level, dpo], {}))], "ppo", "dpo", Settings())
    assert found["kind"] == "equal"
    noisy = on_frontier("ppo", "ppo", {}, 1.0, 1, 1)
    kl = np.random.default_rng(0).exponential(1.0, (200, 1))
    noisy.draws.measures = dict.fromkeys(("kl", "k1", "k3"), 1.08 * kl / kl.mean())
    found = matched_kl([Compared([noisy, dpo], table=judged([noisy, dpo], {}))], "ppo", "dpo", Settings())
    assert (found["kind"], found["kl_apart"]) == ("one-sided", False)
    # Two that have not moved: which of them is nearer is a matter of rounding.
    still = [on_frontier(name, name, {}, kl, 1, 1) for name, kl in (("ppo", 4e-9), ("dpo", 6e-7))]
    found = matched_kl([Compared(still, table=judged(still, {}))], "ppo", "dpo", Settings())
    assert "neither has moved" in found["refused"]


def test_each_run_at_its_own_lower_kl():
    """A seed may turn round which method is the nearer one; the win rate is the same method's in all runs."""

    def run(near, far, beyond):
        """``far`` has a point at ``beyond`` and one below ``near``, which stands alone at KL 1; DPO wins by 0.1."""
        points = [
            on_frontier(near, near, {}, 1.0, 1, 1), on_frontier(far, far, {}, beyond, 1, 1),
            on_frontier(f"{far},other", far, {"other": 1}, 0.5, 1, 1),
        ]  # fmt: skip
        for one, other in ((points[1], points[2]), (points[2], points[1])):
            one.draws.measures["logprob"] = 0 * one.weights
            one.draws.under[other.name] = 0 * one.weights - 2.0
        table = judged(points, {one.name: 0.1 for one in points if one.method == "dpo"})
        return Compared(points, table=table)

    one, other = run("ppo", "dpo", 3.0), run("dpo", "ppo", 5.0)
    alone = [matched_kl([which], "ppo", "dpo", Settings()) for which in (one, other)]
    assert [(found["policy"], found["kind"]) for found in alone] == [("dpo", "matched"), ("ppo", "matched")]
    of_dpo = [alone[0]["win_rate"], 1 - alone[1]["win_rate"]]
    assert min(of_dpo) > 0.53
    both = matched_kl([one, other], "ppo", "dpo", Settings())
    assert (both["kind"], both["policy"], both["versus"], both["runs"]) == ("matched", "ppo", "dpo", 2)
    assert both["win_rate"] == pytest.approx(1 - np.mean(of_dpo), abs=1e-9)
    assert both["kl"] == pytest.approx(1.0)
    assert set(both["points"]) == {"ppo", "dpo"}
    assert sum(both["points"]["dpo"].values()) == pytest.approx(1.0)
    # One of two has nothing to mix: that is said, and of how many.
    lacking = Compared(one.contenders[:2], table=one.table)
    found = matched_kl([lacking, other], "ppo", "dpo", Settings())
    assert (found["kind"], found["without"], found["runs"]) == ("one-sided", 1, 2)


def test_over_optimisation_is_marked_only_where_gold_falls_and_proxy_rises():
    rng = np.random.default_rng(0)
    noise, other = rng.normal(0, 1, (2, 300, 4))
    hump, rise = np.array([0.0, 2.0, 1.0, -2.0]), np.array([0.0, 1.0, 1.5, 1.6])
    marks = over_optimised([hump + noise], [rise + other], tests=3)
    assert [mark["over_optimised"] for mark in marks] == [False, False, True, True]
    assert marks[3]["against"] == 1
    assert marks[3]["gold_change"] == pytest.approx(-4.0, abs=0.5)
    # Both fall: a bad policy, not an over-optimised one; and a proxy that is not seen to fall has not risen.
    both = over_optimised([hump + noise], [hump + other], tests=3)
    assert not any(mark["over_optimised"] for mark in both)
    flat = over_optimised([hump + noise], [-0.05 * rise + other], tests=3)
    assert not any(mark["over_optimised"] for mark in flat)
    assert flat[3]["gold_fell"]


@pytest.mark.parametrize("runs", [1, 3])
def test_a_flat_line_is_marked_in_one_report_of_twenty_at_most(runs):
    """Ten points of equal gold and equal proxy: chosen and tested on the same prompts, half of all such lines are
    marked.
    """
    rng, marked = np.random.default_rng(1), 0
    for _ in range(100):
        gold, proxy = [], []
        for _ in range(runs):
            base = rng.standard_normal((128, 1))
            gold.append(0.7 * base + rng.standard_normal((128, 10)))
            proxy.append(0.7 * base + rng.standard_normal((128, 10)))
        marks = over_optimised(gold, proxy, tests=9, shared=True)
        marked += any(mark["over_optimised"] for mark in marks)
    assert marked / 100 <= 0.05


def on_frontier(name, method, point, kl, gold, proxy):
    """A contender with 200 prompts around given figures."""
    noise = np.random.default_rng(len(name)).normal(0, 0.1, (200, 1))
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
    points = frontier([Compared(contenders, early)], figures, settings)
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
    marked = {p["policy"]: p for p in frontier([Compared(contenders, early)], figures, settings)}
    assert marked["ppo"]["over_optimised"]
    assert (marked["ppo"]["against"], marked["ppo"]["along"]) == ("ppo,step=16", "sweep")
    assert marked["ppo"]["gold_change"] == pytest.approx(-1.6, abs=0.03)


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
