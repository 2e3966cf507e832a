"""Length-controlled win rate: what would the judge have said had both completions been equally long?

AlpacaEval 2's generalised linear model (Dubois et al. 2024, arXiv 2404.04475) in its minimal form,

    logit P(m beats b | x) = theta + phi tanh(d(x) / sd(d)) [+ psi difficulty(x)],   d = length of m - length of b,

fitted to the preferences; the controlled win rate is the mean over x with d set to 0. Without a difficulty that is
sigma(theta). Swapping m and b turns theta into -theta, so wr(m, b) = 1 - wr(b, m); a model against itself has 1/2.

Equal length is a question to the data only where some of them lie on either side of it; how much lies on the thinner
side goes with every figure (`support_of`). AlpacaEval's leaderboard fits more: `compare.statistics.leaderboard`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit

from ppo_vs_dpo.compare.statistics.soft_logistic import chosen_strength, fit_soft_labels

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
        support: share of prompts on the thinner side of equal length (`support_of`).
        extrapolates: why the figure is extrapolation; ``None`` where it is not.
    """

    win_rate: float
    ci: tuple[float, float]
    theta: float
    phi: float
    psi: float
    standard_errors: tuple[float, ...]
    length_only_win_rate: float
    support: float
    extrapolates: str | None


def support_of(length_difference: np.ndarray) -> float:
    """Share of prompts on the thinner side of equal length, those of equal length included: from 0 to 1.

    0: one of the two is longer on every prompt, and a figure for equal lengths is extrapolation. 1/2: as many here as
    there.
    """
    difference = np.asarray(length_difference)
    if not len(difference):
        return 0.0
    return float(min((difference >= 0).mean(), (difference <= 0).mean()))


def support_notes(entries: list[dict]) -> list[str]:
    """One sentence about the pairs of a report whose lengths hardly overlap, or none."""
    known = [entry for entry in entries if entry.get("length_support") is not None]
    outside = [
        entry for entry in known if entry["length_controlled"] is None and entry["length_support"] < LEAST_SHARE
    ]
    if not outside:
        return []
    thinnest = min(outside, key=lambda entry: entry["length_support"])
    return [
        f"{len(outside)} of {len(known)} length-controlled win rates are refused: one answer is longer on nearly "
        f"every prompt, and a figure for equal lengths would be extrapolation (thinnest: {thinnest['policy']} against "
        f"{thinnest['versus']}, {100 * thinnest['length_support']:.1f} % on the other side)."
    ]


def features(length_difference: np.ndarray, difficulty: np.ndarray | None = None) -> np.ndarray:
    """``(P, 2)`` or ``(P, 3)``: 1, tanh(standardised length difference), difficulty."""
    difference = np.asarray(length_difference, dtype=np.float64)
    deviation = difference.std(ddof=1) if len(difference) > 1 else 0.0
    scaled = np.tanh(difference / deviation) if deviation > 0 else np.zeros_like(difference)
    columns = [np.ones_like(scaled), scaled]
    if difficulty is not None:
        columns.append(np.asarray(difficulty, dtype=np.float64))
    return np.stack(columns, axis=1)


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


def _objection(said: bool, check: Callable[..., None], *arguments: Any) -> str | None:
    """What a check objects to, where that is only said; else it is raised."""
    try:
        check(*arguments)
    except ValueError as error:
        if not said:
            raise
        return str(error)
    return None


def length_controlled(
    preferences: np.ndarray,
    length_difference: np.ndarray,
    difficulty: np.ndarray | None = None,
    *,
    confidence: float = 0.95,
    clusters: np.ndarray | None = None,
    regularised: bool = False,
    extrapolate: bool = False,
) -> LengthControlled:
    """Fit the model to one pair of policies.

    Args:
        preferences: ``(P,)`` in [0, 1].
        length_difference: ``(P,)`` length of the policy's completion minus the other's.
        difficulty: ``(P,)`` of each prompt, optional.
        clusters: ``(P,)`` which prompts are one unit of evidence; each its own by default.
        regularised: choose an L1 penalty by cross-validation, as AlpacaEval does; else plain maximum likelihood.
        extrapolate: give a figure where lengths do not overlap, too, and say so in it; else refuse.

    Raises:
        ValueError: fewer than 10 prompts, all preferences equal 0 or 1, or lengths that do not overlap: one side is
            longer nearly always, and what the judge would say at equal length is nowhere to be seen.
    """
    preferences = np.asarray(preferences, dtype=np.float64)
    if len(preferences) < 10:
        raise ValueError(f"{len(preferences)} prompts are too few to fit a length effect")
    why = _objection(extrapolate, check_overlap, np.asarray(length_difference, dtype=np.float64))
    design = features(length_difference, difficulty)
    used = np.ptp(design, axis=0) > 0
    used[0] = True
    strength = chosen_strength(design[:, used], preferences) if regularised else UNPENALISED
    coefficients = np.zeros(design.shape[1])
    coefficients[used] = fit_soft_labels(design[:, used], preferences, strength, "l1" if regularised else "l2")
    # Sandwich covariance A^-1 B A^-1 of the estimating equations (White 1982).
    p = expit(design @ coefficients)
    a = np.linalg.pinv((design * (p * (1 - p))[:, None]).T @ design)
    why = why or _objection(extrapolate, check_separable, a, used)
    # HC3 (MacKinnon & White 1985): a prompt's residual is what it would be without that prompt.
    leverage = np.einsum("pi,ij,pj->p", design, a, design) * p * (1 - p)
    residual = (preferences - p) / np.maximum(1 - leverage, 0.1)
    scores, units = design * residual[:, None], len(preferences)
    if clusters is not None:
        # Prompts of one cluster err together (Liang & Zeger 1986).
        labels, group = np.unique(clusters, return_inverse=True)
        units, summed = len(labels), np.zeros((len(labels), design.shape[1]))
        np.add.at(summed, group, scores)
        scores = summed * np.sqrt(units / max(units - 1, 1)) if units < len(preferences) else summed
    b = scores.T @ scores
    covariance = a @ b @ a
    errors = np.sqrt(np.clip(np.diag(covariance), 0, None))
    at_equal = design.copy()
    at_equal[:, 1] = 0.0
    win_rates = expit(at_equal @ coefficients)
    # Within rounding of 0 or 1 the logit scale ends.
    mean = float(np.clip(win_rates.mean(), 1e-9, 1 - 1e-9))
    gradient = (at_equal * (win_rates * (1 - win_rates))[:, None]).mean(axis=0)
    error = float(np.sqrt(gradient @ covariance @ gradient)) / max(mean * (1 - mean), 1e-12)
    z = stats.t.ppf(0.5 + confidence / 2, max(units - int(used.sum()), 1))
    logit = np.log(mean) - np.log1p(-mean)
    return LengthControlled(
        win_rate=mean,
        ci=(float(expit(logit - z * error)), float(expit(logit + z * error))),
        theta=float(coefficients[0]),
        phi=float(coefficients[1]),
        psi=float(coefficients[2]) if difficulty is not None else 0.0,
        standard_errors=tuple(errors.tolist()),
        length_only_win_rate=float(expit(design[:, 1] * coefficients[1]).mean()),
        support=support_of(length_difference),
        extrapolates=why,
    )
