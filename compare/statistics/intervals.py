"""Intervals for means over prompts, and over seeds and prompts; all in closed form, so no seed decides a verdict.

A *preference* is a number in [0, 1] for one prompt: 1 the policy won, 0 it lost, 1/2 a tie, and anything between where
several draws were averaged. A win rate is the mean of preferences, so ties count half. docs/statistics.md has the
simulated coverage of every function here (`make audit`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

# A sample's skewness is too small where the data are skewed (its largest value is missing). With this factor means of
# lognormal data up to log-SD 1 are covered as they should be; symmetric data do not feel it (docs/statistics.md).
SKEWNESS_FACTOR = 1.4
# A few seeds may agree by luck: an interval over seeds is never narrower than this share of what its prompts alone
# leave open. 1/2 keeps two seeds of coarse data covered; 1 would cover 99 % and more.
LEAST_SHARE = 0.5


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


def by_cluster(values: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
    """``(G, K)``: one value a cluster of prompts in place of ``(P, K)``, one a prompt.

    A cluster of prompts (of one dialogue, or near duplicates) is one unit of evidence. Its value is its jackknife
    pseudo-value: the overall mean plus its summed deviation times (G - 1) / (P - its size), centred. The mean of these
    is the mean over prompts, and their variance is the jackknife's of a ratio (Cochran 1977, section 9.3, with a
    correction for large clusters: a tenth of the prompts in one dialogue is no tenth of the spread).

    Args:
        values: ``(P, K)``.
        clusters: ``(P,)`` label of each prompt's cluster, or ``None``: every prompt stands for itself.
    """
    if clusters is None:
        return values
    labels, group = np.unique(clusters, return_inverse=True)
    if len(labels) == len(values):
        return values
    mean = values.mean(axis=0)
    sums = np.zeros((len(labels), values.shape[1]))
    np.add.at(sums, group, values - mean)
    if len(labels) == 1:
        return mean + sums
    pseudo = sums * ((len(labels) - 1) / (len(values) - np.bincount(group)))[:, None]
    return mean + pseudo - pseudo.mean(axis=0)


@dataclass(frozen=True)
class Spread:
    """What the interval of a mean is made of: variances of the mean with their degrees of freedom; arrays ``(K,)``.

    Attributes:
        mean: the estimate.
        of_seeds: its variance by seeds, on ``seeds`` - 1 degrees of freedom; 0 for one run.
        of_prompts: its variance by prompts, on ``units`` - 1.
        least: what prompts alone leave open where there are several seeds; the interval is never narrower than
            `LEAST_SHARE` of that.
        skewness: of the mean: that of the units over the root of their number.
        seeds: how many.
        units: how many prompts (or clusters of them) stand for themselves.
        outward: skewness moves an end of the interval out only, never in.
    """

    mean: np.ndarray
    of_seeds: np.ndarray
    of_prompts: np.ndarray
    least: np.ndarray
    skewness: np.ndarray
    seeds: int
    units: int
    outward: bool = False

    def interval(self, confidence: float | np.ndarray, bounds: tuple[float, float] | None = None) -> Interval:
        """The interval of this confidence: half^2 = t_{S-1}^2 of_seeds + t_{P-1}^2 of_prompts, by its skew."""
        t, half = special.stdtrit(self.units - 1, 0.5 + np.asarray(confidence) / 2), self.half(confidence)
        down, up = skewed(t, self.skewness), skewed(t, -self.skewness)
        if self.outward:
            down, up = np.maximum(down, t), np.maximum(up, t)
        low, high = self.mean - half * down / t, self.mean + half * up / t
        if bounds is not None:
            low, high = np.clip(low, *bounds), np.clip(high, *bounds)
        return Interval(self.mean, low, high)

    def half(self, confidence: float | np.ndarray) -> np.ndarray:
        """Half of the interval's width ``(K,)``, before skewness moves its ends."""
        t = special.stdtrit(self.units - 1, 0.5 + np.asarray(confidence) / 2)
        of_seeds = special.stdtrit(self.seeds - 1, 0.5 + np.asarray(confidence) / 2) if self.seeds > 1 else 0.0
        half = np.sqrt(of_seeds**2 * self.of_seeds + t**2 * self.of_prompts)
        return np.maximum(half, LEAST_SHARE * t * np.sqrt(self.least))

    def p_value(self, null: float) -> np.ndarray:
        """Two-sided p-values ``(K,)`` of "the mean is ``null``": 1 less the confidence at which the interval touches
        it.
        """
        if self.seeds == 1:
            error = np.sqrt(self.of_prompts)
            distance = np.divide(self.mean - null, error, out=np.full_like(error, np.inf), where=error > 1e-300)
            distance = np.where(np.abs(self.mean - null) < 1e-15, 0.0, distance)
            k, far = self.skewness * np.sign(distance), np.minimum(np.abs(distance), 1e6)
            moved = hall(far, k)
            t = np.minimum(moved, far) if self.outward else moved
            return np.clip(2 * special.stdtr(self.units - 1, -t), 1e-12, 1.0)
        return touches(self.interval, null, self.mean)

    @property
    def freedom(self) -> np.ndarray:
        """Satterthwaite's degrees of freedom of the whole variance ``(K,)``; for power."""
        whole = self.of_seeds + self.of_prompts
        parts = self.of_prompts**2 / (self.units - 1)
        if self.seeds > 1:
            parts = parts + self.of_seeds**2 / (self.seeds - 1)
        return np.divide(whole**2, parts, out=np.full_like(whole, self.units - 1.0), where=parts > 0)

    @property
    def error(self) -> np.ndarray:
        """Standard error of the mean ``(K,)``."""
        return np.sqrt(self.of_seeds + self.of_prompts)


