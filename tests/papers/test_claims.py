"""What decides a claim: intervals over seeds, theorems by their worst case, and nothing from one seed."""

import math

import numpy as np
import pytest
from scipy import stats

from ppo_vs_dpo.papers.claims import HELD, NOT_HELD, UNDECIDED, Statement, decide, figure, mean_interval, summary


def statement(**settings):
    return Statement("it rises", "nobody 2026", "up", "slope", figure("slope"), **settings)


def reports(*values):
    return [{"seed": seed, "figures": {"slope": value}} for seed, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((1.0, 1.1, 0.9), HELD),
        ((-1.0, -1.1, -0.9), NOT_HELD),
        ((1.0, -1.1, 0.2), UNDECIDED),
        ((5.0,), UNDECIDED),  # one seed decides nothing
        ((2.0, 2.0, 2.0), HELD),
    ],
)
def test_a_claim_about_the_mean(values, verdict):
    claim = statement(least=0.0).claim(reports(*values))
    assert claim.held == verdict
    assert claim.seeds == len(values)
    assert claim.measured == pytest.approx(np.mean(values))


def test_the_interval_is_students():
    values = [0.3, 0.9, 0.4, 0.7]
    mean, interval = mean_interval(values)
    wanted = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert mean == pytest.approx(np.mean(values), abs=1e-15)
    assert interval == pytest.approx(wanted, abs=1e-12)


def test_the_interval_covers_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.normal(0.5, 2.0, size=(4000, 3))
    inside = [low <= 0.5 <= high for low, high in (mean_interval(row)[1] for row in draws)]
    assert abs(np.mean(inside) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_a_claim_about_every_run_falls_with_one_counterexample():
    always = statement(least=0.0, always=True)
    held = always.claim(reports(0.1, 0.5))
    assert (held.held, held.measured, held.interval) == (HELD, 0.1, (0.1, 0.5))
    broken = always.claim(reports(0.1, -1e-3, 0.5))
    assert (broken.held, broken.measured) == (NOT_HELD, -1e-3)


def test_a_bar_with_two_ends():
    both = statement(least=0.4, most=0.6)
    assert both.claim(reports(0.5, 0.51, 0.49)).held == HELD
    assert both.claim(reports(0.7, 0.71, 0.69)).held == NOT_HELD
    assert both.bar == "at least 0.4 and at most 0.6"
    assert decide((0.55, 0.65), 0.4, 0.6) == UNDECIDED


def test_nothing_is_claimed_without_a_bar_or_a_report():
    with pytest.raises(ValueError, match="nothing could disprove"):
        statement()
    with pytest.raises(ValueError, match="at least one report"):
        statement(least=0.0).claim([])


def test_a_figure_that_is_not_a_number_decides_nothing():
    assert statement(least=0.0).claim(reports(1.0, math.nan, 2.0)).held == UNDECIDED
    assert statement(least=0.0, always=True).claim(reports(1.0, math.nan)).held == NOT_HELD


def test_summary_counts():
    claims = [statement(least=0.0).claim(reports(*values)) for values in ((1, 1.1), (-1, -1.1), (2, 2.1))]
    assert summary(claims) == "2 held, 1 not held"
