"""Numbers and names as the statements write them."""

from __future__ import annotations

from collections.abc import Sequence


def head_name(layer: int, head: int) -> str:
    """Layer and head, as the literature writes them."""
    return f"L{layer}H{head}"


def number(x: float) -> str:
    """Three significant digits."""
    return f"{x:.3g}"


def percent(x: float) -> str:
    """A share, in whole percents where that says enough."""
    return f"{x:.0%}" if x >= 0.0995 or x == 0 else f"{x:.1%}" if x >= 0.001 else f"{x:.2%}"


def listed(items: Sequence[str], most: int | None = None) -> str:
    """One, two and three; with `most`, the rest as a count."""
    shown = list(items)
    if most is not None and len(shown) > most:
        shown = [*shown[:most], f"{len(shown) - most} more"]
    if len(shown) < 2:
        return "".join(shown)
    return f"{', '.join(shown[:-1])} and {shown[-1]}"
