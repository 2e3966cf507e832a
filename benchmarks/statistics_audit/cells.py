"""One simulated rate, and what all simulations need."""

from dataclasses import dataclass

import numpy as np

COVERAGE, LEVEL = (93.0, 98.0), (0.0, 6.0)


@dataclass
class Cell:
    """One simulated rate, in percent."""

    what: str
    found: float
    trials: int
    bar: tuple[float, float]
    bound: bool = False

    @property
    def error(self) -> float:
        """Monte-Carlo standard error of the rate."""
        p = np.clip(self.found / 100, 0.5 / self.trials, 1 - 0.5 / self.trials)
        return 100 * float(np.sqrt(p * (1 - p) / self.trials))

    @property
    def verdict(self) -> str:
        """Whether the rate keeps its bar, within three Monte-Carlo errors; a bound may cover more."""
        low, high = self.bar
        if self.found < low - 3 * self.error:
            return "**below**"
        if self.found > high + 3 * self.error:
            return "bound" if self.bound else "**above**"
        return "ok"


def held(interval, truth) -> np.ndarray:
    """Which intervals hold the truth."""
    return (interval.low <= truth + 1e-12) & (interval.high >= truth - 1e-12)


def percent(values) -> float:
    """Mean of a boolean array in percent."""
    return 100 * float(np.mean(values))


def preference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """``(..., P)`` mean preference over all pairs of draws ``(..., P, A)`` and ``(..., P, B)``."""
    return 0.5 + 0.5 * np.sign(ours[..., :, None] - theirs[..., None, :]).mean((-1, -2))
