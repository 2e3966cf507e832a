"""What a KL allows: how far a win rate can be from 1/2, whoever judges. Proofs in docs/statistics.md.

W = E h(y, y') for independent y ~ pi(.|x), y' ~ mu(.|x), averaged over prompts; h is any judge with h(y, y') + h(y',
y) = 1 (both orders averaged, ties 1/2), noisy or not transitive. KL is the mean over prompts of KL(pi_x || mu_x), in
nats, of the law that was sampled. Bounds are distances from 1/2.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

# phi is within 1e-8 of 1/2 from here on.
FAR = 16.0


def tilted_rank(slope: float) -> tuple[float, float]:
    """Of the law with density e^{slope u}: its mean less 1/2, and its KL to the uniform law."""
    if slope < 1e-3:
        # Series of coth(l/2)/2 - 1/l and of the KL; the closed forms cancel here.
        return slope / 12 - slope**3 / 720, slope**2 / 24 - slope**4 / 960
    mean = 1 / -np.expm1(-slope) - 1 / slope
    # log((e^l - 1) / l) without overflow.
    log_mass = slope + np.log(-np.expm1(-slope)) - np.log(slope)
    return mean - 0.5, slope * mean - log_mass


def phi(kl: float) -> float:
    """The largest |W - 1/2| of two policies with this mean KL, in either direction; sharp, concave, at most sqrt(KL /
    6).

    Attained by the exponential tilt of a uniform rank: phi(K) = m(l) - 1/2 with K = l m(l) - log((e^l - 1) / l), m its
    mean.
    """
    if not kl > 0:
        return 0.0 if kl <= 0 else float("nan")
    if kl >= FAR:
        return 0.5
    highest = float(np.exp(kl + 2.0))
    slope = brentq(lambda one: tilted_rank(one)[1] - kl, 0.0, highest, xtol=1e-14, rtol=1e-14)
    return float(tilted_rank(slope)[0])


def via_reference(kl_a: float, kl_b: float) -> float:
    """|W(a, b) - 1/2| for policies known by their KLs to one reference: phi(K_a) + phi(K_b) + sqrt(K_a K_b)."""
    return min(0.5, phi(kl_a) + phi(kl_b) + float(np.sqrt(max(kl_a, 0.0) * max(kl_b, 0.0))))


def best_of_n(n: int) -> float:
    """|W - 1/2| of best-of-n against the policy it selects from: n/(n+1) - 1/2, for every judge; met by its own."""
    return n / (n + 1) - 0.5


def best_of_n_against(n: int, kl: float) -> float:
    """|W - 1/2| of best-of-n over the reference against a policy with this KL to the reference.

    n/(n+1) - 1/2 + phi(K) + 2 E t_n t, with total variations t_n <= (n - 1) n^{-n/(n-1)} and t <= sqrt(K / 2)
    (Pinsker).
    """
    apart = 0.0 if n == 1 else (n - 1) * n ** (-n / (n - 1))
    return min(0.5, best_of_n(n) + phi(kl) + 2 * apart * min(1.0, float(np.sqrt(max(kl, 0.0) / 2))))


@dataclass(frozen=True)
class Allowed:
    """A bound on one win rate.

    Attributes:
        distance: of the win rate from 1/2, at the measured KLs.
        at_most: the same at the upper ends of the KLs' intervals; what is claimed.
        via: which bound it is.
    """

    distance: float
    at_most: float
    via: str

    def cut(self, ci: list[float]) -> tuple[list[float], bool]:
        """An interval cut to what the KLs allow, and whether it lies wholly outside (then it is left as it is)."""
        low, high = 0.5 - self.at_most, 0.5 + self.at_most
        if ci[0] > high or ci[1] < low:
            return list(ci), True
        return [max(ci[0], low), min(ci[1], high)], False
