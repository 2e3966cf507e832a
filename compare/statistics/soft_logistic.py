"""Logistic regression on preferences between 0 and 1, with the strength of its penalty from cross-validation.

scikit-learn's, as alpaca_eval uses it: each row stands there twice, once as a win and once as a loss, by its weight.
"""

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

# Strengths of the L1 penalty among which cross-validation chooses; scikit-learn's ten values for LogisticRegressionCV.
STRENGTHS = np.logspace(-4, 4, 10)


def fit_soft_labels(
    design: np.ndarray,
    preferences: np.ndarray,
    strength: float,
    penalty: str,
    weights: np.ndarray | None = None,
    tolerance: float = 1e-10,
    iterations: int = 10_000,
) -> np.ndarray:
    """Coefficients of a logistic regression on soft labels: each row counts once as 1 and once as 0, by its weight.

    ``design`` is ``(P, k)``, ``preferences`` ``(P,)`` in [0, 1], ``strength`` scikit-learn's ``C``, ``weights``
    ``(P,)`` of the rows (1 by default).

    Raises:
        ValueError: all preferences are 0, or all are 1.
    """
    rows = np.ones(len(design)) if weights is None else weights
    doubled = np.concatenate([design, design])
    labels = np.repeat([1, 0], len(design))
    sides = np.concatenate([preferences * rows, (1 - preferences) * rows])
    if len(np.unique(labels[sides > 0])) < 2:
        # All preferences are 0 or all are 1: the likelihood has no maximum.
        raise ValueError("all preferences are equal: a logistic regression has no finite solution")
    options = {"solver": "liblinear", "l1_ratio": 1.0} if penalty == "l1" else {"solver": "lbfgs", "l1_ratio": 0.0}
    model = LogisticRegression(
        C=strength, fit_intercept=False, tol=tolerance, max_iter=iterations, random_state=123, **options
    )
    return model.fit(doubled, labels, sample_weight=sides).coef_[0]


def _log_loss(design: np.ndarray, preferences: np.ndarray, weights: np.ndarray, coefficients: np.ndarray) -> float:
    p = np.clip(expit(design @ coefficients), 1e-15, 1 - 1e-15)
    return float(-np.mean(weights * (preferences * np.log(p) + (1 - preferences) * np.log(1 - p))))


def chosen_strength(
    design: np.ndarray,
    preferences: np.ndarray,
    weights: np.ndarray | None = None,
    tolerance: float = 1e-10,
    iterations: int = 10_000,
    folds: int = 5,
) -> float:
    """The L1 strength with the least held-out log loss over folds, as AlpacaEval's own code chooses it."""
    rows = np.ones(len(design)) if weights is None else weights
    losses = np.zeros(len(STRENGTHS))
    groups = np.arange(len(design))
    for train, test in GroupKFold(folds).split(design, groups=groups):
        for column, strength in enumerate(STRENGTHS):
            some = (rows[train], tolerance, iterations)
            coefficients = fit_soft_labels(design[train], preferences[train], strength, "l1", *some)
            losses[column] += _log_loss(design[test], preferences[test], rows[test], coefficients)
    return float(STRENGTHS[losses.argmin()])
