"""Win rate with its interval and test.

    evaluate.load("compare/estimates/metrics/win_rate")

Preferences are numbers in [0, 1], one a prompt: 1 the policy won, 0 it lost, 0.5 a tie. ``win_rate`` is their mean, so
ties count half; ``ci_low`` and ``ci_high`` are a score interval. ``p_value`` is the sign-flip permutation test's and
never contradicts the interval: it is at most 1 - confidence exactly where 1/2 lies outside.
"""

from ppo_vs_dpo.compare.estimates.metrics.base import NumbersMetric, checked
from ppo_vs_dpo.compare.statistics.significance import win_rates_with_p


class WinRate(NumbersMetric):
    columns = ("preferences",)

    def _compute(self, preferences, confidence=0.95, flips=9999, seed=0):
        values = checked(preferences, "preferences")[:, None]
        interval, p = win_rates_with_p(values, confidence=confidence, flips=flips, seed=seed)
        low, high = interval.ci(0)
        return {
            "win_rate": float(interval.mean[0]),
            "ci_low": low,
            "ci_high": high,
            "p_value": float(p[0]),
            "ties": float((values == 0.5).mean()),
            "n": len(values),
        }
