"""Accuracy, calibration and correlation against values worked out by hand and against scikit-learn."""

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.metrics import brier_score_loss

from ppo_vs_dpo.reward_model.calibration import (
    brier,
    by_margin,
    correlation,
    expected_calibration_error,
    log_loss,
    overconfidence,
    pair_accuracy,
    reliability,
)


def test_accuracy_counts_ties_half_and_has_wilsons_interval():
    found = pair_accuracy(np.array([1.0, 2.0, -1.0, 0.0]))
    assert (found.accuracy, found.n) == (0.625, 4)
    # Wilson (1927) for 8 of 10, z = 1.959964: centre and half-width by hand.
    z, n, p = 1.959963985, 10, 0.8
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = pair_accuracy(np.array([1.0] * 8 + [-1.0] * 2))
    assert found.low == pytest.approx(centre - half, abs=1e-9)
    assert found.high == pytest.approx(centre + half, abs=1e-9)


def test_reliability_of_a_model_whose_claims_are_exact():
    """700 of 1000 pairs right at confidence 0.7: no calibration error, and the table says so."""
    delta = logit(0.7) * np.array([1.0] * 700 + [-1.0] * 300)
    (row,) = reliability(delta)
    assert row["n"] == 1000
    assert row["confidence"] == pytest.approx(0.7)
    assert row["accuracy"] == pytest.approx(0.7)
    assert expected_calibration_error([row]) == pytest.approx(0, abs=1e-12)


def test_calibration_error_by_hand():
    # Confidence .95 and always right; confidence .65 and right in one half: ECE = (2 * .05 + 2 * .15) / 4.
    delta = np.array([logit(0.95)] * 2 + [logit(0.65), -logit(0.65)])
    table = reliability(delta)
    assert expected_calibration_error(table) == pytest.approx(0.1)
    assert overconfidence(table) == pytest.approx((2 * -0.05 + 2 * 0.15) / 4)
    assert [row["n"] for row in table] == [2, 2]


def test_a_certain_model_falls_into_the_last_bin():
    (row,) = reliability(np.array([800.0, -800.0]))
    assert (row["high"], row["confidence"], row["accuracy"]) == (1.0, 1.0, 0.5)


def test_brier_and_log_loss():
    delta = np.array([0.3, -2.0, 4.0])
    assert brier(delta) == pytest.approx(brier_score_loss([1, 1, 1], expit(delta), pos_label=1))
    assert brier(np.zeros(5)) == 0.25
    assert log_loss(np.zeros(5)) == pytest.approx(np.log(2), abs=1e-15)
    assert log_loss(np.array([-1000.0])) == 1000.0


def test_loss_of_the_true_rewards_is_the_label_entropy():
    """papers.md 3.6.3: the population minimum of the Bradley-Terry loss is the mean entropy of the labels."""
    from ppo_vs_dpo.preferences.recipes.bradley_terry import label_entropy

    p = np.array([0.6, 0.9, 0.75])
    n = 100
    delta = np.concatenate([np.r_[[logit(q)] * round(q * n), [-logit(q)] * round((1 - q) * n)] for q in p])
    assert log_loss(delta) == pytest.approx(label_entropy(p), abs=1e-12)


def test_bins_by_margin():
    delta = np.array([1.0, -1.0, 1.0, 1.0, 1.0, -1.0])
    margin = np.array([5.0, 1.0, 4.0, 6.0, 3.0, 2.0])
    table = by_margin(delta, margin, ceiling=margin / 10, bins=3)
    assert [row["margin"] for row in table] == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert [row["accuracy"] for row in table] == [0.0, 1.0, 1.0]
    assert [row["ceiling"] for row in table] == pytest.approx([0.15, 0.35, 0.55])
    assert sum(row["n"] for row in by_margin(delta[:2], margin[:2])) == 2


def test_correlation():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert correlation(x, x**3)["spearman"] == pytest.approx(1)
    assert correlation(x, -2 * x)["pearson"] == pytest.approx(-1)
    assert correlation(x, np.ones(4)) is None
