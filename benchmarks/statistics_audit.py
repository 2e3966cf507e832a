"""The comparison's statistics under simulation: coverage and error rates of every kind of figure, each with its
Monte-Carlo error.

    python -m benchmarks.statistics_audit --write docs/statistics.md     (`make audit`)

Data are drawn here with numpy, from laws whose true figures are known; the project's functions see the data only.
Prints a table for each kind of figure and, with ``--write``, puts them between the page's markers. Ends with exit code
1 where a cell lies outside of its bar by more than three Monte-Carlo errors and is not marked as a bound. One thread;
about ten minutes.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.special import rel_entr

from ppo_vs_dpo.artifacts.files import write_text
from ppo_vs_dpo.compare.estimates.length_control import length_controlled
from ppo_vs_dpo.compare.estimates.ranking import design, ranking, strengths
from ppo_vs_dpo.compare.estimates.reweighted import reweighted_values
from ppo_vs_dpo.compare.estimates.win_rates import CONTROL_LEVEL
from ppo_vs_dpo.compare.frontier.matched import Mixture, matched_values
from ppo_vs_dpo.compare.frontier.overoptimised import over_optimised
from ppo_vs_dpo.compare.frontier.tilted import tilt
from ppo_vs_dpo.compare.sampling.best_of_n import pool_weights
from ppo_vs_dpo.compare.statistics.intervals import mean_interval, spread, win_rate_interval
from ppo_vs_dpo.compare.statistics.kl_allows import Allowed, via_reference
from ppo_vs_dpo.compare.statistics.significance import label_permutation_p, sign_flip_p, win_rates_with_p

START, END = "<!-- audit: begin -->", "<!-- audit: end -->"
COVERAGE, LEVEL = (93.0, 98.0), (0.0, 6.0)


@dataclass
class Cell:
    """One simulated rate, in percent."""

    what: str
    found: float
    trials: int
    bar: tuple[float, float]
    bound: bool = False

    @property
    def error(self) -> float:
        """Monte-Carlo standard error of the rate."""
        p = np.clip(self.found / 100, 0.5 / self.trials, 1 - 0.5 / self.trials)
        return 100 * float(np.sqrt(p * (1 - p) / self.trials))

    @property
    def verdict(self) -> str:
        """Whether the rate keeps its bar, within three Monte-Carlo errors; a bound may cover more."""
        low, high = self.bar
        if self.found < low - 3 * self.error:
            return "**below**"
        if self.found > high + 3 * self.error:
            return "bound" if self.bound else "**above**"
        return "ok"


def held(interval, truth) -> np.ndarray:
    """Which intervals hold the truth."""
    return (interval.low <= truth + 1e-12) & (interval.high >= truth - 1e-12)


def percent(values) -> float:
    """Mean of a boolean array in percent."""
    return 100 * float(np.mean(values))


def preference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """``(..., P)`` mean preference over all pairs of draws ``(..., P, A)`` and ``(..., P, B)``."""
    return 0.5 + 0.5 * np.sign(ours[..., :, None] - theirs[..., None, :]).mean((-1, -2))


def win_rates_of_one_run(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """Interval and test of one run: wins, ties, several draws, rare scores."""
    for p in (0.5, 0.7, 0.9, 0.97):
        for n in (16, 32, 64, 128, 512):
            trials = int(6000 * scale)
            wins = (rng.random((n, trials)) < p).astype(float)
            # Counts of wins at n <= 32 jump over the bar near 0 and 1: such intervals are bounds.
            yield Cell(
                f"wins, win rate {p}, n {n}: coverage",
                percent(held(win_rate_interval(wins), p)),
                trials,
                COVERAGE,
                n <= 32,
            )
    for n in (16, 29, 64, 128, 512):
        counts = np.arange(n + 1)
        table = (np.arange(n)[:, None] < counts).astype(float)
        exact = np.array([label_permutation_p(c[:, None], 1 - c[:, None]) for c in table.T])
        _, p = win_rates_with_p(table, exact)
        trials = int(20_000 * scale)
        yield Cell(f'wins, n {n}: false "beats"', percent(p[rng.binomial(n, 0.5, trials)] <= 0.05), trials, LEVEL)
    for share in (0.5, 0.9):
        for n in (16, 64, 512):
            trials = int(600 * scale)
            found = []
            for _ in range(trials):
                ours = rng.integers(0, 2, (n, 1)).astype(float)
                theirs = np.where(rng.random((n, 1)) < share, ours, 1 - ours)
                exact = np.array([label_permutation_p(ours, theirs)])
                found.append(win_rates_with_p(preference(ours, theirs)[:, None], exact)[1][0] <= 0.05)
            yield Cell(f'ties {share:.0%}, n {n}: false "beats"', percent(found), trials, LEVEL)
    for a, b, rare in ((1, 4, None), (4, 4, None), (20, 4, None), (1, 4, 0.1), (1, 4, 0.03)):
        for n in (16, 32, 64, 128):
            trials = int((400 if a < 20 else 120) * scale)
            beaten = []
            for _ in range(trials):
                ours, theirs = (
                    rng.random((n, m)) if rare is None else (rng.random((n, m)) < rare).astype(float) for m in (a, b)
                )
                exact = np.array([label_permutation_p(ours, theirs)])
                _, p = win_rates_with_p(preference(ours, theirs)[:, None], exact)
                beaten.append(p[0] <= 0.05)
            scores = "continuous" if rare is None else f"rare ({rare})"
            yield Cell(f'{a} draws v {b}, {scores} scores, n {n}: false "beats"', percent(beaten), trials, LEVEL)
    for n in (16, 64, 512):
        trials = int(1500 * scale)
        graded = np.clip(rng.normal(0.5, 0.25, (n, trials)), 0, 1)
        p = np.maximum(sign_flip_p(graded, flips=1999), 0)
        yield Cell(
            f'a judge that reads, graded verdicts, n {n}: false "beats" (sign flip)', percent(p <= 0.05), trials, LEVEL
        )


def equality(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """Two one-sided tests: policies at the edge of delta are called equal in 5 % at most."""
    for n in (128, 512, 2048):
        trials = int(4000 * scale)
        inner = win_rate_interval((rng.random((n, trials)) < 0.55).astype(float), confidence=0.9)
        yield Cell(
            f"true win rate .55, n {n}: called equal within 5 points",
            percent((inner.low > 0.45) & (inner.high < 0.55)),
            trials,
            LEVEL,
        )


def means(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """Means over prompts: rewards, and KLs that differ by orders of magnitude."""
    for name, draw, truth in (
        ("normal reward", lambda shape: rng.normal(1, 1, shape), 1.0),
        ("exponential reward", lambda shape: rng.exponential(1, shape), 1.0),
        ("KL, log-SD 0.5", lambda shape: rng.lognormal(-0.125, 0.5, shape), 1.0),
        ("KL, log-SD 1", lambda shape: rng.lognormal(-0.5, 1, shape), 1.0),
    ):
        for n in (16, 29, 64, 128, 512):
            trials = int((8000 if n < 512 else 3000) * scale)
            yield Cell(
                f"{name}, n {n}: coverage", percent(held(mean_interval(draw((n, trials))), truth)), trials, COVERAGE
            )


def over_seeds(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """Win rates and KLs over seeds and prompts that runs share or not: coverage, and false claims by the same p."""
    for shared in (True, False):
        for seeds in (2, 3, 5):
            for prompts in (29, 128, 512):
                for of_seed, of_prompt, draws in (
                    (0, 0, 1),
                    (0, 0.3, 20),
                    (0.02, 0.3, 20),
                    (0.05, 0.25, 1),
                    (0.1, 0.1, 4),
                ):
                    trials = int((1200 if prompts < 512 else 300) * scale)
                    chance = 0.5 + rng.normal(0, of_seed, (seeds, 1, trials))
                    chance = chance + rng.normal(0, of_prompt, (1 if shared else seeds, prompts, trials))
                    values = rng.binomial(draws, np.clip(chance, 0, 1)) / draws
                    found = spread(list(values), shared=shared)
                    what = "shared" if shared else "own"
                    what = (
                        f"{seeds} seeds, {prompts} {what} prompts, SD of seeds {of_seed}, of prompts "
                        f"{of_prompt}, {draws} draws"
                    )
                    # Two seeds that share strong prompts: t with one degree of freedom covers too much.
                    yield Cell(
                        f"{what}: coverage", percent(held(found.interval(0.95), 0.5)), trials, COVERAGE, seeds == 2
                    )
                    yield Cell(f'{what}: false "beats"', percent(found.p_value(0.5) <= 0.05), trials, LEVEL)
    for shared in (True, False):
        for seeds in (2, 3, 5):
            for prompts in (16, 29, 128):
                trials = int(2000 * scale)
                values = np.exp(
                    rng.normal(0, 0.1, (seeds, 1, trials))
                    + rng.normal(0, 1, (1 if shared else seeds, prompts, trials))
                    + rng.normal(0, 0.3, (seeds, prompts, trials))
                )
                truth = np.exp((0.1**2 + 1 + 0.3**2) / 2)
                found = spread(list(values), shared=shared).interval(0.95)
                what = "shared" if shared else "own"
                yield Cell(
                    f"KL, log-SD 1, {seeds} seeds, {prompts} {what} prompts: coverage",
                    percent(held(found, truth)),
                    trials,
                    COVERAGE,
                    seeds == 2,
                )


def clusters(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """Prompts that belong together."""
    for units in (16, 29, 128):
        trials = int(3000 * scale)
        labels = np.repeat(np.arange(units), rng.integers(1, 5, units))
        chance = 0.5 + rng.normal(0, 0.25, (units, trials))[labels]
        values = (rng.random((len(labels), trials)) < np.clip(chance, 0, 1)).astype(float)
        interval = win_rate_interval(values, clusters=labels)
        yield Cell(
            f"{len(labels)} prompts of {units} dialogues: coverage", percent(held(interval, 0.5)), trials, COVERAGE
        )


def controls(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """What is known beforehand fails a sound report in one of a hundred."""
    for a, b, n in ((4, 4, 29), (20, 4, 29), (20, 4, 256)):
        trials = int(1000 * scale)
        failed = [label_permutation_p(rng.random((n, a)), rng.random((n, b))) <= CONTROL_LEVEL for _ in range(trials)]
        yield Cell(f"SFT v SFT, {a} draws v {b}, n {n}: control fails", percent(failed), trials, (0.0, 1.5))
    for best, n in ((4, 29), (16, 29), (16, 256)):
        trials = int(800 * scale)
        pool, base = rng.random((trials, n, 20)), rng.random((trials, n, 4))
        weights = pool_weights(pool.reshape(-1, 20), best).reshape(pool.shape)
        values = 0.5 + 0.5 * np.einsum("tni,tnij->tn", weights, np.sign(pool[..., :, None] - base[..., None, :])) / 4
        p = spread([values.T]).p_value(best / (best + 1))
        yield Cell(
            f"best-of-{best} v SFT by its own judge, n {n}: control fails",
            percent(p <= CONTROL_LEVEL),
            trials,
            (0.0, 2.0),
        )


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
                found.append(held(mean_interval(values, by_skewness=False), truth))
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
                interval = mean_interval(values, by_skewness=False)
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


TABLES = {
    "Win rates of one run": win_rates_of_one_run,
    "Equality": equality,
    "Means over prompts": means,
    "Over seeds and prompts": over_seeds,
    "Clusters of prompts": clusters,
    "Controls": controls,
    "One KL": matched,
    "What KL allows": kl_allows,
    "Over-optimisation": rings,
    "The optimum": optimum,
    "Ranking": rankings,
    "Length control": length_control,
}


def run(scale: float, only: str = "") -> list[tuple[str, list[Cell]]]:
    """All tables."""
    found = []
    for number, (name, cells) in enumerate(TABLES.items()):
        if only.lower() in name.lower():
            found.append((name, list(cells(np.random.default_rng([2026, number]), scale))))
    return found


def markdown(tables: list[tuple[str, list[Cell]]]) -> str:
    """The tables as the page shows them."""
    lines = []
    for name, cells in tables:
        lines += [f"### {name}", "", "| simulated | % | ± | bar | |", "|---|---|---|---|---|"]
        for cell in cells:
            bar = f"{cell.bar[0]:g} to {cell.bar[1]:g}"
            lines.append(f"| {cell.what} | {cell.found:.1f} | {cell.error:.1f} | {bar} | {cell.verdict} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", metavar="PAGE", help="put the tables between the page's markers")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of trials")
    parser.add_argument("--only", default="", help="tables whose name holds this")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    tables = run(arguments.scale, arguments.only)
    text = markdown(tables)
    sys.stdout.write(text)
    missed = [cell for _, cells in tables for cell in cells if cell.verdict.startswith("**")]
    sys.stdout.write(f"\n{len(missed)} of {sum(len(c) for _, c in tables)} cells outside of their bars\n")
    sys.stderr.write(f"{time.monotonic() - started:.0f} s\n")
    if arguments.write:
        page = Path(arguments.write).read_text(encoding="utf-8")
        head, tail = page[: page.index(START) + len(START)], page[page.index(END) :]
        write_text(Path(arguments.write), f"{head}\n\n{text}\n{tail}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
