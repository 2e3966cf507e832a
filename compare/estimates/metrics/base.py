"""What the metrics share: columns of numbers, and their check."""

import inspect
import sys
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np


class NumbersMetric(evaluate.Metric, ABC):
    """A metric on columns of numbers; its description is its module's docstring.

    Abstract, so that ``evaluate.load`` takes the metric and not this.
    """

    columns: ClassVar[tuple[str, ...]]

    def _info(self) -> evaluate.MetricInfo:
        text = inspect.getdoc(sys.modules[type(self).__module__]) or ""
        features = datasets.Features({name: datasets.Value("float64") for name in self.columns})
        return evaluate.MetricInfo(description=text, citation="", inputs_description=text, features=features)

    @abstractmethod
    def _compute(self, **columns: Any) -> dict[str, float]: ...


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
