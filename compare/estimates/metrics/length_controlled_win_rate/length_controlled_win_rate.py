"""Length-controlled win rate of AlpacaEval 2 (Dubois et al. 2024).

    evaluate.load("compare/estimates/metrics/length_controlled_win_rate")

``lengths`` and ``other_lengths`` are those of the policy's and the other's completions, in any one unit. The fitted
logistic model (intercept and tanh of the standardised length difference) is evaluated at equal lengths.
"""

import numpy as np

from ppo_vs_dpo.compare.estimates.length_control import length_controlled
from ppo_vs_dpo.compare.estimates.metrics.base import NumbersMetric, checked


class LengthControlledWinRate(NumbersMetric):
    columns = ("preferences", "lengths", "other_lengths")

    def _compute(self, preferences, lengths, other_lengths, confidence=0.95, regularised=False):
        values = checked(preferences, "preferences")
        difference = np.asarray(lengths) - np.asarray(other_lengths)
        fit = length_controlled(values, difference, confidence=confidence, regularised=regularised)
        return {
            "length_controlled_win_rate": fit.win_rate,
            "ci_low": fit.ci[0],
            "ci_high": fit.ci[1],
            "length_bias": fit.phi,
            "win_rate": float(values.mean()),
        }
