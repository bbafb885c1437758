"""Checks of the arguments that several public functions take."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import SupportsIndex, TypeAlias

import numpy as np
from torch import Tensor

# One position, negative from the end, or several.
Position: TypeAlias = "SupportsIndex | slice | Iterable[SupportsIndex]"


def check_options(threshold: float, granularity: str) -> float:
    """The threshold as a float. Raises ValueError where one of the two is invalid."""
    if granularity not in ("token", "head"):
        raise ValueError(f"granularity: expected 'token' or 'head', got {granularity!r}")
    return check_threshold(threshold)


def spanned(
    position: Position, weights: Sequence[float] | Tensor | None, n_tokens: int
) -> dict[int, float]:
    """The positions that `position` names in a text of `n_tokens`, ascending, and their weights,
    which sum to 1. Raises ValueError where there is none, or the weights are invalid.
    """
    if isinstance(position, slice):
        chosen = list(range(n_tokens)[position])
    elif isinstance(position, Iterable) and not (
        isinstance(position, Tensor | np.ndarray) and position.ndim == 0
    ):
        chosen = [index_within("position", i, n_tokens) for i in position]
    else:
        chosen = [index_within("position", position, n_tokens)]
    if not chosen:
        raise ValueError(f"position: {position!r} names none of {n_tokens} tokens")
    given = [1.0] * len(chosen) if weights is None else [float(w) for w in weights]
    if len(given) != len(chosen):
        raise ValueError(
            f"position_weights: expected one for each of {len(chosen)} positions, got {len(given)}"
        )
    total = math.fsum(given)
    if min(given) < 0 or not 0 < total < math.inf:
        raise ValueError("position_weights: expected numbers of at least 0, and not all of them 0")
    starts = dict.fromkeys(sorted(chosen), 0.0)
    for i, weight in zip(chosen, given, strict=True):
        starts[i] += weight / total
    return starts


def indices(name: str, given: Iterable[int] | Tensor | None, n: int) -> list[int]:
    """The indices `given`, ascending, or all of n where it is None. Raises ValueError where there
    are none, or one is out of range.
    """
    if given is None:
        return list(range(n))
    if not isinstance(given, Iterable):
        raise ValueError(f"{name}: expected indices, several, got {given!r}")
    several = given.tolist() if isinstance(given, Tensor) else given
    chosen = sorted({index_within(name, i, n) for i in several})
    if not chosen:
        raise ValueError(f"{name}: is empty; expected at least one index")
    return chosen


def index_within(name: str, i: SupportsIndex, n: int) -> int:
    """An index from 0 to n - 1; negative ones count from the end. Raises ValueError for others."""
    try:
        index = as_index(name, i)
    except ValueError:
        raise ValueError(f"{name}: expected an int from {-n} to {n - 1}, got {i!r}") from None
    if not -n <= index < n:
        raise ValueError(f"{name}: expected {-n} to {n - 1}, got {index}")
    return index % n


def check_threshold(threshold: float) -> float:
    """The threshold as a float. Raises ValueError unless it is a number from 0 to 1."""
    number = isinstance(threshold, Real) and not isinstance(threshold, bool)
    if not number or not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number from 0 to 1, got {threshold!r}")
    return float(threshold)


def as_index(name: str, value: SupportsIndex) -> int:
    """An int from any integer, numpy's and torch's too. Raises ValueError for anything else."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected an int, got {value!r}") from None


def check_count(name: str, value: SupportsIndex) -> int:
    """A count as an int. Raises ValueError unless it is at least 1."""
    count = as_index(name, value)
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {count}")
    return count
