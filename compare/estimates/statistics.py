"""Intervals and tests for win rates and means over prompts (and over seeds).

A *preference* is a number in [0, 1] for one prompt: 1 the policy won, 0 it lost, 1/2 a tie, and anything between where
several draws were averaged. A win rate is the mean of preferences, so ties count half. Everything is seeded.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; arrays of shape ``(K,)``, or floats."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def ci(self, column: int | None = None) -> list[float]:
        """``[low, high]`` as plain floats."""
        low, high = (self.low, self.high) if column is None else (self.low[column], self.high[column])
        return [float(low), float(high)]


def wilson(wins: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927); ``wins`` may hold halves (ties).

    For whole numbers equal to ``scipy.stats.binomtest(...).proportion_ci(method="wilson")``, which takes no halves.
    """
    if n == 0:
        return 0.0, 1.0
    z = stats.norm.ppf(0.5 + confidence / 2)
    p = wins / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


@functools.lru_cache(maxsize=8)
def resampling_weights(n: int, resamples: int, seed: int) -> np.ndarray:
    """``(resamples, n)`` weights: how often each of ``n`` prompts is drawn, divided by ``n``.

    One matrix for all figures of a report: every pair of policies is resampled on the same prompts (paired).
    """
    rng = np.random.default_rng([seed, n, resamples])
    return (rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n).astype(np.float64)


def _calibrate(
    mean: np.ndarray, resampled: np.ndarray, error: np.ndarray, freedom: np.ndarray | float, confidence: float
) -> Interval:
    """Percentile interval of resampled means, scaled about the mean to half-width t x standard error.

    A plain percentile interval is too narrow by sqrt(1 - 1/n) and by normal instead of t quantiles (Hesterberg 2015,
    section 4.1: the expanded percentile interval); its shape, skewed where the data are, is kept.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    spread = resampled.std(axis=0)
    wanted = stats.t.ppf(1 - tail, freedom) / stats.norm.ppf(1 - tail) * error
    scale = np.divide(wanted, spread, out=np.ones_like(spread), where=spread > 1e-15)
    return Interval(mean, mean + (low - mean) * scale, mean + (high - mean) * scale)


def mean_interval(
    values: np.ndarray, *, resamples: int = 2000, seed: int = 0, confidence: float = 0.95, bounds=None
) -> Interval:
    """Mean over prompts with a paired-bootstrap interval.

    Args:
        values: ``(P,)`` or ``(P, K)``, one row a prompt; all columns are resampled together.
        resamples: bootstrap resamples.
        seed: of the resampling.
        confidence: of the interval.
        bounds: ``(lowest, highest)`` possible value, to which the interval is cut.

    Returns:
        `Interval` of shape ``(K,)``, or of floats for a vector. With one prompt the interval is the bounds, or NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 1:
        column = mean_interval(values[:, None], resamples=resamples, seed=seed, confidence=confidence, bounds=bounds)
        return Interval(float(column.mean[0]), float(column.low[0]), float(column.high[0]))
    n = len(values)
    mean = values.mean(axis=0)
    if n < 2:
        low, high = bounds if bounds is not None else (np.nan, np.nan)
        return Interval(mean, np.full_like(mean, low), np.full_like(mean, high))
    resampled = resampling_weights(n, resamples, seed) @ values
    error = values.std(axis=0, ddof=1) / np.sqrt(n)
    interval = _calibrate(mean, resampled, error, n - 1, confidence)
    return _cut(interval, bounds)


def _cut(interval: Interval, bounds) -> Interval:
    if bounds is None:
        return interval
    return Interval(interval.mean, np.clip(interval.low, *bounds), np.clip(interval.high, *bounds))


def win_rate_interval(preferences: np.ndarray, **settings) -> Interval:
    """Win rates ``(K,)`` of preferences ``(P, K)`` with paired-bootstrap intervals within [0, 1].

    Where all preferences of a column are equal there is nothing to resample; that column gets Wilson's interval.
    """
    preferences = np.asarray(preferences, dtype=np.float64)
    interval = mean_interval(preferences, bounds=(0.0, 1.0), **settings)
    low, high = interval.low.copy(), interval.high.copy()
    n = len(preferences)
    for column in np.flatnonzero(np.ptp(preferences, axis=0) == 0):
        low[column], high[column] = wilson(preferences[:, column].sum(), n, settings.get("confidence", 0.95))
    return Interval(interval.mean, low, high)


