"""The style of the figures, and the plots that they consist of.

Figures are made without pyplot: they belong to no backend and to no global state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ...errors import needing
from .intervals import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT = "#1a1f26", "#56616d", "#dfe4e9"
ATTENTION, FFN, RESIDUAL, TINT, ALERT = "#2b5fd9", "#c2560a", "#8a95a1", "#14a394", "#c01f7a"
# Colours that are distinguishable with colour-vision deficiencies, in the order of use.
GROUPS = (
    *("#2b5fd9", "#c2560a", "#14a394", "#c01f7a", "#8a95a1", "#e0a100"),
    *("#6b3fa0", "#4d7c0f", "#7fb2ff", "#8b4a2b", "#ff8fb0", "#1a1f26"),
    *("#9fd8b4", "#c9b8ff"),
)
# Labels of axes with whole numbers.
_COUNTED = ("layer", "head", "offset", "heads, most frequent first", "heads, strongest first")
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "text.color": INK,
    "text.parse_math": False,  # labels are data: a dollar sign starts no formula
    "svg.hashsalt": "ifr_fast",  # equal figures give equal files
    "svg.fonttype": "path",
    "savefig.facecolor": "white",
}


@contextmanager
def styled() -> Iterator[None]:
    """Applies the style to figures made or saved inside. Raises IfrError without matplotlib."""
    with needing("the figures of a survey", "matplotlib", "pip install 'ifr-fast[report]'"):
        from matplotlib import rc_context
    with rc_context(cast(Any, STYLE)):
        yield


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """Gives an empty figure; width and height in inches."""
    with styled():
        from matplotlib.figure import Figure

        drawn = Figure(figsize=(width, height), facecolor="white", layout="constrained")
        yield drawn


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Sets the title and the axis labels of a panel; counts get whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for axis, name in ((axes.xaxis, x), (axes.yaxis, y)):
        if name in _COUNTED:
            axis.set_major_locator(MaxNLocator(integer=True))


def band(axes: Axes, interval: Interval, color: str, name: str, style: str = "-") -> None:
    """Draws a curve over layers with its interval."""
    x = np.arange(len(interval.value))
    axes.fill_between(x, interval.low, interval.high, color=color, alpha=0.18, linewidth=0)
    axes.plot(x, interval.value, style, color=color, label=name)


def heads(
    axes: Axes,
    values: NDArray[np.float64],
    *,
    title: str,
    colors: str = "Blues",
    limits: tuple[float, float] | None = None,
    marked: Sequence[tuple[int, int]] = (),
    bar: str | None = None,
) -> None:
    """Draws a map of values [L, H], layers upwards and heads across. NaN stays blank."""
    from matplotlib import colormaps

    low, high = limits if limits is not None else (0.0, float(np.nanmax(values, initial=0)) or 1.0)
    shades = colormaps[colors].with_extremes(bad="#eef1f4")
    image = axes.imshow(
        values, origin="lower", aspect="auto", cmap=shades, vmin=low, vmax=high,
        interpolation="nearest",
    )  # fmt: skip
    if marked:
        layer, head = np.array(marked).T
        for color, width in (("white", 2.2), (ALERT, 1.0)):  # visible on dark cells, too
            axes.scatter(
                head, layer, s=14, marker="s", facecolors="none", edgecolors=color, lw=width
            )
    label(axes, title, "head", "layer")
    parent = axes.get_figure()
    assert parent is not None
    colorbar = parent.colorbar(image, ax=axes, pad=0.02, aspect=30)
    colorbar.outline.set_visible(False)
    colorbar.ax.tick_params(length=2)
    if bar is not None:
        colorbar.set_label(bar)
