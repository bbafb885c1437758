"""Checks of the arguments that several public functions take."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from numbers import Real
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

# One position, negative from the end, or several.
Position: TypeAlias = "SupportsIndex | slice | Iterable[SupportsIndex]"
Kind = TypeVar("Kind")
# No count is larger: it would not fit into the integers that the libraries below count with.
MOST = (1 << 31) - 1
MOST_SEED = (1 << 64) - 1  # of torch's generators


def check_options(threshold: float, granularity: str) -> float:
    """The threshold as a float. Raises ValueError where one of the two is invalid."""
    check_choice("granularity", granularity, ("token", "head"))
    return check_fraction("threshold", threshold)


def spanned(
    position: Position, weights: Sequence[float] | Tensor | None, n_tokens: int
) -> dict[int, float]:
    """The positions that `position` names in a text of `n_tokens`, ascending, and their weights,
    which sum to 1. Raises ValueError where there is none, or the weights are invalid.
    """
    if isinstance(position, slice):
        try:
            chosen = list(range(n_tokens)[position])
        except (TypeError, ValueError):
            raise ValueError(f"position: expected a slice of ints, got {shown(position)}") from None
    elif isinstance(position, Iterable) and not _is_scalar(position):
        several = listed("position", position, "an int, a slice or a sequence of ints")
        chosen = [index_within("position", i, n_tokens) for i in several]
    else:
        chosen = [index_within("position", cast(SupportsIndex, position), n_tokens)]
    if not chosen:
        raise ValueError(f"position: {shown(position)} names none of {n_tokens} tokens")
    given = [1.0] * len(chosen) if weights is None else check_weights(weights, len(chosen))
    starts = dict.fromkeys(sorted(chosen), 0.0)
    total = math.fsum(given)
    for i, weight in zip(chosen, given, strict=True):
        starts[i] += weight / total
    return starts


def check_weights(weights: Sequence[float] | Tensor, n: int) -> list[float]:
    """The weights of n positions as floats. Raises ValueError unless there is a number of at least
    0 for each, and their sum is neither 0 nor too large for a float.
    """
    expected = "position_weights: expected numbers of at least 0, and not all of them 0"
    several = listed("position_weights", weights)
    if len(several) != n:
        raise ValueError(
            f"position_weights: expected one for each of {n} positions, got {len(several)}"
        )
    given = [check_number("position_weights", w, "numbers of at least 0", low=0) for w in several]
    if not 0 < sum(given) < math.inf:
        raise ValueError(f"{expected}, got {shown(several)}")
    return given


def indices(name: str, given: Iterable[int] | Tensor | None, n: int) -> list[int]:
    """The indices `given`, ascending, or all of n where it is None. Raises ValueError where there
    are none, or one is out of range.
    """
    if given is None:
        return list(range(n))
    several = listed(name, given)
    chosen = sorted({index_within(name, i, n) for i in several})
    if not chosen:
        raise ValueError(f"{name}: is empty; expected at least one index")
    return chosen


def index_within(name: str, i: SupportsIndex, n: int) -> int:
    """An index from 0 to n - 1; negative ones count from the end. Raises ValueError for others."""
    try:
        index = as_index(name, i)
    except ValueError:
        raise ValueError(f"{name}: expected an int from {-n} to {n - 1}, got {shown(i)}") from None
    if not -n <= index < n:
        raise ValueError(f"{name}: expected {-n} to {n - 1}, got {shown(index)}")
    return index % n


def listed(name: str, given: Iterable[Any], expected: str = "a sequence") -> list[Any]:
    """The elements of a sequence in its order. Raises ValueError for what has no order, and for a
    tensor of another shape than [n], or without elements in memory.
    """
    unordered = isinstance(given, Set | Mapping) or not isinstance(given, Iterable)
    if unordered or _is_scalar(given) or _holds_nothing(given):
        raise ValueError(f"{name}: expected {expected}, got {shown(given)}")
    if isinstance(given, Tensor):
        if given.ndim != 1:
            raise ValueError(f"{name}: expected one dimension, got {shown(given)}")
        return given.tolist()
    return list(given)


def as_index(name: str, value: SupportsIndex) -> int:
    """An int from any integer, numpy's and torch's too. Raises ValueError for anything else."""
    try:
        if isinstance(value, bool | np.bool_) or _holds_nothing(value):
            raise TypeError
        if isinstance(value, Tensor) and value.dtype == torch.bool:
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected an int, got {shown(value)}") from None


def check_count(name: str, value: SupportsIndex, least: int = 1, most: int = MOST) -> int:
    """A count as an int. Raises ValueError unless it is from `least` to `most`."""
    count = as_index(name, value)
    if count < least:
        raise ValueError(f"{name}: expected at least {least}, got {shown(count)}")
    if count > most:
        raise ValueError(f"{name}: expected at most {most}, got {shown(count)}")
    return count


def check_number(
    name: str,
    value: float,
    expected: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
) -> float:
    """A finite number from `low` to `high`, and above `above`, as a float. Raises ValueError for
    any other, and for a string or a bool; `expected` says in words what would be right.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not (low <= value <= high and value > above):
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    try:
        given = float(value)
    except OverflowError:
        given = math.inf
    if not math.isfinite(given):
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    return given


