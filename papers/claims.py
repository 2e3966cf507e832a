"""A claim of a paper, and what our own runs say about it: held, not held, or not decided by so little.

A paper's module declares `Statement`s; `Statement.claim` puts the reports of all seeds through one. What is decided,
and by which interval, is fixed here and the same for every paper.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Report = dict[str, Any]
HELD, NOT_HELD, UNDECIDED = "held", "not held", "not decided by so little"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Claim:
    """A statement and its check.

    Attributes:
        statement: what the paper claims.
        measured: our figure: the mean over seeds, or the worst of them where the claim is about all.
        interval: of that figure: 95 % over seeds (Student's t), or the range where the claim is about all.
        held: `HELD`, `NOT_HELD` or `UNDECIDED`.
        seeds: how many runs stand behind it.
    """

    statement: "Statement"
    measured: float
    interval: tuple[float, float]
    held: str
    seeds: int


@dataclass(frozen=True)
class Statement:
    """What a paper says, and which figure of a report shows it.

    Attributes:
        text: the claim, in our words.
        source: paper, table or figure.
        expected: the paper's own figure, or the direction.
        quantity: what is measured, with its unit.
        of: the figure in one seed's report.
        least: the claim says at least this.
        most: the claim says at most this.
        always: the claim is about every run (a theorem, an identity): one counterexample disproves it. Otherwise it is
            about the mean over seeds.
    """

    text: str
    source: str
    expected: str
    quantity: str
    of: Callable[[Report], float]
    least: float = -math.inf
    most: float = math.inf
    always: bool = False

    def __post_init__(self):
        if self.least == -math.inf and self.most == math.inf:
            raise ValueError(f"a claim that nothing could disprove: {self.text}")

    @property
    def bar(self) -> str:
        """What the figure is held against."""
        low = "" if self.least == -math.inf else f"at least {self.least:g}"
        high = "" if self.most == math.inf else f"at most {self.most:g}"
        return " and ".join(part for part in (low, high) if part)

    def claim(self, reports: Sequence[Report]) -> Claim:
        """The check on the reports of all seeds.

        Raises:
            ValueError: there is no report.
        """
        if not reports:
            raise ValueError("a claim needs at least one report")
        values = np.array([self.of(report) for report in reports], dtype=float)
        if self.always:
            # The value nearest to breaking the bar.
            room = np.minimum(values - self.least, self.most - values)
            measured, interval = float(values[np.argmin(room)]), (float(values.min()), float(values.max()))
            held = HELD if bool((room >= 0).all()) else NOT_HELD
        else:
            measured, interval = mean_interval(values)
            held = decide(interval, self.least, self.most)
        return Claim(self, measured, interval, held, len(values))


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Mean over seeds and its 95 % interval by Student's t; one seed leaves everything open.

    Values that agree in every digit (an exact world without draws) have an interval of one point.
    """
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2 or not np.isfinite(values).all():
        return mean, (-math.inf, math.inf)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * error
    return mean, (mean - half, mean + half)


def decide(interval: tuple[float, float], least: float, most: float) -> str:
    """Whether an interval lies inside the bar, outside of it, or on its edge."""
    low, high = interval
    if low >= least and high <= most:
        return HELD
    if high < least or low > most:
        return NOT_HELD
    return UNDECIDED


def figure(name: str) -> Callable[[Report], float]:
    """Reads ``report["figures"][name]``."""
    return lambda report: report["figures"][name]


def summary(claims: Sequence[Claim]) -> str:
    """``3 held, 1 not held, 1 not decided by so little``."""
    counts = {state: sum(claim.held == state for claim in claims) for state in (HELD, NOT_HELD, UNDECIDED)}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)
