"""Length-controlled win rate: what would the judge have said had both completions been equally long?

AlpacaEval 2's generalised linear model (Dubois et al. 2024, arXiv 2404.04475) in its minimal form,

    logit P(m beats b | x) = theta + phi tanh(d(x) / sd(d)) [+ psi difficulty(x)],   d = length of m - length of b,

fitted to the preferences; the controlled win rate is the mean over x with d set to 0. Without a difficulty that is
sigma(theta). Swapping m and b turns theta into -theta, so wr(m, b) = 1 - wr(b, m); a model against itself has 1/2.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

# Strengths of the L1 penalty among which cross-validation chooses; scikit-learn's ten values for LogisticRegressionCV.
STRENGTHS = np.logspace(-4, 4, 10)
# A penalty this weak changes no digit that is shown.
UNPENALISED = 1e10

# Where lengths do not overlap the model only extrapolates: the figure is refused (docs/statistics.md).
FEWEST_OTHER, LEAST_SHARE, MOST_CORRELATED = 5, 0.1, 0.95


@dataclass(frozen=True)
class LengthControlled:
    """A fitted model.

    Attributes:
        win_rate: mean preference at equal lengths.
        ci: interval by the delta method on the logit scale, with t, from a sandwich covariance that allows for what
            each prompt does to its own fit (HC3; preferences need not be 0/1).
        theta: quality difference, log-odds.
        phi: length bias of the judge, log-odds for a length difference of infinitely many standard deviations.
        psi: slope on difficulty, 0 without one.
        standard_errors: of theta, phi (and psi).
        length_only_win_rate: what lengths alone would give two equally good models.
    """

    win_rate: float
    ci: tuple[float, float]
    theta: float
    phi: float
    psi: float
    standard_errors: tuple[float, ...]
    length_only_win_rate: float


def features(length_difference: np.ndarray, difficulty: np.ndarray | None = None) -> np.ndarray:
    """``(P, 2)`` or ``(P, 3)``: 1, tanh(standardised length difference), difficulty."""
    difference = np.asarray(length_difference, dtype=np.float64)
    deviation = difference.std(ddof=1) if len(difference) > 1 else 0.0
    scaled = np.tanh(difference / deviation) if deviation > 0 else np.zeros_like(difference)
    columns = [np.ones_like(scaled), scaled]
    if difficulty is not None:
        columns.append(np.asarray(difficulty, dtype=np.float64))
    return np.stack(columns, axis=1)


def _fit(design: np.ndarray, preferences: np.ndarray, strength: float, penalty: str) -> np.ndarray:
    """Coefficients of a logistic regression on soft labels: each row counts once as 1 and once as 0, by its weight."""
    doubled = np.concatenate([design, design])
    labels = np.repeat([1, 0], len(design))
    weights = np.concatenate([preferences, 1 - preferences])
    if len(np.unique(labels[weights > 0])) < 2:
        # All preferences are 0 or all are 1: the likelihood has no maximum.
        raise ValueError("all preferences are equal: a logistic regression has no finite solution")
    options = {"solver": "liblinear", "l1_ratio": 1.0} if penalty == "l1" else {"solver": "lbfgs", "l1_ratio": 0.0}
    model = LogisticRegression(
        C=strength, fit_intercept=False, tol=1e-10, max_iter=10_000, random_state=123, **options
    )
    return model.fit(doubled, labels, sample_weight=weights).coef_[0]


def _log_loss(design: np.ndarray, preferences: np.ndarray, coefficients: np.ndarray) -> float:
    p = np.clip(expit(design @ coefficients), 1e-15, 1 - 1e-15)
    return float(-np.mean(preferences * np.log(p) + (1 - preferences) * np.log(1 - p)))


def chosen_strength(design: np.ndarray, preferences: np.ndarray, folds: int = 5) -> float:
    """The L1 strength with the least held-out log loss over contiguous folds, as AlpacaEval's own code chooses it."""
    losses = np.zeros(len(STRENGTHS))
    groups = np.arange(len(design))
    for train, test in GroupKFold(folds).split(design, groups=groups):
        for column, strength in enumerate(STRENGTHS):
            coefficients = _fit(design[train], preferences[train], strength, "l1")
            losses[column] += _log_loss(design[test], preferences[test], coefficients)
    return float(STRENGTHS[losses.argmin()])


