"""Win rate with its interval and test.

    evaluate.load("compare/estimates/metrics/win_rate")

Preferences are numbers in [0, 1], one a prompt: 1 the policy won, 0 it lost, 0.5 a tie. ``win_rate`` is their mean, so
ties count half; ``ci_low`` and ``ci_high`` are the paired-bootstrap interval, ``p_value`` the sign-flip permutation
test of "neither is better".
"""

from ppo_vs_dpo.compare.estimates.metrics.base import NumbersMetric, checked
from ppo_vs_dpo.compare.estimates.statistics import permutation_test, win_rate_interval


class WinRate(NumbersMetric):
    """Win rate with its interval and test."""

    columns = ("preferences",)

    def _compute(self, preferences, confidence=0.95, resamples=2000, seed=0):
        values = checked(preferences, "preferences")[:, None]
        interval = win_rate_interval(values, confidence=confidence, resamples=resamples, seed=seed)
        low, high = interval.ci(0)
        return {
            "win_rate": float(interval.mean[0]),
            "ci_low": low,
            "ci_high": high,
            "p_value": float(permutation_test(values, seed=seed)[0]),
            "ties": float((values == 0.5).mean()),
            "n": len(values),
        }