def check_fraction(name: str, value: float) -> float:
    """A number as a float. Raises ValueError unless it is from 0 to 1."""
    return check_number(name, value, "a number from 0 to 1", low=0, high=1)


def check_seed(name: str, value: SupportsIndex, most: int = MOST_SEED) -> int:
    """A random seed as an int. Raises ValueError unless it is from 0 to `most`."""
    seed = as_index(name, value)
    if not 0 <= seed <= most:
        raise ValueError(f"{name}: expected 0 to {most}, got {shown(seed)}")
    return seed


def check_flag(name: str, value: bool) -> bool:
    """A bool. Raises ValueError for anything else, numbers and strings included."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: expected True or False, got {shown(value)}")
    return bool(value)


def check_instance(name: str, value: Kind, *kinds: type[Kind]) -> Kind:
    """An object of one of some classes. Raises ValueError for any other."""
    if not isinstance(value, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{name}: expected a {names}, got {shown(value)}")
    return value


def check_choice(name: str, value: str, choices: Collection[str]) -> str:
    """One of several strings. Raises ValueError for anything else."""
    if not isinstance(value, str) or value not in choices:
        names = [str(choice) for choice in choices]
        two = " or ".join(map(repr, names))
        expected = two if len(names) == 2 else f"one of {', '.join(names)}"
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    return value


def check_unicode(name: str, text: str) -> str:
    """A string of characters. Raises ValueError for anything else, and for halves of characters
    (surrogates): tokenizers refuse them or change them.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected a string, got {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: character {error.start} is {text[error.start]!r}, half of a character or a "
            "byte that is not UTF-8; expected Unicode text"
        ) from None
    return text


def check_path(name: str, path: str | os.PathLike[str]) -> Path:
    """A path. Raises ValueError for what no file can be called, and for names that are not UTF-8:
    the readers and writers of tensors refuse them.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ValueError(f"{name}: expected a path, got {shown(path)}")
    given = os.fspath(path)
    if not given or "\0" in check_unicode(name, given):
        raise ValueError(f"{name}: expected a path, got {shown(given)}")
    return Path(given)


def _is_scalar(x: Any) -> bool:
    return isinstance(x, str | bytes) or (isinstance(x, Tensor | np.ndarray) and x.ndim == 0)


def holds_integers(x: Tensor) -> bool:
    """True for a tensor of integers in memory, neither sparse nor on the meta device."""
    numbers = x.is_floating_point() or x.is_complex() or x.is_quantized or x.dtype == torch.bool
    return not numbers and not _holds_nothing(x)


def _holds_nothing(x: Any) -> bool:
    """True for a tensor whose elements cannot be read one by one."""
    return isinstance(x, Tensor) and (x.is_meta or x.layout != torch.strided)


def shown(x: object) -> str:
    """An argument, as a message shows it."""
    if isinstance(x, Tensor):
        kind = str(x.dtype).removeprefix("torch.")
        layout = "" if x.layout == torch.strided else f", {x.layout}"
        return f"a tensor of shape {list(x.shape)}, {kind}{layout}, on {x.device}"
    try:
        text = repr(x)
    except ValueError:  # an int of thousands of digits
        return f"a {type(x).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}…"
