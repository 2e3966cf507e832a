"""What every mapping is told and how it says no."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.settings import nearest
from ppo_vs_dpo.preferences.schema import OPTIONAL_NUMBERS


class UnmappableError(Exception):
    """A row that cannot become a pair: a kind of problem (`reading.validation.PROBLEMS`) and the detail."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind, self.detail = kind, detail


class FilteredError(Exception):
    """A row that a filter leaves out; the message is the reason."""


# What a column of the source can be.
PARTS = ("prompt", "chosen", "rejected", "system", "input", "history", *OPTIONAL_NUMBERS)


@dataclass
class MappingOptions:
    """What a mapping may be told: keys of the ``data`` section (``configs/data/files.yaml``), and how to render.

    Attributes:
        columns: one of `PARTS` -> the source's name, e.g. ``{"chosen": "better_answer"}``; an empty name says that
            the source's column of that name is not to be read.
        render: writes a pair of messages out as text (`mappings.rendered`), with what stands beside their text.

    Raises:
        UserError: ``columns`` names something that a pair does not have.
    """

    columns: dict[str, str] = field(default_factory=dict)
    conversational: bool | None = None
    min_score_ratio: float = 0.0
    dimension: str = "helpful"
    drop_both_unsafe: bool = False
    drop_both_safe: bool = False
    render: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def __post_init__(self):
        for name in self.columns:
            if name not in PARTS:
                raise UserError(
                    f"data.columns.{name}: a pair has no {name}; it has {', '.join(PARTS)}."
                    f"{nearest(name, list(PARTS))}"
                )


Mapping = Callable[[dict[str, Any], MappingOptions], dict[str, Any]]


def value_of(row: dict[str, Any], name: str, kind: type | tuple[type, ...] = str) -> Any:
    """A field of a row.

    Raises:
        UnmappableError: it is missing or of another type.
    """
    if name not in row:
        raise UnmappableError("missing_field", f"no {name}; the row has {', '.join(map(str, row)) or 'nothing'}")
    value = row[name]
    if is_null(value):
        raise UnmappableError("missing_field", f"{name} is empty ({'null' if value is None else 'NaN'})")
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in _as_tuple(kind)):
        wanted = " or ".join(item.__name__ for item in _as_tuple(kind))
        raise UnmappableError("wrong_type", f"{name} is a {type(value).__name__}, it must be {wanted}")
    return value


def is_null(value: Any) -> bool:
    """Whether there is nothing: null, or NaN, which is how pandas writes it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def number_of(row: dict[str, Any], name: str) -> float:
    """A number of a row; CSV files hold it as text.

    Raises:
        UnmappableError: it is missing, null or NaN, or no number.
    """
    value = value_of(row, name, (int, float, str))
    try:
        number = float(value)
    except ValueError:
        raise UnmappableError("wrong_type", f"{name} is {value!r}, it must be a number") from None
    if math.isnan(number):
        raise UnmappableError("missing_field", f"{name} is empty (NaN)")
    return number


def choice_of(row: dict[str, Any], name: str) -> int:
    """Which of two: 0 or 1, also as text or as a float (pandas makes one of a column with gaps)."""
    number = number_of(row, name)
    if number not in (0, 1):
        raise UnmappableError("wrong_type", f"{name} is {row[name]}, it must be 0 or 1")
    return int(number)


def flag_of(row: dict[str, Any], name: str) -> bool:
    """Yes or no: a boolean, 0 or 1, or the text of either (``"False"`` and ``"0"`` are no)."""
    value = row.get(name)
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    return bool(choice_of(row, name))


def _as_tuple(kind: type | tuple[type, ...]) -> tuple[type, ...]:
    return kind if isinstance(kind, tuple) else (kind,)
