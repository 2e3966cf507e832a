"""Preferences from known rewards: the Bradley-Terry model (Bradley & Terry 1952), labels and what they allow."""

import numpy as np
from scipy.special import entr, expit


def preference_probability(first, second) -> np.ndarray:
    """P(first preferred to second) = sigma(r_1 - r_2).

    Args:
        first: (N,) rewards of the first completions.
        second: (N,) rewards of the second ones.

    Returns:
        (N,) probabilities.
    """
    return expit(np.asarray(first, dtype=float) - np.asarray(second, dtype=float))


def draw_labels(probability, rng: np.random.Generator) -> np.ndarray:
    """(N,) booleans, True where the first is chosen: Bernoulli draws of (N,) probabilities."""
    probability = np.asarray(probability, dtype=float)
    return rng.random(probability.shape) < probability


def accuracy_ceiling(probability) -> float:
    """E[max(p, 1-p)]: the accuracy of a model that knows the true rewards; none can expect more on such labels."""
    probability = np.asarray(probability, dtype=float)
    return float(np.maximum(probability, 1.0 - probability).mean())


def expected_accuracy(difference, probability) -> float:
    """The accuracy to expect of a model on fresh labels, its ties worth one half: the labels' own luck averaged out.

    Args:
        difference: (N,) score of one answer less that of the other.
        probability: (N,) that the first is chosen.
    """
    difference, probability = np.asarray(difference, dtype=float), np.asarray(probability, dtype=float)
    return float((0.5 + np.sign(difference) * (probability - 0.5)).mean())


def label_entropy(probability) -> float:
    """Mean entropy of the labels in nats: the least population value of the Bradley-Terry loss."""
    probability = np.asarray(probability, dtype=float)
    return float((entr(probability) + entr(1.0 - probability)).mean())