def touches(interval: Callable[[np.ndarray], Interval], null: float, like: np.ndarray) -> np.ndarray:
    """1 less the confidence at which an interval touches ``null``, by bisection."""
    low, high = np.zeros_like(like), np.full_like(like, 1 - 1e-12)
    for _ in range(45):
        middle = (low + high) / 2
        found = interval(middle)
        inside = (found.low <= null) & (null <= found.high)
        low, high = np.where(inside, low, middle), np.where(inside, middle, high)
    return 1.0 - high


def hall(t: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Hall's transformation, of which `skewed` is the inverse."""
    return t + k * t**2 / 3 + k**2 * t**3 / 27 + k / 6


def skewed(t: np.ndarray | float, skewness: np.ndarray) -> np.ndarray:
    """A t quantile moved by the skewness of the mean: the inverse of Hall's (1992) monotone cubic transformation.

    g(T) = T + k T^2 / 3 + k^2 T^3 / 27 + k / 6 is nearly symmetric for T = (mean - mu) / s.e., k = skewness of the
    mean; T = 3 ((1 + k (t - k / 6))^(1/3) - 1) / k.
    """
    k = np.where(np.abs(skewness) < 1e-9, 1.0, skewness)
    return np.where(np.abs(skewness) < 1e-9, t, 3 * (np.cbrt(1 + k * (t - k / 6)) - 1) / k)


def skewness_of_mean(values: np.ndarray) -> np.ndarray:
    """Skewness ``(K,)`` of the mean of ``(n, K)`` values, the sample's times `SKEWNESS_FACTOR`; 0 below 3 values."""
    n = len(values)
    deviation = values.std(axis=0)
    if n < 3:
        return np.zeros_like(deviation)
    third = ((values - values.mean(axis=0)) ** 3).mean(axis=0)
    raw = np.divide(third, deviation**3, out=np.zeros_like(deviation), where=deviation > 1e-12)
    return SKEWNESS_FACTOR * raw * np.sqrt(n * (n - 1)) / (n - 2) / np.sqrt(n)


def spread(
    groups: Sequence[np.ndarray],
    shared: bool = False,
    clusters: Sequence[np.ndarray | None] = (),
    by_skewness: bool = True,
    outward: bool = False,
) -> Spread:
    """The spread of a mean over the prompts of one run, or over several runs and their prompts.

    Args:
        groups: one array ``(P_s, K)`` a run; at least two prompts in each.
        shared: the runs were judged on the same prompts, in the same order (*crossed*). The two-way random-effects
            model y_sp = m + a_s + b_p + e_sp then gives Var = [MS_s + (MS_p - MS_e)] / (S P): seeds with S - 1 degrees
            of freedom, what prompts add to it with P - 1 (Owen 2007). Else every run has prompts of its own
            (*nested*), and the run means hold the prompts' share already (Davison & Hinkley 1997, section 3.8).
        clusters: of each run's prompts; none, and every prompt stands for itself.
        by_skewness: follow the skewness of the data; not for differences, whose skewness is mostly noise.
        outward: follow it outwards only: where it may be noise or not.

    Every run has equal weight.
    """
    labels = list(clusters) or [None] * len(groups)
    skewness_of = skewness_of_mean if by_skewness else lambda values: np.zeros(values.shape[1])
    units = [by_cluster(np.asarray(group, dtype=np.float64), of) for group, of in zip(groups, labels, strict=True)]
    runs = len(units)
    if runs == 1:
        (values,) = units
        n, zero = len(values), np.zeros(values.shape[1])
        variance = values.var(axis=0, ddof=1) / n
        return Spread(values.mean(axis=0), zero, variance, zero, skewness_of(values), 1, n, outward)
    if not shared:
        means = np.stack([values.mean(axis=0) for values in units])
        own = np.stack([values.var(axis=0, ddof=1) / len(values) for values in units]).mean(axis=0)
        centred = np.concatenate([values - values.mean(axis=0) for values in units])
        n = sum(map(len, units))
        of_seeds = means.var(axis=0, ddof=1) / runs
        least, skewness = own / runs, skewness_of(centred)
        return Spread(means.mean(axis=0), of_seeds, np.zeros_like(own), least, skewness, runs, n - runs + 1, outward)
    values = np.stack(units)
    prompts = values.shape[1]
    mean, of_seed, of_prompt = values.mean(axis=(0, 1)), values.mean(axis=1), values.mean(axis=0)
    rest = values - of_seed[:, None] - of_prompt[None] + mean
    ms_seed = prompts * ((of_seed - mean) ** 2).sum(0) / (runs - 1)
    ms_prompt = runs * ((of_prompt - mean) ** 2).sum(0) / (prompts - 1)
    ms_rest = (rest**2).sum((0, 1)) / ((runs - 1) * (prompts - 1))
    size = runs * prompts
    added = np.maximum(ms_prompt - ms_rest, 0.0) / size
    return Spread(mean, ms_seed / size, added, ms_prompt / size, skewness_of(of_prompt), runs, prompts, outward)


def mean_interval(
    values: np.ndarray,
    *,
    confidence: float = 0.95,
    bounds: tuple[float, float] | None = None,
    clusters: np.ndarray | None = None,
    by_skewness: bool = True,
) -> Interval:
    """Mean over prompts with its interval: t, moved by the skewness of the data.

    Args:
        values: ``(P,)`` or ``(P, K)``, one row a prompt.
        bounds: ``(lowest, highest)`` possible value, to which the interval is cut.
        by_skewness: follow the skewness of the data; not for differences, whose skewness is mostly noise.

    Returns:
        `Interval` of shape ``(K,)``, or of floats for a vector. With one prompt the interval is the bounds, or NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 1:
        found = mean_interval(
            values[:, None], confidence=confidence, bounds=bounds, clusters=clusters, by_skewness=by_skewness
        )
        return Interval(float(found.mean[0]), float(found.low[0]), float(found.high[0]))
    if len(by_cluster(values, clusters)) < 2:
        mean = values.mean(axis=0)
        low, high = bounds if bounds is not None else (np.nan, np.nan)
        return Interval(mean, np.full_like(mean, low), np.full_like(mean, high))
    return spread([values], clusters=[clusters], by_skewness=by_skewness).interval(confidence, bounds)


def jackknife(estimates: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Pseudo-values ``(P, K)`` of any figure: P whole - (P - 1) estimates (Tukey 1958).

    One value a prompt, whose mean and spread are those of the figure: with them a fitted figure (a strength, a mixture
    at matched KL, a slope) has the same interval, over seeds too, as a plain mean.

    Args:
        estimates: ``(P, K)``, the figure without each prompt.
        whole: ``(K,)``, from all of them. The pseudo-values are centred there.
    """
    n = len(estimates)
    values = n * whole - (n - 1) * estimates
    return values - values.mean(axis=0) + whole


def without_each(values: np.ndarray) -> np.ndarray:
    """``(P, ...)`` means of ``(P, ...)`` values with one prompt left out at a time."""
    n = len(values)
    return (values.sum(axis=0) - values) / (n - 1)
