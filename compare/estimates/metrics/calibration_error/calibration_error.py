"""Expected calibration error and Brier score of preference probabilities.

    evaluate.load("compare/estimates/metrics/calibration_error")

``probabilities`` are those that the first of a pair is preferred, ``references`` are 1 where it was and 0 where not.
The error is the mean distance of confidence and frequency over equally wide bins, weighted by their counts (Guo et al.
2017).
"""

import numpy as np

from ppo_vs_dpo.compare.estimates.metrics.base import NumbersMetric, checked


class CalibrationError(NumbersMetric):
    columns = ("probabilities", "references")

    def _compute(self, probabilities, references, bins=10):
        p, y = checked(probabilities, "probabilities"), np.asarray(references, dtype=np.float64)
        place = np.minimum((p * bins).astype(int), bins - 1)
        counts = np.bincount(place, minlength=bins)
        gap = np.abs(np.bincount(place, p, bins) - np.bincount(place, y, bins))
        return {
            "calibration_error": float(gap.sum() / len(p)),
            "brier_score": float(((p - y) ** 2).mean()),
            "n": len(p),
            "bins_used": int((counts > 0).sum()),
        }
