"""Launching a kernel whose parameters are fields of records."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from itertools import chain
from operator import itemgetter
from typing import Any

import triton

Records = tuple[tuple[Any, ...], ...]  # NamedTuples (records.py)

# A measurement may set this: each launch runs within around(the kernel's name).
around: Callable[[str], AbstractContextManager[object]] | None = None


def launch(kernel: Any, grid: tuple[int, ...], records: Records, **tiles: Any) -> None:
    """Runs a kernel; each parameter takes its value from `tiles`, or from a field of `records`.

    Names decide: the parameter p_x takes the field x, every other parameter the field of its own
    name. Tiles that are no parameter (num_warps, num_stages) are options of the launch.
    """
    if 0 in grid:
        return
    pick, names = _plan(kernel.fn, tuple(map(type, records)), tuple(tiles))
    values = pick((*chain.from_iterable(records), *tiles.values()))
    options = {name: tiles[name] for name in names}
    if around is None:
        kernel[grid](*values, **options)
    else:
        with around(kernel.fn.__name__):
            kernel[grid](*values, **options)


@cache
def _plan(
    kernel: Callable[..., Any], types: tuple[Any, ...], tiles: tuple[str, ...]
) -> tuple[Callable[[tuple[Any, ...]], tuple[Any, ...]], tuple[str, ...]]:
    """A function that picks a kernel's arguments from the values of records and tiles, laid end to
    end, and the tiles that are options.
    """
    places = {name: i for i, name in enumerate((*chain(*(x._fields for x in types)), *tiles))}
    names = list(inspect.signature(kernel).parameters)
    pick = itemgetter(*(places[name.removeprefix("p_")] for name in names))
    return pick, tuple(name for name in tiles if name not in names)


def blocks(n: int, block: int) -> int:
    """The number of blocks that cover n."""
    return -(-n // block)


def tile(n: int) -> int:
    """The power of two that covers n, at least what a matrix unit takes."""
    return max(16, int(triton.next_power_of_2(n)))
