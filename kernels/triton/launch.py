"""Launching a kernel by the names of its arguments."""

from __future__ import annotations

from typing import Any

import triton

Names = dict[str, Any]  # a kernel's parameters, by name


def launch(kernel: Any, grid: tuple[int, ...], values: Names, **tiles: Any) -> None:
    """Runs a kernel whose parameters are found by name: among `tiles`, else among `values`.

    Of `tiles`, what is no parameter (num_warps, num_stages) is an option of the launch.
    """
    if 0 in grid:
        return
    arguments = {name: tiles.pop(name) if name in tiles else values[name] for name in kernel.arg_names}
    kernel[grid](**arguments, **tiles)


def blocks(n: int, block: int) -> int:
    """How many blocks cover n."""
    return triton.cdiv(n, block)


def tile(n: int) -> int:
    """The power of two that covers n, at least what a matrix unit takes."""
    return max(16, triton.next_power_of_2(n))
