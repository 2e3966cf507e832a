"""Inputs of metrics."""

import numpy as np


def checked(values, name: str) -> np.ndarray:
    """``(N,)`` numbers in [0, 1].

    Raises:
        ValueError: none, or one that is not in [0, 1]; names its place.
    """
    values = np.asarray(values, dtype=np.float64)
    wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if not len(values) or len(wrong):
        raise ValueError(
            f"{name}: " + (f"entry {wrong[0]} is {values[wrong[0]]}" if len(wrong) else "none") + "; [0, 1]"
        )
    return values
