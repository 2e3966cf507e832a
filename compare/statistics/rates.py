"""Win rates: score intervals that hold near 0 and 1, with ties, for several draws a prompt and over several runs."""

from collections.abc import Sequence

import numpy as np
from scipy import special, stats

from ppo_vs_dpo.compare.statistics.intervals import (
    SKEWNESS_FACTOR,
    Interval,
    Spread,
    by_cluster,
    hall,
    skewed,
    skewness_of_mean,
    spread,
    touches,
)
from ppo_vs_dpo.preferences.reading.validation import score_interval

# Fewer expected losses (or wins) than this, and the score interval's end that lies towards them misses: it is then
# read from half a win further (a continuity correction).
FEW_WINS = 2.0
# On fewer units than this the judge preferred one of the two: how much such preferences spread is not known, and they
# count for no more than plain wins and losses.
FEW_DECIDED = 10


def wilson(wins: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927); ``wins`` may hold halves (ties).

    For whole numbers equal to ``scipy.stats.binomtest(...).proportion_ci(method="wilson")``, which takes no halves.
    """
    if n == 0:
        return 0.0, 1.0
    low, high = score_interval(np.array(wins / n), n, stats.norm.ppf(0.5 + confidence / 2))
    return float(max(0.0, low)), float(min(1.0, high))


def effective_prompts(preferences: np.ndarray) -> np.ndarray:
    """``(K,)``: of how many plain wins and losses the mean of ``(P, K)`` preferences has the variance.

    More than there are prompts where ties and several draws make preferences steady (Korn & Graubard 1998, for
    surveys).
    """
    n = len(preferences)
    mean, variance = preferences.mean(axis=0), preferences.var(axis=0, ddof=1)
    coarse = mean * (1 - mean)
    known = (variance > 1e-15) & (coarse > 1e-15)
    effective = np.divide(n * coarse, variance, out=np.full_like(mean, float(n)), where=known)
    few = (np.abs(preferences - 0.5) > 1e-12).sum(axis=0) < min(FEW_DECIDED, n)
    return np.minimum(effective, np.where(few, n, most_effective(mean, n)))


def most_effective(mean: np.ndarray, units: int) -> np.ndarray:
    """The largest number of wins and losses that ``units`` preferences of this mean are taken for.

    Near 0 and 1 a handful of units holds all the spread, and a sample may have missed them.
    """
    return units * np.maximum(1.0, 2 * units * np.minimum(mean, 1 - mean))


def win_rate_interval(
    preferences: np.ndarray, *, confidence: float = 0.95, clusters: np.ndarray | None = None
) -> Interval:
    """Win rates ``(K,)`` of preferences ``(P, K)``: Wilson's score interval at their effective number, with t.

    Near 0 and 1 a t interval misses and a score interval does not; with several draws a prompt, Wilson's own is far
    too wide and the effective number is not. Where all preferences of a column are equal that number is P. An end is
    moved out where preferences are more skewed than wins and losses of that mean are (`skewness_beyond_wins`): few
    wins among ties, say.
    """
    preferences = np.asarray(preferences, dtype=np.float64)
    units = by_cluster(preferences, clusters)
    mean = preferences.mean(axis=0)
    if len(units) < 2:
        return Interval(mean, np.zeros_like(mean), np.ones_like(mean))
    n, t = effective_prompts(units), stats.t.ppf(0.5 + confidence / 2, len(units) - 1)
    k = skewness_beyond_wins(units)
    low, high = _score_ends(mean, n, np.maximum(t, skewed(t, k)), np.maximum(t, skewed(t, -k)))
    return Interval(mean, low, high)


def _score_ends(mean: np.ndarray, n: np.ndarray, down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of a score interval with a quantile for each, its continuity correction, cut to [0, 1]."""
    fewer = np.where(n * mean < FEW_WINS, np.maximum(mean - 0.5 / n, 0.0), mean)
    more = np.where(n * (1 - mean) < FEW_WINS, np.minimum(mean + 0.5 / n, 1.0), mean)
    return np.clip(score_interval(fewer, n, down)[0], 0.0, 1.0), np.clip(score_interval(more, n, up)[1], 0.0, 1.0)


