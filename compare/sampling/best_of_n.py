"""Best-of-n from one pool of samples: no re-sampling for each n, and what its KL is and is not.

Best-of-n draws n completions of the reference and keeps the one that the reward model likes best.
"""

import numpy as np
from scipy.special import gammaln


def pool_weights(proxy: np.ndarray, n: int) -> np.ndarray:
    """Probability that each completion of a pool is the best of ``n`` drawn from it without replacement.

    The completion of rank i (1 the worst of N) has weight C(i-1, n-1) / C(N, n); equals the mean over all subsets of
    size n, so the estimate is unbiased (papers.md 3.3.5). Equal scores share their weight.

    Args:
        proxy: ``(P, N)`` scores that best-of-n selects by.
        n: from 1 to ``N``.

    Returns:
        ``(P, N)`` weights; every row sums to 1.

    Raises:
        ValueError: ``n`` is not in 1..N.
    """
    proxy = np.asarray(proxy, dtype=np.float64)
    size = proxy.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"best of {n} needs a pool of at least {n} samples, not {size}")
    by_rank = rank_weights(size, n)
    order = np.argsort(proxy, axis=1, kind="stable")
    weights = np.empty_like(proxy)
    np.put_along_axis(weights, order, np.broadcast_to(by_rank, proxy.shape), axis=1)
    return _share_ties(proxy, weights)


def rank_weights(size: int, n: int) -> np.ndarray:
    """``(N,)`` weights by rank, the worst first: C(i-1, n-1) / C(N, n)."""
    rank = np.arange(1, size + 1)
    with np.errstate(invalid="ignore"):
        # log C(i-1, n-1) - log C(N, n); lower ranks than n are never the best.
        log_weight = (
            gammaln(rank)
            - gammaln(n)
            - gammaln(np.maximum(rank - n + 1, 1))
            - (gammaln(size + 1) - gammaln(n + 1) - gammaln(size - n + 1))
        )
    by_rank = np.where(rank >= n, np.exp(log_weight), 0.0)
    return by_rank / by_rank.sum()


def _share_ties(proxy: np.ndarray, weights: np.ndarray) -> np.ndarray:
    ordered = np.sort(proxy, axis=1)
    for row in np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1)):
        _, group = np.unique(proxy[row], return_inverse=True)
        weights[row] = (np.bincount(group, weights[row]) / np.bincount(group))[group]
    return weights


def kl_bound(n: int) -> float:
    """log n - (n-1)/n: an *upper bound* on KL(best-of-n || reference), met where no samples tie (Stiennon 2020)."""
    return float(np.log(n) - (n - 1) / n)


def beirami_kl(log_probability: np.ndarray, n: int) -> np.ndarray:
    """Beirami et al.'s (2401.01879) estimate of KL(best-of-n || reference) from one draw of best-of-n a prompt.

    With eps = p(y): (1-eps)^n [log n + (n-1) log(1-eps) - (n-1)/n] + (1-(1-eps)^n) log((1-(1-eps)^n) / eps).
    Tends to the bound as eps -> 0 and stays below it where the reference has heavy atoms.

    Args:
        log_probability: ``(P,)`` log-probability of the drawn completions under the reference.
    """
    # Below 1e-12 the estimate is the bound to 12 digits, and 1 - eps is 1 in double precision.
    eps = np.clip(np.exp(np.asarray(log_probability, dtype=np.float64)), 1e-12, 1 - 1e-12)
    missed = np.exp(n * np.log1p(-eps))
    hit = -np.expm1(n * np.log1p(-eps))
    return missed * (np.log(n) + (n - 1) * np.log1p(-eps) - (n - 1) / n) + hit * np.log(hit / eps)


# Cells of the grid on which the law of a sum over prompts is worked out.
CELLS = 1 << 19


def own_judge_p(win_rate: np.ndarray | float, n: int, pool: int, baseline: int, prompts: int) -> np.ndarray:
    """Exact two-sided p of "best-of-n wins n/(n+1) by the judge it was chosen by", for the pool estimator.

    All draws of a prompt have one law, so every order of the ``pool + baseline`` scores is equally likely, whatever
    the law: a baseline draw with k pool draws below it loses to best-of-n with probability t_k = sum of the weights of
    rank above k, and (k_1, ..., k_B) is uniform over multisets of 0..N. The mean over prompts is far from normal for
    large n (most prompts are won by all of it, a few are not), so its law is computed: a convolution on a grid.

    Args:
        win_rate: mean preference over prompts, without ties; or several such.
        n: of best-of-n.
        pool: N, draws a prompt that it is chosen from.
        baseline: B, draws a prompt that it is held against.
        prompts: how many, over all runs.
    """
    fine = int(np.clip(CELLS // (prompts * baseline), 32, 4096))
    beats = np.append(np.cumsum(rank_weights(pool, n)[::-1])[::-1], 0.0)
    steps = np.rint(beats * fine).astype(int)
    ways = np.zeros((baseline + 1, baseline * fine + 1))
    ways[0, 0] = 1.0
    for step in steps.tolist():
        # From the smallest multiset up: each k may stand there several times.
        for size in range(1, baseline + 1):
            ways[size, step:] += ways[size - 1, : ways.shape[1] - step]
    law = ways[baseline] / ways[baseline].sum()
    # The grid's own mean, in place of n/(n+1).
    excess = (law @ np.arange(len(law))) / (baseline * fine) - n / (n + 1)
    length = prompts * baseline * fine + 1
    size = 1 << (length - 1).bit_length()
    whole = np.fft.irfft(np.fft.rfft(law, size) ** prompts, size)[:length]
    at = (np.asarray(win_rate) + excess) * (length - 1)
    up_to = np.concatenate([[0.0], np.cumsum(whole)])
    below = up_to[np.clip(np.floor(at + 0.5).astype(int) + 1, 0, length)]
    above = up_to[-1] - up_to[np.clip(np.ceil(at - 0.5).astype(int), 0, length)]
    return np.clip(2 * np.minimum(below, above), 1e-12, 1.0)