def crossed_interval(
    values: np.ndarray, *, resamples: int = 2000, seed: int = 0, confidence: float = 0.95, bounds=None
) -> Interval:
    """Mean over seeds *and* prompts, where every seed was judged on the same prompts.

    Both are resampled (seeds, and prompts across seeds). The scale is that of the two-way random-effects model
    y_sp = m + a_s + b_p + e_sp: Var = (MS_seeds + MS_prompts - MS_rest) / (S P), with Satterthwaite's degrees of
    freedom; resampling both ways alone counts the rest twice (Owen 2007).

    Args:
        values: ``(S, P, K)``.

    Returns:
        `Interval` of shape ``(K,)``.
    """
    values = np.asarray(values, dtype=np.float64)
    seeds, prompts, _ = values.shape
    if seeds == 1:
        return mean_interval(values[0], resamples=resamples, seed=seed, confidence=confidence, bounds=bounds)
    mean = values.mean(axis=(0, 1))
    by_seed, by_prompt = values.mean(axis=1), values.mean(axis=0)
    rest = values - by_seed[:, None] - by_prompt[None] + mean
    ms_seed = prompts * ((by_seed - mean) ** 2).sum(0) / (seeds - 1)
    ms_prompt = seeds * ((by_prompt - mean) ** 2).sum(0) / (prompts - 1)
    ms_rest = (rest**2).sum((0, 1)) / ((seeds - 1) * (prompts - 1))
    terms = np.stack([ms_seed, ms_prompt, -ms_rest]) / (seeds * prompts)
    # Never below what the seeds alone, or the prompts alone, show.
    variance = np.maximum(terms.sum(0), np.maximum(terms[0], terms[1]) * 0.5)
    freedoms = np.array([seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1)])[:, None]
    freedom = np.divide(
        variance**2, (terms**2 / freedoms).sum(0), out=np.full_like(variance, prompts - 1.0), where=variance > 0
    )
    rng = np.random.default_rng([seed, seeds, prompts])
    seed_weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    prompt_weights = resampling_weights(prompts, resamples, seed)
    resampled = np.stack(
        [
            np.einsum("bs,bp,sp->b", seed_weights, prompt_weights, values[..., k], optimize=True)
            for k in range(len(mean))
        ],
        axis=1,
    )
    freedom = np.clip(freedom, 1, None)
    return _cut(_calibrate(mean, resampled, np.sqrt(variance), freedom, confidence), bounds)


def nested_interval(
    groups: Sequence[np.ndarray], *, resamples: int = 2000, seed: int = 0, confidence: float = 0.95, bounds=None
) -> Interval:
    """Mean over seeds, each judged on prompts of its own.

    Seeds are resampled as wholes: the differences between seed means already hold the prompts' share, and resampling
    the prompts inside too would count it twice (Davison & Hinkley 1997, section 3.8). Every seed has equal weight.

    Args:
        groups: ``S`` arrays ``(P_s, K)``.
    """
    means = np.stack([np.asarray(group, dtype=np.float64).mean(axis=0) for group in groups])
    if len(means) == 1:
        return mean_interval(groups[0], resamples=resamples, seed=seed, confidence=confidence, bounds=bounds)
    return mean_interval(means, resamples=resamples, seed=seed, confidence=confidence, bounds=bounds)


@functools.lru_cache(maxsize=4)
def _signs(n: int, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, n, resamples, 1])
    return (rng.integers(0, 2, size=(resamples, n), dtype=np.int8) * 2 - 1).astype(np.float64)


def permutation_test(preferences: np.ndarray, *, resamples: int = 4999, seed: int = 0) -> np.ndarray:
    """Two-sided p-values ``(K,)`` of "neither policy is better", by swapping the two policies' names on each prompt.

    A swap turns a preference x into 1 - x. All 2^P swaps where P <= 12, else random ones with the observed one counted
    (Phipson & Smyth 2010), so p is never 0. Equal to ``scipy.stats.permutation_test(permutation_type="samples")``.

    Args:
        preferences: ``(P, K)``.
    """
    centred = np.asarray(preferences, dtype=np.float64) - 0.5
    n = len(centred)
    if n <= 12:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        extra = 0
    else:
        signs, extra = _signs(n, resamples, seed), 1
    observed = np.abs(centred.sum(axis=0))
    # Rounding must not decide whether a swap is as extreme as the observed sum.
    as_extreme = (np.abs(signs @ centred) >= observed - 1e-9).sum(axis=0)
    return (as_extreme + extra) / (len(signs) + extra)


def sign_test(preferences: np.ndarray) -> float:
    """Exact two-sided sign test on one column of preferences: wins against losses, ties left out."""
    wins, losses = int((preferences > 0.5).sum()), int((preferences < 0.5).sum())
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def two_proportion_z(wins_a: int, n_a: int, wins_b: int, n_b: int) -> tuple[float, float]:
    """z and two-sided p of two independent proportions (unpooled variance): 158/256 against 146/256 is z = 1.08."""
    a, b = wins_a / n_a, wins_b / n_b
    z = (a - b) / np.sqrt(a * (1 - a) / n_a + b * (1 - b) / n_b)
    return float(z), float(2 * stats.norm.sf(abs(z)))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p-values (1979): the chance of *any* false claim in the whole matrix stays below alpha."""
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def detectable_gap(n: int, deviation: float = 0.5, power: float = 0.8, alpha: float = 0.05) -> float:
    """The distance of a win rate from 1/2 that ``n`` prompts show with the given power.

    Args:
        n: prompts.
        deviation: of one preference; 0.5 for single wins and losses, less where several draws are averaged.
    """
    return float((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * deviation / np.sqrt(n))


def prompts_needed(gap: float, deviation: float = 0.5, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """How many prompts show a win rate of 1/2 + ``gap`` with the given power; ``None`` for no gap."""
    if abs(gap) < 1e-9:
        return None
    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    return int(np.ceil((z * deviation / gap) ** 2))


def prompts_needed_two_arms(a: float, b: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Prompts *an arm* for two independent win rates ``a`` and ``b`` (61 % against 57 %: about 2,370)."""
    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    return int(np.ceil(z**2 * (a * (1 - a) + b * (1 - b)) / (a - b) ** 2))
