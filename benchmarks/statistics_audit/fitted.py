"""Figures that are fitted or found by search: matched KL, what KL allows, the optimum, rankings, length control."""

from collections.abc import Iterator

import numpy as np
from scipy.optimize import brentq
from scipy.special import rel_entr

from benchmarks.statistics_audit.cells import COVERAGE, Cell, held, percent, preference
from ppo_vs_dpo.compare.estimates.length_control import length_controlled
from ppo_vs_dpo.compare.estimates.ranking import design, ranking, strengths
from ppo_vs_dpo.compare.estimates.reweighted import reweighted_values
from ppo_vs_dpo.compare.frontier.matched import Mixture, matched_values
from ppo_vs_dpo.compare.frontier.overoptimised import over_optimised
from ppo_vs_dpo.compare.frontier.tilted import tilt
from ppo_vs_dpo.compare.statistics.intervals import mean_interval, spread
from ppo_vs_dpo.compare.statistics.kl_allows import Allowed, via_reference
from ppo_vs_dpo.compare.statistics.rates import rate_over, win_rate_interval

GRID = 1201


def tilted(kl: float) -> np.ndarray:
    """The exponential tilt of a uniform rank with this KL to the uniform law, on a grid."""
    ranks = (np.arange(GRID) + 0.5) / GRID

    def law(slope: float) -> np.ndarray:
        made = np.exp(slope * (ranks - 1))
        return made / made.sum()

    slope = brentq(lambda one: divergence(law(one)) - kl, 1e-6, 400)
    return law(slope)


def divergence(law: np.ndarray) -> float:
    """KL to the uniform law."""
    return float(rel_entr(law, np.full(GRID, 1 / GRID)).sum())


def wins(one: np.ndarray, two: np.ndarray) -> float:
    """Win rate of two laws by the grid's order."""
    return float(one @ (np.cumsum(two) - two / 2))


