"""What users' reward and judge functions return, as scores; or one sentence that names the function and the sample.

Real functions return lists, arrays and tensors of any library, scalars of numpy and torch among plain numbers, and
coroutines. All of these are taken. Nothing else is guessed: no broadcasting, no column for a row, no ``None`` for 0.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from ppo_vs_dpo.artifacts.awaiting import wait_for
from ppo_vs_dpo.artifacts.errors import UserError, short


class ScoreError(UserError):
    """A score that cannot be used; carries the row of the sample, where there is one."""

    def __init__(self, message: str, row: int | None = None):
        super().__init__(message)
        self.row = row


def called(function: Callable[..., Any], /, **arguments: Any) -> Any:
    """What a function returns; a coroutine is awaited."""
    found = function(**arguments)
    return wait_for(found) if inspect.isawaitable(found) else found


def score_with(
    function: Callable[..., Any],
    name: str,
    prompts: Sequence,
    completions: Sequence,
    /,
    finite: bool = True,
    **columns: Any,
) -> list[float]:
    """Scores of ``N`` completions by a function ``f(prompts, completions, **columns)``.

    Raises:
        ScoreError: it raised, or returned what is no score; names the function and the sample.
    """
    try:
        found = called(function, prompts=list(prompts), completions=list(completions), **columns)
    except UserError:
        raise
    except Exception as error:
        raise ScoreError(f"{name} raised {type(error).__name__}: {error}.") from error
    return as_scores(name, found, prompts, completions, finite)


def as_scores(name: str, found: Any, prompts: Sequence, completions: Sequence, finite: bool = True) -> list[float]:
    """The scores of ``N`` completions as plain numbers.

    Raises:
        ScoreError: anything but ``N`` finite numbers; names the function and, where it is one sample's fault, that
            sample.
    """
    n = len(completions)
    if found is None:
        raise ScoreError(f"{name} returned None for {n} completions: is there a return at its end?")
    values = found
    if hasattr(found, "detach"):
        values = found.detach()
    if hasattr(values, "shape") and hasattr(values, "tolist"):  # numpy, torch, jax
        shape = tuple(values.shape)
        if shape != (n,):
            hint = " Take its one column: scores[:, 0]." if shape == (n, 1) else ""
            raise ScoreError(
                f"{name} returned an array of shape {shape} for {n} completions (samples 0 to {n - 1}); one number "
                f"each is needed, shape ({n},).{hint}"
            )
        values = values.tolist()
    elif hasattr(values, "to_list"):  # pandas, polars
        values = values.to_list()
    elif not isinstance(values, list | tuple):
        raise ScoreError(
            f"{name} returned {type(found).__name__} {short(found)} for {n} completions; a list with one number each "
            f"is needed."
        )
    if len(values) != n:
        raise ScoreError(
            f"{name} returned {len(values)} scores for {n} completions (samples 0 to {n - 1}); it must return one "
            f"each."
        )
    for row, value in enumerate(values):
        if not _is_number(value, finite):
            raise ScoreError(
                f"{name} returned {short(value)} for sample {row} (prompt {short(prompts[row])}, completion "
                f"{short(completions[row])}); it must be a finite number.{_hint(value)}",
                row,
            )
    return [float(value) for value in values]


def _is_number(value: Any, finite: bool) -> bool:
    """A number of Python, numpy or torch."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value)) or not finite
    except OverflowError:  # a whole number beyond the range of floats
        return False


def _hint(value: Any) -> str:
    if value is None:
        return " Return 0.0 where a function has nothing to say."
    return " Await it in the function (asyncio.gather)." if inspect.isawaitable(value) else ""


def sums_of_dense(name: str, found: Any, tokens: list[int]) -> tuple[Any, list[list[float]] | None]:
    """Dense rewards, one number a token, as scores (their sums), and themselves; a plain score has none.

    Raises:
        ScoreError: another number of them than there are tokens, or one that is not finite; names the sample.
    """
    if not isinstance(found, list | tuple) or not any(_is_row(one) for one in found):
        return found, None
    sums, dense = [], []
    for row, one in enumerate(found):
        if row >= len(tokens) or not _is_row(one):
            sums.append(one)
            dense.append([0.0] * tokens[row] if row < len(tokens) else [])
            continue
        values = one.tolist() if hasattr(one, "tolist") else list(one)
        if len(values) != tokens[row]:
            raise ScoreError(
                f"{name} returned {len(values)} rewards for sample {row}, whose response has {tokens[row]} tokens: "
                f"dense rewards are one a token of response_ids (or one number for the whole).",
                row,
            )
        wrong = next((n for n, value in enumerate(values) if not _is_finite(value)), None)
        if wrong is not None:
            raise ScoreError(
                f"{name} returned {values[wrong]!r} for token {wrong} of sample {row}; it must be a finite number.",
                row,
            )
        sums.append(float(sum(values)))
        dense.append(values)
    return sums, dense[: len(tokens)]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_row(value: Any) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1
