"""Tests: exact where the law under the null is known, Holm's correction, equivalence, and what so many prompts can
show.
"""

from collections.abc import Sequence

import numpy as np
from scipy import special, stats

from ppo_vs_dpo.compare.statistics.intervals import Interval
from ppo_vs_dpo.compare.statistics.rates import win_rate_interval, win_rate_p

# Fewer prompts than this on which the judge preferred one of the two, and no test is asked who wins.
FEWEST_DECIDED = 10
# Means of up to six verdicts of 0, 1/2 and 1 are fractions of this.
DENOMINATOR = 120
# Beyond so many cells the exact law is not worked out.
MOST_CELLS = 1 << 24


def label_sums(scores: np.ndarray) -> np.ndarray:
    """``(P, N)`` integers c: of each of N completions of a prompt, how many others it beats less how many beat it.

    For any split of the N into ours (A of them) and theirs (B), the sum of c over ours is the number of won less lost
    pairs between the two sides: pairs within a side cancel. So the mean preference is 1/2 + sum / (2 A B).
    """
    return np.sign(scores[:, :, None] - scores[:, None, :]).sum(axis=2).astype(np.int64)


def label_permutation_p(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Exact two-sided p of "both sides' completions have the same law on every prompt", by permuting labels *within*
    prompts.

    Exact whatever the scores and their ties, and for different numbers of draws, where swapping names (the sign flip)
    is not: one draw against four is not four against one. The law of the sum over all relabellings is computed, not
    sampled: a convolution over prompts of each prompt's law (the Mann-Whitney law where nothing ties).

    Args:
        ours: ``(P, A)`` scores.
        theirs: ``(P, B)`` scores.
    """
    a = ours.shape[1]
    sums = label_sums(np.concatenate([ours, theirs], axis=1))
    observed = abs(int(sums[:, :a].sum()))
    patterns, counts = np.unique(np.sort(sums, axis=1), axis=0, return_counts=True)
    reach = a * theirs.shape[1]
    return _two_sided([_subset_law(pattern, a, reach) for pattern in patterns], counts, observed, reach)


def _subset_law(values: np.ndarray, size: int, reach: int) -> np.ndarray:
    """``(2 reach + 1,)`` probabilities of the sum of ``size`` of the values, drawn without replacement."""
    total = int(np.abs(values).sum()) + 1
    ways = np.zeros((size + 1, 2 * total + 1))
    ways[0, total] = 1.0
    for value in values.tolist():
        # From the largest subset down, so that each value is used once.
        ways[1:] += np.roll(ways[:-1], value, axis=1)
    law = ways[size] / ways[size].sum()
    centred = np.zeros(2 * reach + 1)
    kept = min(reach, total)
    centred[reach - kept : reach + kept + 1] = law[total - kept : total + kept + 1]
    return centred


def _two_sided(laws: Sequence[np.ndarray], counts: np.ndarray, observed: int, reach: int) -> float:
    """P(|sum| >= observed) of independent integers, ``counts[i]`` of them with ``laws[i]`` on -reach..reach."""
    length = 2 * reach * int(counts.sum()) + 1
    size = 1 << (length - 1).bit_length()
    transform = np.ones(size // 2 + 1, dtype=np.complex128)
    for law, count in zip(laws, counts, strict=True):
        transform *= np.fft.rfft(law, size) ** int(count)
    whole = np.fft.irfft(transform, size)[:length]
    far = np.abs(np.arange(length) - (length - 1) // 2) >= observed
    # The transform is good to about 1e-14 of the whole; nothing smaller is claimed.
    return float(np.clip(whole[far].sum(), 1e-12, 1.0))


def sign_flip_p(
    preferences: np.ndarray, *, flips: int = 9999, seed: int = 0, clusters: np.ndarray | None = None
) -> np.ndarray:
    """Two-sided p-values ``(K,)`` of "the judge cannot tell the two apart", by swapping their names on each prompt.

    A swap turns a preference x into 1 - x: the null is that x and 1 - x have the same law on every prompt, which is
    more than a win rate of 1/2. Exact where preferences are fractions of a small denominator, as verdicts and their
    means are (the law of the sum over all swaps is a convolution), and where there are at most 2^12 swaps; else, of
    verdicts weighted by probabilities, by random swaps with the observed one counted (Phipson & Smyth 2010), so p is
    never 0.

    Args:
        preferences: ``(P, K)``.
        clusters: ``(P,)``; a cluster is swapped as a whole.
    """
    centred = np.asarray(preferences, dtype=np.float64) - 0.5
    if clusters is not None:
        labels, group = np.unique(clusters, return_inverse=True)
        sums = np.zeros((len(labels), centred.shape[1]))
        np.add.at(sums, group, centred)
        centred = sums
    n = len(centred)
    observed = np.abs(centred.sum(axis=0))
    if n <= 12:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return (np.abs(signs @ centred) >= observed - 1e-9).mean(axis=0)
    exact = [_swaps_of_fractions(column) for column in centred.T]
    if all(p is not None for p in exact):
        return np.array(exact)
    rng = np.random.default_rng([seed, n, flips, 1])
    as_extreme, done = np.ones(centred.shape[1]), 0
    while done < flips:
        part = min(flips - done, 2000)
        signs = (rng.integers(0, 2, size=(part, n), dtype=np.int8) * 2 - 1).astype(np.float64)
        # Rounding must not decide whether a swap is as extreme as the observed sum.
        as_extreme += (np.abs(signs @ centred) >= observed - 1e-9).sum(axis=0)
        done += part
    sampled = as_extreme / (flips + 1)
    return np.array([drawn if p is None else p for p, drawn in zip(exact, sampled, strict=True)])


def _swaps_of_fractions(centred: np.ndarray) -> float | None:
    """Exact p of the sum of ``(n,)`` values with random signs; ``None`` where they are no fractions of 120."""
    steps = np.rint(centred * DENOMINATOR)
    if np.abs(steps - centred * DENOMINATOR).max() > 1e-6:
        return None
    sizes, counts = np.unique(np.abs(steps[steps != 0]).astype(int), return_counts=True)
    if not len(sizes):
        return 1.0
    divisor = int(np.gcd.reduce(sizes))
    sizes = sizes // divisor
    reach = int(sizes.max())
    if len(sizes) * reach * int(counts.sum()) > MOST_CELLS:
        return None
    laws = np.zeros((len(sizes), 2 * reach + 1))
    laws[np.arange(len(sizes)), reach - sizes] += 0.5
    laws[np.arange(len(sizes)), reach + sizes] += 0.5
    return _two_sided(laws, counts, abs(int(steps.sum())) // divisor, reach)


def sign_test(preferences: np.ndarray) -> float:
    """Exact two-sided sign test on one column of preferences: wins against losses, ties left out."""
    wins, losses = int((preferences > 0.5).sum()), int((preferences < 0.5).sum())
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def better_than_chance(right: int, n: int, alpha: float = 0.05) -> bool:
    """Whether so many right answers of ``n`` show more than a coin's: the exact one-sided binomial test."""
    return n > 0 and bool(stats.binomtest(right, n, alternative="greater").pvalue <= alpha)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p-values (1979): the chance of *any* false claim in the whole family stays below alpha."""
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def detectable_gap(
    n: int,
    deviation: float = 0.5,
    power: float = 0.8,
    alpha: float = 0.05,
    freedom: float | None = None,
    floor: bool = True,
) -> float:
    """The distance of a mean from its null that ``n`` prompts show with the given power.

    Args:
        n: prompts (or clusters of them).
        deviation: of one preference; 0.5 for single wins and losses, less where several draws are averaged. It is
            known to be about that only: a deviation of 0 shows nothing about the next prompt, and 1 / (2 sqrt(n)) is
            the least used.
        power: the chance to see it.
        alpha: of the two-sided test.
        freedom: degrees of freedom of a t-test, of few seeds say: the gap is then that of the noncentral t.
        floor: use that least deviation; not for values that are no verdicts (reweighted ones).
    """
    if floor:
        deviation = max(deviation, 0.5 / np.sqrt(n))
    error = deviation / np.sqrt(n)
    if freedom is None:
        return float((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * error)
    critical = stats.t.ppf(1 - alpha / 2, freedom)
    return float(special.nctdtrinc(freedom, 1 - power, critical) * error)


def prompts_for_equality(delta: float, deviation: float = 0.5, power: float = 0.8, alpha: float = 0.05) -> int:
    """Prompts with which two equal policies are shown to be equal within ``delta`` by two one-sided tests (Schuirmann
    1987).
    """
    z = stats.norm.ppf(1 - alpha) + stats.norm.ppf(0.5 + power / 2)
    return int(np.ceil((z * deviation / delta) ** 2))


def win_rates_with_p(
    preferences: np.ndarray,
    exact_p: np.ndarray | None = None,
    *,
    confidence: float = 0.95,
    flips: int = 9999,
    seed: int = 0,
    clusters: np.ndarray | None = None,
) -> tuple[Interval, np.ndarray]:
    """Win rates ``(K,)`` with intervals and p-values that never contradict each other.

    p is the larger one of the test's (of "same law", exact) and the interval's own (of "1/2", approximate where the
    data are skewed). Where p is above 1 - confidence the interval is widened to hold 1/2: then p <= alpha and "1/2
    lies outside" are the same statement.

    Args:
        preferences: ``(P, K)``.
        exact_p: ``(K,)`` from `label_permutation_p`; NaN where that test does not apply (a weighted choice among
            draws) and the interval's own p stands alone. ``None``: names are swapped (`sign_flip_p`).
    """
    interval = win_rate_interval(preferences, confidence=confidence, clusters=clusters)
    own = win_rate_p(preferences, clusters=clusters)
    if exact_p is None:
        exact_p = sign_flip_p(preferences, flips=flips, seed=seed, clusters=clusters)
    p = np.fmax(own, exact_p)
    undecided = p > 1 - confidence + 1e-12
    low = np.where(undecided, np.minimum(interval.low, 0.5), interval.low)
    high = np.where(undecided, np.maximum(interval.high, 0.5), interval.high)
    # The two may differ in the last digit where they meet.
    p = np.where((low <= 0.5) & (high >= 0.5), np.maximum(p, np.nextafter(1 - confidence, 1)), p)
    return Interval(interval.mean, low, high), p