def check_overlap(difference: np.ndarray) -> None:
    """Refuse to say what happens at equal length where one side is longer nearly always.

    Raises:
        ValueError: fewer than 5 prompts, or than a tenth of them, on which one of the two is not the longer one.
    """
    least = max(FEWEST_OTHER, LEAST_SHARE * len(difference))
    for side, rows in (("longer", difference <= 0), ("shorter", difference >= 0)):
        if rows.sum() < least:
            raise ValueError(
                f"lengths do not overlap: one answer is {side} on all but {int(rows.sum())} of "
                f"{len(difference)} prompts, so "
                f"nothing says how the judge goes at equal length"
            )


def check_separable(inverse: np.ndarray, used: np.ndarray) -> None:
    """Refuse where quality and length cannot be told apart.

    Raises:
        ValueError: the two estimates' correlation is above `MOST_CORRELATED`.
    """
    if used[1]:
        correlation = abs(inverse[0, 1]) / np.sqrt(max(inverse[0, 0] * inverse[1, 1], 1e-300))
        if correlation > MOST_CORRELATED:
            raise ValueError(
                f"quality and length cannot be told apart: their estimates' correlation is {correlation:.2f}"
            )


def length_controlled(
    preferences: np.ndarray,
    length_difference: np.ndarray,
    difficulty: np.ndarray | None = None,
    *,
    confidence: float = 0.95,
    regularised: bool = False,
) -> LengthControlled:
    """Fit the model to one pair of policies.

    Args:
        preferences: ``(P,)`` in [0, 1].
        length_difference: ``(P,)`` length of the policy's completion minus the other's.
        difficulty: ``(P,)`` of each prompt, optional.
        confidence: of the interval.
        regularised: choose an L1 penalty by cross-validation, as AlpacaEval does; else plain maximum likelihood.

    Raises:
        ValueError: fewer than 10 prompts, all preferences equal 0 or 1, or lengths that do not overlap: one side is
            longer nearly always, and what the judge would say at equal length is nowhere to be seen.
    """
    preferences = np.asarray(preferences, dtype=np.float64)
    if len(preferences) < 10:
        raise ValueError(f"{len(preferences)} prompts are too few to fit a length effect")
    check_overlap(np.asarray(length_difference, dtype=np.float64))
    design = features(length_difference, difficulty)
    used = np.ptp(design, axis=0) > 0
    used[0] = True
    strength = chosen_strength(design[:, used], preferences) if regularised else UNPENALISED
    coefficients = np.zeros(design.shape[1])
    coefficients[used] = _fit(design[:, used], preferences, strength, "l1" if regularised else "l2")
    # Sandwich covariance A^-1 B A^-1 of the estimating equations (White 1982).
    p = expit(design @ coefficients)
    a = np.linalg.pinv((design * (p * (1 - p))[:, None]).T @ design)
    check_separable(a, used)
    # HC3 (MacKinnon & White 1985): a prompt's residual is what it would be without that prompt.
    leverage = np.einsum("pi,ij,pj->p", design, a, design) * p * (1 - p)
    residual = (preferences - p) / np.maximum(1 - leverage, 0.1)
    b = (design * (residual**2)[:, None]).T @ design
    covariance = a @ b @ a
    errors = np.sqrt(np.clip(np.diag(covariance), 0, None))
    at_equal = design.copy()
    at_equal[:, 1] = 0.0
    win_rates = expit(at_equal @ coefficients)
    # Within rounding of 0 or 1 the logit scale ends.
    mean = float(np.clip(win_rates.mean(), 1e-9, 1 - 1e-9))
    gradient = (at_equal * (win_rates * (1 - win_rates))[:, None]).mean(axis=0)
    error = float(np.sqrt(gradient @ covariance @ gradient)) / max(mean * (1 - mean), 1e-12)
    z = stats.t.ppf(0.5 + confidence / 2, max(len(preferences) - int(used.sum()), 1))
    logit = np.log(mean) - np.log1p(-mean)
    return LengthControlled(
        win_rate=mean,
        ci=(float(expit(logit - z * error)), float(expit(logit + z * error))),
        theta=float(coefficients[0]),
        phi=float(coefficients[1]),
        psi=float(coefficients[2]) if difficulty is not None else 0.0,
        standard_errors=tuple(errors.tolist()),
        length_only_win_rate=float(expit(design[:, 1] * coefficients[1]).mean()),
    )
