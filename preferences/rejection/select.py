"""Choosing among scored samples: pure functions whose laws are known exactly."""

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.special import expit


def best_weights(scores: Sequence[float]) -> np.ndarray:
    """Probability with which each sample is taken as the best: shared evenly by those with the highest score.

    Over n draws from p this gives the best-of-n law pi_n(y) = p(y) / P(r = r_y) [F(r_y)^n - F(r_y^-)^n]
    (papers: Beirami et al. 2024; Dong et al. 2023, RAFT).

    Args:
        scores: (n,) scores.

    Returns:
        (n,) probabilities.
    """
    scores = np.asarray(scores, dtype=float)
    best = scores == scores.max()
    return best / best.sum()


def pick_best(scores: Sequence[float], rng: np.random.Generator) -> int:
    """Index of a sample with the highest score, ties drawn at random."""
    return int(rng.choice(len(scores), p=best_weights(scores)))


def pick_worst(scores: Sequence[float], rng: np.random.Generator) -> int:
    """Index of a sample with the lowest score, ties drawn at random."""
    return pick_best(-np.asarray(scores, dtype=float), rng)


def acceptance(scores: Sequence[float], beta: float, r_max: float | None = None) -> np.ndarray:
    """Probability exp((r - r_max) / beta) of accepting a draw (Liu et al. 2023, RSO, Theorem 1).

    Draws from p that are accepted follow pi*(y) = p(y) exp(r(y) / beta) / Z; the rate is Z exp(-r_max / beta).

    ``r_max`` is the highest score there is; the highest of ``scores`` where it is not known.

    Returns:
        (n,) probabilities.
    """
    scores = np.asarray(scores, dtype=float)
    return np.exp((scores - (scores.max() if r_max is None else r_max)) / beta)


def rejection_sample(scores: Sequence[float], count: int, beta: float, rng: np.random.Generator) -> list[int]:
    """Up to ``count`` samples by statistical rejection sampling (Liu et al. 2023, Algorithm 1).

    Passes over the candidates, taking each with `acceptance`, the highest remaining score as r_max; what is taken does
    not come back. The first pass is exact where the highest score there is happens to be among the candidates.

    Returns:
        Indices in the order of acceptance.
    """
    remaining = list(range(len(scores)))
    accepted: list[int] = []
    while remaining and len(accepted) < count:
        probability = acceptance([scores[index] for index in remaining], beta)
        taken = [index for index, p in zip(remaining, probability, strict=True) if rng.random() < p]
        accepted += taken[: count - len(accepted)]
        remaining = [index for index in remaining if index not in taken]
    return accepted


def best_against_worst(scores: Sequence[float], rng: np.random.Generator) -> list[tuple[int, int]]:
    """The pair (best, worst), or none where all scores are equal."""
    if max(scores) == min(scores):
        return []
    return [(pick_best(scores, rng), pick_worst(scores, rng))]


def rso_pairs(scores: Sequence[float], pairs: int, beta: float, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Pairs (chosen, rejected) of accepted samples, the higher score chosen (RSO's first-round ranking)."""
    accepted = rejection_sample(scores, 2 * pairs, beta, rng)
    found = []
    for one, two in zip(accepted[::2], accepted[1::2], strict=False):
        if scores[one] != scores[two]:
            found.append((one, two) if scores[one] > scores[two] else (two, one))
    return found


def bradley_terry_pairs(scores: Sequence[float], pairs: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Pairs among all samples of a prompt (Rafailov et al. 2023: 4 samples, 6 pairs), labelled by sigma(r_1 - r_2)."""
    every = list(itertools.combinations(range(len(scores)), 2))
    chosen = sorted(rng.choice(len(every), size=min(pairs, len(every)), replace=False))
    found = []
    for number in chosen:
        one, two = every[number]
        wins = rng.random() < expit(scores[one] - scores[two])
        found.append((one, two) if wins else (two, one))
    return found
