"""KL of sampled completions to a reference, from sequence log-probabilities.

    evaluate.load("compare/estimates/metrics/sequence_kl")

``logprobs`` and ``reference_logprobs`` are of whole completions (sums over tokens, nats), drawn from the policy at the
temperature they were computed at. ``k1`` is unbiased with high variance; ``k3`` is unbiased and never negative, here
of whole sequences (Schulman). Averages over tokens are not this number.
"""

import numpy as np

from ppo_vs_dpo.compare.estimates.metrics.base import NumbersMetric
from ppo_vs_dpo.compare.statistics.intervals import mean_interval


class SequenceKl(NumbersMetric):
    columns = ("logprobs", "reference_logprobs")

    def _compute(self, logprobs, reference_logprobs, confidence=0.95):
        log_ratio = np.asarray(logprobs, dtype=np.float64) - np.asarray(reference_logprobs, dtype=np.float64)
        estimates = np.stack([log_ratio, np.expm1(-log_ratio) + log_ratio], axis=1)
        interval = mean_interval(estimates, confidence=confidence)
        found = {}
        for column, name in enumerate(("k1", "k3")):
            low, high = interval.ci(column)
            found |= {name: float(interval.mean[column]), f"{name}_ci_low": low, f"{name}_ci_high": high}
        return {**found, "n": len(log_ratio)}
