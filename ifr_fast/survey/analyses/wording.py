"""Formats numbers and names for statements."""

from __future__ import annotations

from collections.abc import Sequence


def head_name(layer: int, head: int) -> str:
    """Name of a head, as in the literature."""
    return f"L{layer}H{head}"


def number(x: float) -> str:
    """Formats a number with three significant digits."""
    return f"{x:.3g}"


def percent(x: float) -> str:
    """Formats a share in percent, with decimals for small ones."""
    return f"{x:.0%}" if x >= 0.0995 or x == 0 else f"{x:.1%}" if x >= 0.001 else f"{x:.2%}"


def listed(items: Sequence[str], most: int | None = None) -> str:
    """Joins items as in "one, two and three"; beyond `most`, a count replaces the rest."""
    shown = list(items)
    if most is not None and len(shown) > most:
        shown = [*shown[:most], f"{len(shown) - most} more"]
    if len(shown) < 2:
        return "".join(shown)
    return f"{', '.join(shown[:-1])} and {shown[-1]}"
