"""The length-controlled win rate recovers what was injected, keeps AlpacaEval's identities, equals its own figures."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from ppo_vs_dpo.compare.estimates.length_control import length_controlled


def simulate(rng, n, theta, phi, psi=0.0, shift=0.0):
    """Judgements with an injected quality difference, length bias and difficulty slope (papers.md M9)."""
    lengths = np.round(rng.normal(shift, 40, n))
    difficulty = rng.normal(size=n)
    logit = theta + phi * np.tanh(lengths / lengths.std(ddof=1)) + psi * difficulty
    return (rng.random(n) < expit(logit)).astype(float), lengths, difficulty


@pytest.mark.parametrize(("theta", "phi", "psi"), [(0.5, 1.5, 0.0), (-0.3, 0.8, 0.6), (0.0, 2.0, -0.4)])
def test_recovers_what_was_injected(theta, phi, psi):
    inside = np.zeros(3)
    for trial in range(120):
        fit = length_controlled(*simulate(np.random.default_rng(trial), 1500, theta, phi, psi))
        found, true, errors = np.array([fit.theta, fit.phi, fit.psi]), (theta, phi, psi), fit.standard_errors
        inside += np.abs(found - true) < norm.ppf(0.975) * np.array(errors)
    assert (inside / 120 > 0.89).all()
    assert (inside / 120 < 1).all()


def test_a_policy_that_is_only_longer():
    """B writes more and no better: raw it wins, length-controlled it does not. A is better at equal length."""
    rng = np.random.default_rng(0)
    longer = simulate(rng, 5000, 0.0, 1.5, shift=40)[:2]
    raw, fit = longer[0].mean(), length_controlled(*longer)
    assert raw > 0.65
    assert fit.ci[0] < 0.5 < fit.ci[1]
    assert fit.length_only_win_rate == pytest.approx(raw, abs=0.03)
    better = length_controlled(*simulate(rng, 5000, 0.6, 1.5, shift=-40)[:2])
    assert better.ci[0] > 0.5


def test_interval_covers():
    covered = 0
    for trial in range(300):
        rng = np.random.default_rng([7, trial])
        fit = length_controlled(*simulate(rng, 300, 0.4, 1.0)[:2])
        covered += fit.ci[0] <= expit(0.4) <= fit.ci[1]
    assert 0.92 <= covered / 300 <= 0.98


def test_identities():
    preferences, lengths, _ = simulate(np.random.default_rng(1), 400, 0.4, 1.0, shift=10)
    forward, back = length_controlled(preferences, lengths), length_controlled(1 - preferences, -lengths)
    assert forward.win_rate + back.win_rate == pytest.approx(1.0, abs=1e-6)
    assert forward.phi == pytest.approx(back.phi, abs=1e-5)
    itself = length_controlled(np.full(50, 0.5), np.zeros(50))
    assert itself.win_rate == pytest.approx(0.5, abs=1e-9)


def test_without_length_bias_it_is_the_raw_one():
    preferences, lengths, _ = simulate(np.random.default_rng(2), 4000, 0.5, 0.0, shift=25)
    fit = length_controlled(preferences, lengths)
    assert fit.win_rate == pytest.approx(preferences.mean(), abs=0.02)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="all preferences are equal"):
        length_controlled(np.ones(30), np.arange(30.0) - 15)
    with pytest.raises(ValueError, match="too few"):
        length_controlled(np.array([0.0, 1.0]), np.arange(2.0))


@pytest.mark.parametrize("spread", [1, 10, 20, 40])
def test_lengths_that_do_not_overlap_are_refused(spread):
    """All answers longer by 100: whether quality or length won three in four cannot be known, and is not made up."""
    rng = np.random.default_rng(0)
    difference = rng.normal(100, spread, 200)
    preferences = (rng.random(200) < 0.75).astype(float)
    with pytest.raises(ValueError, match="lengths do not overlap: one answer is longer on all but"):
        length_controlled(preferences, difference)
    with pytest.raises(ValueError, match="one answer is shorter on all but"):
        length_controlled(1 - preferences, -difference)


def test_few_prompts_are_covered():
    """29 prompts, lengths that overlap: the sandwich without HC3 and t covers too little."""
    covered = trials = 0
    for trial in range(300):
        rng = np.random.default_rng([9, trial])
        try:
            fit = length_controlled(*simulate(rng, 29, 0.3, 1.0, shift=20)[:2])
        except ValueError:
            continue
        trials, covered = trials + 1, covered + (fit.ci[0] <= expit(0.3) <= fit.ci[1])
    assert trials > 250
    assert 0.93 <= covered / trials <= 0.99
