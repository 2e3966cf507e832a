"""Win rates, means and controls: coverage of intervals, false claims of tests."""

from collections.abc import Iterator

import numpy as np

from benchmarks.statistics_audit.cells import COVERAGE, LEVEL, Cell, held, percent, preference
from ppo_vs_dpo.compare.estimates.controls import CONTROL_LEVEL
from ppo_vs_dpo.compare.sampling.best_of_n import own_judge_p, pool_weights
from ppo_vs_dpo.compare.statistics.intervals import mean_interval, spread
from ppo_vs_dpo.compare.statistics.rates import rates_over, win_rate_interval
from ppo_vs_dpo.compare.statistics.significance import label_permutation_p, sign_flip_p, win_rates_with_p


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
                    covered = held(rates_over(found, 0.95), 0.5)
                    yield Cell(f"{what}: coverage", percent(covered), trials, COVERAGE, seeds == 2)
                    yield Cell(f'{what}: false "beats"', percent(~covered), trials, LEVEL)
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
        p = own_judge_p(values.mean(axis=1), best, 20, 4, n)
        yield Cell(
            f"best-of-{best} v SFT by its own judge, n {n}: control fails",
            percent(p <= CONTROL_LEVEL),
            trials,
            (0.0, 1.5),
        )
