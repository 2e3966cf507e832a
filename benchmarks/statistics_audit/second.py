"""What a second referee tried: preferences skewed or near 0 and 1, few prompts, dialogues of very unequal size,
judges that were asked again, seeds near 1, KLs between two policies, power.
"""

from collections.abc import Callable, Iterator

import numpy as np
from scipy.stats import norm

from benchmarks.statistics_audit.cells import COVERAGE, LEVEL, Cell, held, percent, preference
from ppo_vs_dpo.compare.estimates.allowed import upper_of_direct
from ppo_vs_dpo.compare.estimates.length_control import length_controlled
from ppo_vs_dpo.compare.estimates.reweighted import reweighted_values
from ppo_vs_dpo.compare.judges.noise import Repeated, corrected
from ppo_vs_dpo.compare.pooled.figures import detectable_over
from ppo_vs_dpo.compare.sampling.best_of_n import own_judge_p, pool_weights
from ppo_vs_dpo.compare.statistics.intervals import mean_interval, spread
from ppo_vs_dpo.compare.statistics.rates import rates_over, win_rate_interval, win_rate_p
from ppo_vs_dpo.compare.statistics.significance import detectable_gap


def skewed_preferences(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """Few wins among ties, rare scores on both sides, best-of-n by its own judge, a win rate of 1/2 that is skewed."""
    trials = int(1500 * scale)
    for n in (16, 29, 64, 128, 512):
        ours, theirs = (rng.random((n, trials, 1)) < 0.1) * 1.0, (rng.random((n, trials, 4)) < 0.03) * 1.0
        interval = win_rate_interval(preference(ours, theirs))
        yield Cell(
            f"scores of 1 in 10 % v 3 %, 1 draw v 4, n {n}: coverage",
            percent(held(interval, 0.535)),
            trials,
            COVERAGE,
            True,
        )
        weak = np.where(rng.random((n, trials)) < 0.05, 1.0, 0.5 - 0.05 * 0.5 / 0.95)
        yield Cell(f'win rate 1/2, skewed, n {n}: false "beats"', percent(win_rate_p(weak) <= 0.05), trials, LEVEL)
        for share, delta in ((0.1, 0.05), (0.2, 0.1)):
            inner = win_rate_interval(np.where(rng.random((n, trials)) < share, 1.0, 0.5), confidence=0.9)
            within = np.maximum(0.5 - inner.low, inner.high - 0.5) <= delta
            yield Cell(
                f"wins in {share:.0%}, else ties, n {n}: equal within {delta:g}", percent(within), trials, LEVEL
            )
    for n in (10, 16, 29, 64, 128):
        for base in (1, 4):
            trials = int((600 if n < 64 else 200) * scale)
            pool, drawn = rng.standard_normal((trials, n, 20)), rng.standard_normal((trials, n, base))
            weights = pool_weights(pool.reshape(-1, 20), 16).reshape(pool.shape)
            beaten = 0.5 + 0.5 * np.sign(pool[..., :, None] - drawn[..., None, :])
            values = np.einsum("tni,tnij->tn", weights, beaten) / base
            interval = win_rate_interval(values.T)
            yield Cell(
                f"best-of-16 v {base} draws of SFT, own judge, n {n}: coverage",
                percent(held(interval, 16 / 17)),
                trials,
                COVERAGE,
                True,
            )
            if n < 64:
                p = own_judge_p(values.mean(axis=1), 16, 20, base, n)
                yield Cell(
                    f"best-of-16 v {base} draws of SFT, own judge, n {n}: control fails",
                    percent(p <= 0.01),
                    trials,
                    (0.0, 1.5),
                )


def unequal_clusters(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """Dialogues of geometric size, alike inside."""
    for units in (8, 16, 29, 128):
        for mean_size in (1.3, 2.5, 6):
            for rate in (0.5, 0.8):
                covered = []
                for _ in range(int(30 * scale) or 1):
                    labels = np.repeat(np.arange(units), rng.geometric(1 / mean_size, units))
                    latent = np.sqrt(0.9) * rng.standard_normal((units, 40))[labels]
                    latent = latent + np.sqrt(0.1) * rng.standard_normal((len(labels), 40))
                    won = (latent > norm.ppf(1 - rate)).astype(float)
                    covered.append(held(win_rate_interval(won, clusters=labels), rate))
                trials = 40 * len(covered)
                yield Cell(
                    f"{units} dialogues of {mean_size:g} prompts on average, win rate {rate}: coverage",
                    percent(covered),
                    trials,
                    COVERAGE,
                    units < 29,
                )
    for units in (16, 40, 128):
        trials, found = int(250 * scale), []
        for _ in range(trials):
            labels = np.repeat(np.arange(units), rng.geometric(0.4, units))
            difference = rng.normal(0, 20, len(labels))
            latent = np.tanh(difference / 20) + 2 * rng.standard_normal(units)[labels] + rng.logistic(size=len(labels))
            try:
                fit = length_controlled((latent > 0).astype(float), difference, clusters=labels)
            except ValueError:
                continue
            found.append(fit.ci[0] <= 0.5 <= fit.ci[1])
        yield Cell(
            f"length control, {units} dialogues of 2.5 prompts on average: coverage",
            percent(found),
            len(found),
            COVERAGE,
        )


def noisy_judges(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """Win rates without a judge's noise, where it was asked again."""
    for n in (16, 29, 64, 128, 512):
        for theta, e, repeats in ((0.6, 0.2, 2), (0.8, 0.1, 3), (0.95, 0.05, 2)):
            trials, found = int(300 * scale), []
            for _ in range(trials):
                truth = (rng.random(n) < theta)[:, None, None]
                verdicts = (truth ^ (rng.random((n, 2, repeats)) < e)).astype(float)
                one, two = np.triu_indices(repeats, 1)
                squared = ((verdicts[..., one] - verdicts[..., two]) ** 2).mean((1, 2))
                fit = corrected([Repeated(verdicts.mean((1, 2)), squared, squared)], confidence=0.95)
                if "ci" in fit:
                    found.append(fit["ci"][0] <= theta <= fit["ci"][1])
            refused = 100 * (1 - len(found) / trials)
            yield Cell(
                f"rate {theta}, {e:.0%} flipped, asked {repeats} times, n {n}: coverage ({refused:.0f} % refused)",
                percent(found),
                len(found),
                COVERAGE,
                n < 29,
            )


def seeds_near_one(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """Several seeds whose win rates lie near 1; and prompts shared in part, if they are taken for each run's own."""
    for shared in (True, False):
        for seeds in (2, 3, 5):
            for prompts in (16, 29, 128):
                for rate, draws, deviation in ((0.94, 4, 0.5), (0.95, 1, 2.0), (0.97, 20, 0.5)):
                    trials = int(600 * scale)
                    mean = norm.ppf(rate) * np.sqrt(1 + deviation**2 + 0.09)
                    latent = mean + deviation * rng.standard_normal((1 if shared else seeds, prompts, trials))
                    latent = latent + 0.3 * rng.standard_normal((seeds, 1, trials))
                    values = rng.binomial(draws, norm.cdf(np.broadcast_to(latent, (seeds, prompts, trials)))) / draws
                    interval = rates_over(spread(list(values), shared=shared), 0.95)
                    whose = "shared" if shared else "own"
                    what = f"{seeds} seeds, {prompts} {whose} prompts, win rate {rate}, {draws} draws"
                    yield Cell(f"{what}: coverage", percent(held(interval, rate)), trials, COVERAGE, True)
    for share in (0.1, 0.5, 0.9):
        trials, common = int(600 * scale), int(128 * share)
        values = rng.normal(0.5, 0.3, (5, 128, trials))
        values[:, :common] = rng.normal(0.5, 0.3, (1, common, trials))
        values = values + rng.normal(0, 0.1, values.shape)
        wrong = held(spread(list(values)).interval(0.95), 0.5)
        yield Cell(
            f"5 seeds, {share:.0%} of prompts shared, taken for own (not what is done): coverage",
            percent(wrong),
            trials,
            (0.0, 100.0),
        )


def kl_between(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """KLs: the upper end of what bounds a win rate; heavy-tailed log-ratios, one draw a prompt."""
    for n, most in ((16, 2.5), (29, 1.5), (128, 1.5)):
        trials = int(4000 * scale)
        upper = mean_interval(rng.lognormal(-0.5, 1.0, (n, trials)), confidence=0.99).high
        what = f"KL to SFT, log-SD 1, n {n}: its 99 % upper end lies below it"
        yield Cell(what, percent(upper < 1), trials, (0.0, most))
    for kl in (0.01, 0.1, 0.3, 1.0, 2.0, 4.0):
        for n in (29, 128):
            for deviation in (0.0, 1.0):
                trials = int(1500 * scale)
                own = kl * rng.lognormal(-(deviation**2) / 2, deviation, (n, trials))
                ratio = own + np.sqrt(2 * own) * rng.standard_normal((n, trials))
                k1, k3 = (spread([values]) for values in (ratio, np.expm1(-ratio) + ratio))
                below = upper_of_direct(k1, k3)[1] < kl
                yield Cell(
                    f"KL {kl:g} between two, log-SD {deviation:g}, n {n}: its 99 % upper end lies below it",
                    percent(below),
                    trials,
                    (0.0, 1.5),
                )
    for kls, share in (((0.003, 0.001), 0.5), ((0.1, 0.03), 1.0), ((0.25, 0.1), 0.5)):
        for n in (16, 29, 128):
            trials, found = int(300 * scale), []
            slopes = _slopes(rng, 20_000, kls, share)
            truth = float(_wins(*slopes[:2]).mean())
            for _ in range(trials):
                one, two, side_one, side_two = (values[:, None] for values in _slopes(rng, n, kls, share))
                u, a, b = rng.random((n, 8)), rng.standard_normal((n, 8)), rng.standard_normal((n, 8))
                rho = one * u - _log_mass(one) + side_one * a - side_one**2 / 2
                tau = -two * u - _log_mass(-two) + side_two * b - side_two**2 / 2
                values = reweighted_values(u, rho, tau)[:, None]
                found.append(held(spread([values], outward=True).interval(0.95), truth))
            yield Cell(
                f"reweighted, KLs {kls[0]} and {kls[1]}, log-SD 1, {share:.0%} along quality, n {n}: coverage",
                percent(found),
                trials,
                COVERAGE,
            )


def power(rng: np.random.Generator, scale: float) -> Iterator[Cell]:
    """The gap that a report says it sees in four of five experiments, at that gap; over seeds at the median of what
    reports say.
    """
    for n in (29, 128, 512):
        trials, gap = int(2000 * scale), detectable_gap(n)
        p = win_rate_p((rng.random((n, trials)) < 0.5 + gap).astype(float))
        yield Cell(f"n {n}: power at the stated {100 * gap:.1f} points", percent(p <= 0.05), trials, (72.0, 90.0))
    for seeds, of_seed in ((3, 0.03), (5, 0.03), (5, 0.0)):
        trials = int(1000 * scale)

        def drawn(mean: float, trials: int, seeds: int = seeds, of_seed: float = of_seed) -> list[np.ndarray]:
            chance = mean + rng.normal(0, of_seed, (seeds, 1, trials)) + rng.normal(0, 0.2, (1, 128, trials))
            return list((rng.random((seeds, 128, trials)) < chance).astype(float))

        stated = [detectable_over(spread(drawn(0.5, 1), shared=True), 0.95) for _ in range(60)]
        gap = float(np.median(stated))
        seen = ~held(rates_over(spread(drawn(0.5 + gap, trials), shared=True), 0.95), 0.5)
        what = f"{seeds} seeds of SD {of_seed}, 128 shared prompts: power at the median stated {100 * gap:.1f} points"
        yield Cell(what, percent(seen), trials, (60.0, 90.0))


def _slopes(rng: np.random.Generator, n: int, kls: tuple[float, float], share: float) -> list[np.ndarray]:
    """Of two policies that tilt quality in opposite directions, and the rest of their KL beside it; by prompt."""
    common = rng.lognormal(-0.5, 1.0, n)
    along = [np.sqrt(24 * kl * share * common) + 1e-9 for kl in kls]
    return along + [np.sqrt(2 * kl * (1 - share) * common) for kl in kls]


def _log_mass(slope: np.ndarray) -> np.ndarray:
    return np.log(np.expm1(slope) / slope)


def _wins(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    ranks = (np.arange(200) + 0.5) / 200
    ours, theirs = np.exp(one[:, None] * ranks), np.exp(-two[:, None] * ranks)
    ours, theirs = ours / ours.sum(1, keepdims=True), theirs / theirs.sum(1, keepdims=True)
    return (ours * (np.cumsum(theirs, axis=1) - theirs / 2)).sum(axis=1)


MORE: dict[str, Callable[[np.random.Generator, float], Iterator[Cell]]] = {
    "Skewed preferences": skewed_preferences,
    "Unequal clusters": unequal_clusters,
    "Judges asked again": noisy_judges,
    "Seeds near 1": seeds_near_one,
    "KLs and what is weighed by them": kl_between,
    "Power": power,
}
