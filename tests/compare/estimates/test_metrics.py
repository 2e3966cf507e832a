"""The evaluate modules load without a network and equal scikit-learn and the statistics they wrap."""

import evaluate
import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.compare.estimates.length_control import length_controlled
from ppo_vs_dpo.compare.estimates.metrics import NAMES, load_metric
from ppo_vs_dpo.compare.statistics.rates import wilson


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


def test_loads_by_path_offline():
    metric = evaluate.load("compare/estimates/metrics/win_rate")
    assert metric.compute(preferences=[1.0, 0.5, 0.0, 1.0])["win_rate"] == 0.625


@pytest.mark.parametrize("name", NAMES)
def test_all_load_and_say_what_they_are(name):
    assert len(load_metric(name).description) > 80


def test_win_rate(rng):
    wins = (rng.permutation(300) < 190).astype(float)
    found = load_metric("win_rate").compute(preferences=wins)
    assert found["win_rate"] == pytest.approx(wins.mean())
    assert found["ci_low"] == pytest.approx(wilson(wins.sum(), 300)[0], abs=0.01)
    assert found["p_value"] < 0.05
    with pytest.raises(ValueError, match=r"entry 1 is 2\.0"):
        load_metric("win_rate").compute(preferences=[0.0, 2.0])


def test_length_controlled(rng):
    preferences, lengths, others = (rng.random(50) < 0.5).astype(float), rng.random(50) * 90, rng.random(50) * 50
    found = load_metric("length_controlled_win_rate").compute(
        preferences=preferences, lengths=lengths, other_lengths=others
    )
    assert found["length_controlled_win_rate"] == pytest.approx(
        length_controlled(preferences, lengths - others).win_rate
    )


def test_sequence_kl(rng):
    # q = N(0, 1), p = N(0.5, 1): KL 1/8.
    x = rng.normal(size=100_000)
    found = load_metric("sequence_kl").compute(logprobs=-(x**2) / 2, reference_logprobs=-((x - 0.5) ** 2) / 2)
    assert found["k1"] == pytest.approx(0.125, abs=0.005)
    assert found["k3"] == pytest.approx(0.125, abs=0.005)
    assert found["k3_ci_high"] - found["k3_ci_low"] < found["k1_ci_high"] - found["k1_ci_low"]


def test_preference_accuracy():
    found = load_metric("preference_accuracy").compute(chosen_scores=[1, 2, 3, 0], rejected_scores=[0, 2, 5, -1])
    assert found["preference_accuracy"] == pytest.approx(2.5 / 4)
    with pytest.raises(ValueError, match="pair 1"):
        load_metric("preference_accuracy").compute(chosen_scores=[1, float("nan")], rejected_scores=[0, 2])


def test_calibration(rng):
    p = rng.random(50_000)
    y = (rng.random(50_000) < p).astype(int)
    good = load_metric("calibration_error").compute(probabilities=p, references=y)
    assert good["calibration_error"] < 0.01
    assert good["brier_score"] == pytest.approx(brier_score_loss(y, p))
    bold = load_metric("calibration_error").compute(probabilities=np.where(p > 0.5, 1.0, 0.0), references=y)
    assert bold["calibration_error"] == pytest.approx(0.25, abs=0.01)


def test_unknown_metric_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean win_rate"):
        load_metric("winrate")
