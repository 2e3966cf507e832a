"""Two methods at one KL: the farther one as a mixture of two of its points whose own KL is the nearer one's.

Randomising once a completion between two policies A and B is a policy, m = (1 - w) A + w B. Its win rates are the
interpolated ones, exactly. Its KL is less than the interpolated one:

    KL(m || ref) = (1 - w) [KL(A || ref) - KL(A || m)] + w [KL(B || ref) - KL(B || m)],

so w is found from the mixture's own KL, for which each point's completions need log-probabilities under the other.
Interpolating KL itself would compare the nearer method with one of less KL (docs/statistics.md).
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ppo_vs_dpo.compare.sampling.contenders import Contender


def curve(contenders: list[Contender], method: str) -> list[Contender]:
    """The points of one method with a measured KL, by rising KL."""
    own = [c for c in contenders if c.method == method and c.kl() is not None]
    return sorted(own, key=lambda c: (c.kl().mean(), c.name))


def neighbours(line: list[Contender], target: float) -> tuple[Contender, Contender] | None:
    """The two points of a line whose KLs enclose the target, or ``None``: nothing is extrapolated."""
    for below, above in pairwise(line):
        if below.kl().mean() <= target <= above.kl().mean():
            return below, above
    return None


@dataclass(frozen=True)
class Mixture:
    """Two points, ``(P,)`` and ``(P, D)`` arrays.

    Attributes:
        kl_below: KL to the reference of the point of lower KL.
        kl_above: of the other.
        ratio_below: log B - log A of the lower point's (A's) own completions.
        ratio_above: log A - log B of the higher point's (B's) own completions.
    """

    kl_below: np.ndarray
    kl_above: np.ndarray
    ratio_below: np.ndarray
    ratio_above: np.ndarray

    def kl(self, weight: float) -> np.ndarray:
        """``(P,)`` KL to the reference of the mixture with this weight of the higher point; its mean rises with it."""
        if weight <= 0:
            return self.kl_below
        if weight >= 1:
            return self.kl_above
        with np.errstate(over="ignore"):
            # KL(A || m) = -E_A log(1 - w + w B / A), at most -log(1 - w); KL(B || m) likewise.
            of_below = -np.logaddexp(np.log1p(-weight), np.log(weight) + self.ratio_below).mean(axis=1)
            of_above = -np.logaddexp(np.log(weight), np.log1p(-weight) + self.ratio_above).mean(axis=1)
        return (1 - weight) * (self.kl_below - of_below) + weight * (self.kl_above - of_above)

    def weight_at(self, target: float) -> float:
        """The weight at which the mixture's mean KL is the target, by bisection; between the two points' KLs."""
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.kl(middle).mean() < target else (low, middle)
        return (low + high) / 2


def matched_values(
    mixture: Mixture, near_kl: np.ndarray, below: np.ndarray, above: np.ndarray
) -> tuple[np.ndarray, float]:
    """The mixture's win rate against the nearer policy at that policy's KL, as one value a prompt.

    The weight is itself estimated. A prompt's value holds what it does to the win rate through the weight (delta
    method: -(W_B - W_A) (KL_m - KL_near) / d KL_m / dw), so that the values' mean is the win rate and their spread its
    spread.

    Args:
        mixture: of the farther method's two points.
        near_kl: ``(P,)`` of the nearer policy.
        below: ``(P,)`` preferences of the lower point over the nearer policy.
        above: of the higher point.

    Returns:
        ``(P,)`` values and the weight of the higher point.
    """
    weight = mixture.weight_at(float(near_kl.mean()))
    step = 1e-4
    left, right = max(weight - step, 0.0), min(weight + step, 1.0)
    slope = (mixture.kl(right).mean() - mixture.kl(left).mean()) / (right - left)
    excess = mixture.kl(weight) - near_kl
    values = (1 - weight) * below + weight * above
    if slope > 0:
        values = values - (above.mean() - below.mean()) * (excess - excess.mean()) / slope
    return values, weight