def skewness_beyond_wins(units: np.ndarray) -> np.ndarray:
    """``(K,)`` skewness of the mean of ``(P, K)`` preferences beyond that of as many effective wins and losses, which
    a score interval knows of; 0 for plain wins and losses.
    """
    n, mean = len(units), units.mean(axis=0)
    if n < 3:
        return np.zeros_like(mean)
    spread_of_wins = np.sqrt(np.maximum(mean * (1 - mean), 0.0) * effective_prompts(units))
    of_wins = np.divide(1 - 2 * mean, spread_of_wins, out=np.zeros_like(mean), where=spread_of_wins > 1e-12)
    beyond = skewness_of_mean(units) - SKEWNESS_FACTOR * of_wins * (n - 1) / (n - 2)
    return np.where(units.std(axis=0) > 1e-12, beyond, 0.0)


def win_rate_p(preferences: np.ndarray, *, clusters: np.ndarray | None = None) -> np.ndarray:
    """p-values ``(K,)`` of "the win rate is 1/2" that belong to `win_rate_interval`: its score test at 1/2."""
    units = by_cluster(np.asarray(preferences, dtype=np.float64), clusters)
    if len(units) < 2:
        return np.ones(units.shape[1])
    distance = units.mean(axis=0) - 0.5
    score = 2 * np.abs(distance) * np.sqrt(effective_prompts(units))
    # The inverse of what moves the interval's ends.
    moved = hall(score, skewness_beyond_wins(units) * np.sign(distance))
    return 2 * stats.t.sf(np.minimum(score, moved), len(units) - 1)


def rate_over(
    groups: Sequence[np.ndarray],
    *,
    confidence: float = 0.95,
    shared: bool = False,
    clusters: Sequence[np.ndarray | None] = (),
    outward: bool = False,
) -> tuple[Interval, float, int]:
    """A win rate of one run or of several from one value a prompt: its interval, its p of 1/2, its units of evidence.

    One run: the score interval of `win_rate_interval`, which is right near 0 and 1, too. Several: that of `spread`, or
    the score interval of as many wins and losses as have its width, whichever reaches further at each end: near 0 and
    1 the first one misses. The values may be preferences or have their mean and variance (pseudo-values, which need
    not lie in [0, 1]).

    Args:
        groups: ``(P_s,)`` values, one array a run; at least two prompts in each.
        outward: see `spread`; of several runs.
    """
    labels = list(clusters) or [None] * len(groups)
    columns = [np.asarray(group, dtype=np.float64)[:, None] for group in groups]
    found = spread(columns, shared=shared, clusters=labels, outward=outward)
    if len(groups) == 1:
        interval = win_rate_interval(columns[0], confidence=confidence, clusters=labels[0])
        p = win_rate_p(columns[0], clusters=labels[0])
    else:
        interval = rates_over(found, confidence)
        p = touches(lambda at: rates_over(found, at), 0.5, found.mean)
    mean = float(np.clip(found.mean[0], 0.0, 1.0))
    return Interval(mean, float(interval.low[0]), float(interval.high[0])), float(p[0]), found.units


def rates_over(found: Spread, confidence: float | np.ndarray) -> Interval:
    """The intervals ``(K,)`` of win rates over several runs, of their spread; see `rate_over`."""
    plain = found.interval(confidence, (0.0, 1.0))
    mean, coarse = np.clip(found.mean, 0.0, 1.0), np.clip(found.mean * (1 - found.mean), 0.0, None)
    t = special.stdtrit(found.units - 1, 0.5 + np.asarray(confidence) / 2)
    half = found.half(confidence)
    wide = (half > 1e-12) & (coarse > 1e-15)
    n = np.divide(coarse * t**2, half**2, out=np.full_like(mean, float(found.units)), where=wide)
    n = np.minimum(n, most_effective(mean, found.units))
    low, high = _score_ends(mean, n, t, t)
    return Interval(found.mean, np.minimum(plain.low, low), np.maximum(plain.high, high))
