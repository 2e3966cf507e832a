"""The reward-KL frontier: every method's points, matched KL, and over-optimisation in the open."""

from typing import Any

import numpy as np

from ppo_vs_dpo.compare.estimates.statistics import Interval, mean_interval, resampling_weights
from ppo_vs_dpo.compare.sampling.contenders import Contender


def curve(contenders: list[Contender], method: str) -> list[Contender]:
    """The points of one method with a measured KL, by rising KL."""
    own = [c for c in contenders if c.method == method and c.kl() is not None]
    return sorted(own, key=lambda c: (c.kl().mean(), c.name))


def mixture_weights(kl: np.ndarray, target: float) -> np.ndarray:
    """Weights of the two points of a curve that enclose a KL, linear in KL.

    Randomising between two policies with these weights is a policy: its win rate is exactly the interpolated one,
    and its KL is at most the target (KL is convex).

    Args:
        kl: ``(K,)`` KL of the curve's points, any order.
        target: the KL wanted.

    Raises:
        ValueError: the target lies outside the curve. Nothing is extrapolated.
    """
    order = np.argsort(kl, kind="stable")
    sorted_kl = kl[order]
    if not sorted_kl[0] - 1e-12 <= target <= sorted_kl[-1] + 1e-12:
        raise ValueError(f"KL {target:.3g} lies outside the curve [{sorted_kl[0]:.3g}, {sorted_kl[-1]:.3g}]")
    right = int(np.clip(np.searchsorted(sorted_kl, target), 1, len(kl) - 1)) if len(kl) > 1 else 0
    weights = np.zeros(len(kl))
    if len(kl) == 1:
        weights[order[0]] = 1.0
        return weights
    left = right - 1
    width = sorted_kl[right] - sorted_kl[left]
    share = float(np.clip((target - sorted_kl[left]) / width, 0.0, 1.0)) if width > 0 else 1.0
    weights[order[left]], weights[order[right]] = 1 - share, share
    return weights


def matched_win_rate(
    kl_a: np.ndarray,
    kl_b: np.ndarray,
    preferences: np.ndarray,
    main_a: int,
    main_b: int,
    *,
    resamples: int,
    seed: int,
    confidence: float,
) -> dict[str, Any]:
    """Win rate of method A against method B where both have the KL of the closer of the two main policies.

    Args:
        kl_a: ``(P, I)`` KL of A's points on every prompt; the reference may be one of them (KL 0).
        kl_b: ``(P, J)`` the same for B.
        preferences: ``(P, I, J)`` preference for A's point over B's.
        main_a: index of A's main policy.
        main_b: index of B's main policy.
        resamples: bootstrap resamples over prompts; KL, interpolation and win rate are all redone in each.
        seed: of the resampling.
        confidence: of the interval.

    Returns:
        ``kl``, ``win_rate``, ``ci``, ``points`` (weights on each side), ``resamples_used``.

    Raises:
        ValueError: the matched KL lies outside one of the curves.
    """
    mean_a, mean_b, mean_w = kl_a.mean(0), kl_b.mean(0), preferences.mean(0)

    def at_lower(a: np.ndarray, b: np.ndarray, wins: np.ndarray) -> tuple[float, float, np.ndarray, np.ndarray]:
        target = min(a[main_a], b[main_b])
        on_a, on_b = mixture_weights(a, target), mixture_weights(b, target)
        return target, float(on_a @ wins @ on_b), on_a, on_b

    target, win_rate, on_a, on_b = at_lower(mean_a, mean_b, mean_w)
    draws = []
    weights = resampling_weights(len(kl_a), resamples, seed)
    all_a, all_b = weights @ kl_a, weights @ kl_b
    all_w = np.tensordot(weights, preferences, axes=1)
    for a, b, wins in zip(all_a, all_b, all_w, strict=True):
        try:
            draws.append(at_lower(a, b, wins)[1])
        except ValueError:
            continue  # this resample's curves do not reach; counted by resamples_used
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail]) if draws else (0.0, 1.0)
    return {
        "kl": float(target),
        "win_rate": win_rate,
        "ci": [float(low), float(high)],
        "weights": [on_a.tolist(), on_b.tolist()],
        "resamples_used": len(draws),
    }


def over_optimised(
    gold: np.ndarray,
    proxy: np.ndarray,
    *,
    resamples: int,
    seed: int,
    confidence: float,
) -> list[dict[str, Any]]:
    """For each point of a curve: is there an earlier one (of lower KL, of a lower step) with more gold, no more proxy?

    Marked where, against the best earlier point, gold falls (the paired interval lies below 0) while proxy does not
    (its interval does not lie below 0): the learned reward still rises, the true one falls (Gao et al. 2022).

    Args:
        gold: ``(P, K)`` gold rewards.
        proxy: ``(P, K)`` rewards of the model that was optimised.
    """
    found = []
    for column in range(gold.shape[1]):
        mark: dict[str, Any] = {"over_optimised": False}
        if column:
            best = int(np.argmax(gold[:, :column].mean(0)))
            difference = np.stack([gold[:, column] - gold[:, best], proxy[:, column] - proxy[:, best]], axis=1)
            change: Interval = mean_interval(difference, resamples=resamples, seed=seed, confidence=confidence)
            mark = {
                "over_optimised": bool(change.high[0] < 0 and change.high[1] >= 0),
                "against": best,
                "gold_change": float(change.mean[0]),
                "gold_change_ci": change.ci(0),
                "proxy_change": float(change.mean[1]),
                "proxy_change_ci": change.ci(1),
            }
        found.append(mark)
    return found