def matched(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """Two methods on one exact frontier, the farther one matched to the nearer one's KL by its mixture's own KL."""
    for low, high, near in ((0.5, 3.0, 1.0), (0.05, 0.2, 0.1), (0.8, 1.3, 1.0)):
        below, above, own = (tilted(kl) for kl in (low, high, near))
        weight = brentq(lambda w, a=below, b=above, kl=near: divergence((1 - w) * a + w * b) - kl, 0, 1)
        truth = wins((1 - weight) * below + weight * above, own)
        for n in (29, 128, 512):
            trials, found = int((500 if n < 512 else 150) * scale), []
            for _ in range(trials):
                of_below, of_above = (rng.choice(GRID, p=law, size=(n, 2)) for law in (below, above))
                common = rng.lognormal(-0.18, 0.6, n)
                kls = [kl * common * rng.lognormal(-0.045, 0.3, n) for kl in (low, high, near)]
                mixture = Mixture(kls[0], kls[1], np.log(above / below)[of_below], np.log(below / above)[of_above])
                if not kls[0].mean() <= kls[2].mean() <= kls[1].mean():
                    continue
                theirs = rng.choice(GRID, p=own, size=(n, 1))
                sides = [preference(ours, theirs) for ours in (of_below, of_above)]
                values, _ = matched_values(mixture, kls[2], *sides)
                found.append(held(rate_over([values])[0], truth))
            yield Cell(
                f"points at {low} and {high} nats, matched to {near}, n {n}: coverage (truth {100 * truth:.1f} %)",
                percent(found),
                len(found),
                COVERAGE,
            )


def kl_allows(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """Intervals cut to what KL allows, the truth *at* the bound; and the reweighted estimate."""
    for kls, deviation in (((0.003, 0.001), 0.6), ((0.03, 0.01), 1.0)):
        for n in (29, 128, 512):
            trials = int(1500 * scale)
            truth = 0.5 + via_reference(*kls)
            rates = win_rate_interval((rng.random((n, trials)) < truth).astype(float))
            upper = [
                mean_interval(k * rng.lognormal(-(deviation**2) / 2, deviation, (n, trials)), confidence=0.99).high
                for k in kls
            ]
            inside, outside = [], []
            for k in range(trials):
                (low, high), out = Allowed(0, via_reference(upper[0][k], upper[1][k]), "KL").cut(rates.ci(k))
                inside.append(low <= truth <= high)
                outside.append(out)
            what = f"KLs {kls[0]} and {kls[1]}, log-SD {deviation}, truth at the bound, n {n}"
            yield Cell(f"{what}: cut interval covers", percent(inside), trials, COVERAGE)
            yield Cell(f'{what}: "outside of what KL allows"', percent(outside), trials, (0.0, 3.0))
    for kls in ((0.003, 0.001), (0.1, 0.03), (0.3, 0.1)):
        for n, draws in ((16, 8), (29, 8), (128, 24)):
            for alike in (True, False):
                trials = int(400 * scale)
                scores = rng.random((trials, n, draws))
                if alike:  # tilts along quality, in opposite directions
                    laws = [tilted(kl) for kl in kls]
                    truth = wins(laws[0], laws[1][::-1])
                    at = np.minimum((scores * GRID).astype(int), GRID - 1)
                    ratios = [np.log(laws[0] * GRID)[at], np.log(laws[1][::-1] * GRID)[at]]
                else:  # the policies moved in what the judge does not see
                    truth = 0.5
                    ratios = [np.sqrt(2 * k) * rng.standard_normal(scores.shape) - k for k in kls]
                values = np.stack([reweighted_values(*one) for one in zip(scores, *ratios, strict=True)], axis=1)
                what = "along quality" if alike else "apart from quality"
                interval = spread([values], outward=True).interval(0.95)
                yield Cell(
                    f"reweighted, KLs {kls[0]} and {kls[1]} {what}, n {n}, {draws} draws: coverage",
                    percent(held(interval, truth)),
                    trials,
                    COVERAGE,
                )


def rings(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """Reports that mark over-optimisation where gold and proxy are level."""
    for points in (2, 4, 10):
        for n in (29, 128, 512):
            trials, marked = int(300 * scale), 0
            for _ in range(trials):
                base = rng.standard_normal((n, 1))
                gold, proxy = (0.7 * base + rng.standard_normal((n, points)) for _ in range(2))
                marked += any(m["over_optimised"] for m in over_optimised([gold], [proxy], tests=points - 1))
            yield Cell(
                f"level line of {points} points, n {n}: a ring in the report",
                100 * marked / trials,
                trials,
                (0.0, 5.0),
            )
    trials, seen = int(200 * scale), 0
    for _ in range(trials):
        gold, proxy = rng.standard_normal((2, 512, 4)) * 1.4
        gold[:, 3] -= 0.8
        proxy[:, 3] += 0.4
        seen += over_optimised([gold], [proxy], tests=3)[3]["over_optimised"]
    yield Cell(
        "gold falls by 0.8, proxy rises by 0.4 (SD 1.4), n 512: the ring is there (power)",
        100 * seen / trials,
        trials,
        (60.0, 100.0),
    )
    for change in (-0.1, -0.2):
        trials, seen = int(200 * scale), 0
        for _ in range(trials):
            gold, proxy = rng.standard_normal((2, 128, 2)) * 1.4
            gold[:, 1] -= 0.8
            proxy[:, 1] += change
            seen += over_optimised([gold], [proxy], tests=1)[1]["over_optimised"]
        yield Cell(
            f"gold falls by 0.8, proxy too, by {-change}, n 128: a ring", 100 * seen / trials, trials, (0.0, 5.0)
        )


def optimum(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """J* from below: the one-sided 97.5 % bound lies below the truth, for skewed rewards and few effective
    draws too.
    """
    for name, beta, draw, truth in (
        ("normal", 0.63, lambda shape: rng.standard_normal(shape), 1 / (2 * 0.63)),
        ("exponential", 1.4, lambda shape: rng.exponential(1, shape), -1.4 * np.log(1 - 1 / 1.4)),
        (
            "rare (3 %)",
            0.28,
            lambda shape: (rng.random(shape) < 0.03).astype(float),
            0.28 * np.log(0.97 + 0.03 * np.exp(1 / 0.28)),
        ),
    ):
        for n, draws in ((29, 8), (512, 24)):
            trials, found = int(100 * scale), []
            for _ in range(trials):
                found.append(mean_interval(tilt(draw((n, draws)), beta).least_optimum).low <= truth)
            yield Cell(
                f"{name} rewards, beta {beta}, n {n}, {draws} draws: J* is at least what is said",
                percent(found),
                trials,
                (95.0, 100.0),
            )


def rankings(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """Bradley-Terry strengths and possible ranks of one run and of several."""
    names = ["sft", "a", "b", "c"]
    pairs = [(names[i], names[j]) for i in range(4) for j in range(i)]
    for label, skills in (
        ("apart", [0, 0.3, 0.6, 0.9]),
        ("two level", [0, 0.3, 0.6, 0.6]),
        ("all level", [0, 0, 0, 0]),
    ):
        base = np.array(skills, dtype=float)
        many = base + 0.5 * rng.standard_normal((300_000, 4)) + rng.logistic(size=(300_000, 4))
        rates = np.array([(many[:, names.index(p)] > many[:, names.index(q)]).mean() for p, q in pairs])
        true = strengths(design(pairs, names), rates)
        true = dict(zip(names, true - true[0], strict=True))
        if label != "apart":
            level = [n for n, s in zip(names, skills, strict=True) if s == max(skills)]
            middle = np.mean([true[n] for n in level])
            true |= dict.fromkeys(level, middle if "sft" not in level else 0.0)
        for seeds in (1, 3):
            for n in (29, 128):
                trials, covered, ranked = int(150 * scale), [], []
                for _ in range(trials):
                    prompts = 0.5 * rng.standard_normal((n, 4))
                    groups = []
                    for _ in range(seeds):
                        z = base + prompts + rng.logistic(size=(n, 4))
                        groups.append(
                            np.stack(
                                [(z[:, names.index(p)] > z[:, names.index(q)]).astype(float) for p, q in pairs], 1
                            )
                        )
                    for entry in ranking(pairs, groups, names, shared=True)["entries"]:
                        name = entry["policy"]
                        if name != "sft":
                            covered.append(entry["ci"][0] <= true[name] <= entry["ci"][1])
                        better = sum(s > skills[names.index(name)] for s in skills)
                        as_good = sum(s >= skills[names.index(name)] for s in skills)
                        ranked.append(entry["rank_ci"][0] <= as_good and entry["rank_ci"][1] >= better + 1)
                what = f"{label}, {seeds} seed{'s' if seeds > 1 else ''}, n {n}"
                yield Cell(f"{what}: strengths covered", percent(covered), trials, COVERAGE)
                yield Cell(f"{what}: ranks covered", percent(ranked), trials, COVERAGE, True)


def length_control(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """Length-controlled win rates where lengths overlap; elsewhere they are refused."""
    for n in (29, 64, 128):
        for shift in (0, 1, 3):
            trials, found = int(200 * scale), []
            for _ in range(trials):
                difference = rng.normal(shift, 1, n) * 20
                chance = 1 / (1 + np.exp(-np.tanh(difference / 20)))
                try:
                    fit = length_controlled((rng.random(n) < chance).astype(float), difference)
                except ValueError:
                    continue
                found.append(fit.ci[0] <= 0.5 <= fit.ci[1])
            refused = 100 * (1 - len(found) / trials)
            if len(found) > 30:
                yield Cell(
                    f"mean length difference {shift} SD, n {n}: coverage ({refused:.0f} % refused)",
                    percent(found),
                    len(found),
                    COVERAGE,
                )
