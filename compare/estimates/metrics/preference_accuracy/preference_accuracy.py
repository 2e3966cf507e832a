"""How often a reward model or an implicit reward ranks a pair as its label does.

    evaluate.load("compare/estimates/metrics/preference_accuracy")

``chosen_scores`` and ``rejected_scores`` are the scores of the two sides; equal scores count half.
"""

import numpy as np

from ppo_vs_dpo.compare.estimates.metrics.base import NumbersMetric
from ppo_vs_dpo.compare.statistics.rates import wilson


class PreferenceAccuracy(NumbersMetric):
    columns = ("chosen_scores", "rejected_scores")

    def _compute(self, chosen_scores, rejected_scores, confidence=0.95):
        margin = np.asarray(chosen_scores, dtype=np.float64) - np.asarray(rejected_scores, dtype=np.float64)
        if not np.isfinite(margin).all():
            raise ValueError(f"pair {np.flatnonzero(~np.isfinite(margin))[0]} has a score that is not a number")
        right = (1 + np.sign(margin)) / 2
        low, high = wilson(right.sum(), len(right), confidence)
        return {"preference_accuracy": float(right.mean()), "ci_low": low, "ci_high": high, "n": len(right)}
