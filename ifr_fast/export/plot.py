"""A RouteGraph as a matplotlib figure: tokens along the bottom, layers upwards.

A layer has the nodes `mid` and `post`. Attention is a curve into mid (in a parallel block, into
post), the FFN a loop to the right of its column, self-attention a loop to the left. Width and
opacity grow with the weight of an edge. The figure is made without pyplot, so that it belongs to no
backend and to no global state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..characters import Piece
from ..errors import needing
from ..graph.tables import EdgeKind, NodeKind
from .labels import Column, columns, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..graph.data import GraphData

_MID = 0.6  # height of mid within its layer
_GAP = 0.5  # width of a gap, in columns
_LABEL = 22  # most characters of a token
_CHARACTER, _ABOVE = 0.085, 0.95  # inches: width of a character, room above the layers
_WIDEST = 1.0  # inches: widest column
_INK, _MUTED, _FAINT, _BAND, _CHIP = "#1a1f26", "#56616d", "#dfe4e9", "#f6f8fa", "#eef1f4"
_COLOR = {"residual": "#8a95a1", "attention": "#2b5fd9", "FFN": "#c2560a"}
_TINT, _ALERT = "#14a394", "#c01f7a"
# Fonts that are used if installed, besides DejaVu Sans, which comes with matplotlib.
_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "PingFang SC", "Hiragino Sans", "Microsoft YaHei"),
    *("Malgun Gothic", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji", "Arial Unicode MS"),
)


class _Line(NamedTuple):
    """An edge as a cubic curve."""

    looks: str  # a key of _COLOR
    weight: float
    points: list[tuple[float, float]]


class _Place(NamedTuple):
    """Coordinates, in units of columns and layers."""

    columns: list[Column]
    x: dict[int, float]  # by token position
    width: float
    parallel: list[bool]

    def pre(self, layer: int, position: int) -> tuple[float, float]:
        return self.x[position], layer

    def mid(self, layer: int, position: int) -> tuple[float, float]:
        return self.x[position], layer + _MID


def check_plot() -> None:
    """Raises IfrError if `plot` cannot run."""
    with needing("plot", "matplotlib", "pip install 'ifr-fast[plot]'"):
        import matplotlib.figure  # noqa: F401


def plot(graph: GraphData) -> Figure:
    """The figure; `savefig` writes it. Its size grows with the tokens reached and the layers."""
    check_plot()
    from matplotlib.figure import Figure

    place = _place(graph)
    labels = _Labels()
    texts = {c.first: labels.of(graph.tokens[c.first]) for c in place.columns if not c.gap}
    column = 0.62 if place.width <= 24 else 0.3  # inches
    upright = {position for position, text in texts.items() if len(text) * _CHARACTER > column}
    longest = max((len(texts[position]) for position in upright), default=0)
    below = 0.35 + max(0.15, longest * _CHARACTER)
    across = max(6.0, place.width * column + 1.0)
    up = max(2.0, graph.n_layers * 0.26)
    outcomes = _outcomes(graph, labels)
    above = _ABOVE
    if graph.span is not None:  # each column has an upright label
        above += max((len(text) for text in outcomes.values()), default=0) * _CHARACTER
    height = up + below + above
    figure = Figure(figsize=(across, height), facecolor="white")
    axes = figure.add_axes((0.6 / across, below / height, 1 - 0.85 / across, up / height))
    # A short text gets margins, since its loops would be as wide as the page.
    beside = max(0.0, (across - 0.85) / _WIDEST - (place.width + 0.4)) / 2
    axes.set_xlim(-0.7 - beside, place.width - 0.3 + beside)
    axes.set_ylim(-0.15, graph.n_layers + 0.35)

    _draw_frame(axes, graph, place)
    _draw_edges(axes, _lines(graph, place))
    _draw_nodes(axes, graph, place)
    _draw_tokens(axes, graph, place, texts, labels, upright)
    _draw_outcome(axes, graph, place, outcomes, labels.families)
    _draw_heading(figure, graph, height)
    return figure


def _place(graph: GraphData) -> _Place:
    found = columns(graph)
    x, edge = {}, 0.0
    for column in found:
        if not column.gap:
            x[column.first] = edge
        edge += _GAP if column.gap else 1.0
    return _Place(found, x, edge, graph.parallel.tolist())


def _lines(graph: GraphData, place: _Place) -> list[_Line]:
    lines, read = [], graph.source_layers
    table = zip(*(column.tolist() for column in graph.edges), strict=True)
    for layer, kind, target, source, weight in table:
        parallel = place.parallel[layer]
        into_post = parallel or kind in (EdgeKind.FFN, EdgeKind.RESIDUAL_POST)
        pre = read[layer] if kind == EdgeKind.ATTENTION else layer
        start = place.mid(layer, source) if into_post and not parallel else place.pre(pre, source)
        end = place.pre(layer + 1, target) if into_post else place.mid(layer, target)
        (x0, y0), (x1, y1) = start, end
        if kind in (EdgeKind.RESIDUAL_MID, EdgeKind.RESIDUAL_POST):
            lines.append(_Line("residual", weight, [start, start, end, end]))
        elif source != target:
            lines.append(_Line("attention", weight, [start, (x0, y1), (x1, y0), end]))
        else:
            bow = 0.36 if kind == EdgeKind.FFN else -0.36
            looks = "FFN" if kind == EdgeKind.FFN else "attention"
            lines.append(_Line(looks, weight, [start, (x0 + bow, y0), (x1 + bow, y1), end]))
    return lines


def _draw_frame(axes: Axes, graph: GraphData, place: _Place) -> None:
    for layer in range(0, graph.n_layers, 2):
        axes.axhspan(layer, layer + 1, color=_BAND, zorder=0, linewidth=0)
    for x in place.x.values():
        axes.plot([x, x], [0, graph.n_layers], color=_FAINT, linewidth=0.6, zorder=0.5)
    axes.set_xticks([])
    every = 1 if graph.n_layers <= 40 else 5
    layers = range(0, graph.n_layers, every)
    axes.set_yticks([layer + 0.5 for layer in layers], [str(layer) for layer in layers])
    axes.tick_params(length=0, labelsize=7, labelcolor=_MUTED)
    axes.set_ylabel("layer", fontsize=8, color=_MUTED)
    for side in axes.spines.values():
        side.set_visible(False)


def _draw_edges(axes: Axes, lines: list[_Line]) -> None:
    from matplotlib.collections import PathCollection
    from matplotlib.colors import to_rgba
    from matplotlib.path import Path

    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    for zorder, (looks, color) in enumerate(_COLOR.items(), start=1):
        mine = sorted((line for line in lines if line.looks == looks), key=lambda line: line.weight)
        collection = PathCollection(
            [Path(line.points, codes) for line in mine],
            facecolors="none",
            edgecolors=[to_rgba(color, 0.25 + 0.75 * line.weight**0.5) for line in mine],
            linewidths=[_thickness(line) for line in mine],
            zorder=zorder,
        )
        axes.add_collection(collection, autolim=False)


def _thickness(line: _Line) -> float:
    """Width in points: residual weights are mostly near 1, and FFN loops need thin lines."""
    if line.looks == "residual":
        return 0.4 + 1.8 * line.weight
    if line.looks == "FFN":
        return 0.5 + 2.0 * line.weight
    return min(6.0, 0.6 + 7.0 * line.weight)


def _draw_nodes(axes: Axes, graph: GraphData, place: _Place) -> None:
    marks = {place.pre(graph.n_layers, position) for position in graph.starts}
    for layer, kind, target, source, _ in zip(*(c.tolist() for c in graph.edges), strict=True):
        into_post = place.parallel[layer] or kind in (EdgeKind.FFN, EdgeKind.RESIDUAL_POST)
        marks.add(place.pre(layer + 1, target) if into_post else place.mid(layer, target))
        if place.parallel[layer] or not into_post:
            pre = graph.source_layers[layer] if kind == EdgeKind.ATTENTION else layer
            marks.add(place.pre(pre, source))
    xs, ys = zip(*sorted(marks), strict=True)
    axes.scatter(xs, ys, s=1.6, color=_INK, linewidths=0, zorder=5)
    flagged = [
        place.pre(n.layer + 1, n.position)
        if n.kind == NodeKind.POST
        else place.mid(n.layer, n.position)
        for n in graph.unattributed
    ]
    if flagged:
        xs, ys = zip(*flagged, strict=True)
        axes.scatter(xs, ys, s=26, facecolors="none", edgecolors=_ALERT, zorder=6)


def _draw_tokens(
    axes: Axes,
    graph: GraphData,
    place: _Place,
    texts: dict[int, str],
    labels: _Labels,
    upright: set[int],
) -> None:
    from matplotlib.colors import to_rgb

    importance = graph.token_importance().tolist()
    most = max(importance) or 1.0
    reached = {*graph.edges.source.tolist(), *graph.edges.target.tolist(), *graph.starts}
    for column in place.columns:
        if column.gap:
            continue
        position = column.first
        share = 0.62 * (importance[position] / most) ** 0.5
        tint = [a + share * (b - a) for a, b in zip(to_rgb(_CHIP), to_rgb(_TINT), strict=True)]
        axes.annotate(
            texts[position],
            (place.x[position], 0),
            xytext=(0, -8),
            textcoords="offset points",
            rotation=90 if position in upright else 0,
            ha="center",
            va="top",
            fontsize=8,
            family=labels.families,
            color=_INK if position in reached else _MUTED,
            parse_math=False,
            annotation_clip=False,
            bbox={
                "boxstyle": "round,pad=0.25",
                "facecolor": tuple(tint) if position in reached else "none",
                "edgecolor": "none",
            },
        )
    edge = 0.0
    for column in place.columns:
        if column.gap:
            x = edge - 0.5 + _GAP / 2
            axes.plot([x, x], [0, graph.n_layers], color=_FAINT, linestyle=":", linewidth=0.9)
            axes.annotate(
                "…",
                (x, 0),
                xytext=(0, -8),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=8,
                color=_MUTED,
                annotation_clip=False,
            )
        edge += _GAP if column.gap else 1.0


def _outcomes(graph: GraphData, labels: _Labels) -> dict[int, str]:
    """Predicted token after each explained position; a single one also has its probability."""
    if graph.span is not None:
        each = zip(graph.span.positions, graph.span.predictions, strict=True)
        return {position: labels.of(of[0].token) for position, of in each if of}
    if not graph.predictions:
        return {}
    best = graph.predictions[0]
    return {graph.position: f"{labels.of(best.token)}  {best.probability:.0%}"}


def _draw_outcome(
    axes: Axes, graph: GraphData, place: _Place, outcomes: dict[int, str], families: list[str]
) -> None:
    alone = graph.span is None
    for position in graph.starts:
        x, y = place.pre(graph.n_layers, position)
        axes.plot([x, x], [y, y + 0.35], color=_INK, linewidth=1.4, clip_on=False)
        if position not in outcomes:
            continue
        on_right = x > place.width / 2
        axes.annotate(
            outcomes[position],
            (x, y + 0.35),
            xytext=((14 if on_right else -14) if alone else 0, 3),
            textcoords="offset points",
            annotation_clip=False,
            va="bottom",
            ha=("right" if on_right else "left") if alone else "center",
            rotation=0 if alone else 90,
            fontsize=10 if alone else 8,
            fontweight="bold",
            family=families,
            color="white",
            parse_math=False,
            bbox={"boxstyle": "round,pad=0.3", "facecolor": _INK, "edgecolor": "none"},
        )


def _draw_heading(figure: Figure, graph: GraphData, height: float) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, linewidth=2, label=looks) for looks, color in _COLOR.items()
    ]
    handles.append(
        Line2D([], [], color=_TINT, marker="s", linestyle="", alpha=0.6, label="token importance")
    )
    if graph.unattributed:
        handles.append(
            Line2D([], [], color=_ALERT, marker="o", ls="", fillstyle="none", label="unattributed")
        )
    T = len(graph.tokens)
    edges = "by head" if graph.granularity == "head" else "summed over heads"
    figure.text(
        0.008,
        1 - 0.12 / height,
        f"{T} token{'s'[: T != 1]}, {graph.n_layers} layers, {len(graph.edges.layer)} edges "
        f"above {graph.threshold:g} ({edges})",
        va="top",
        fontsize=8,
        color=_INK,
    )
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.26 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=7.5,
        labelcolor=_MUTED,
        handlelength=1.4,
        columnspacing=1.4,
    )


class _Labels:
    """Token text in the installed fonts. A box replaces a missing character, and its code point one
    that a piece belongs to.
    """

    def __init__(self) -> None:
        from matplotlib import font_manager

        installed = {font.name for font in font_manager.fontManager.ttflist}
        self.families = ["DejaVu Sans", *(name for name in _FONTS if name in installed)]
        self._fonts = [font_manager.get_font(font_manager.findfont(name)) for name in self.families]

    def of(self, token: str) -> str:
        text = visible(token)
        if len(text) > _LABEL:
            text = text[: _LABEL - 1] + "…"
        is_piece = Piece.read(token) is not None

        def without(char: str) -> str:
            return f"‹{ord(char):04X}›" if is_piece else "□"

        return "".join(char if self._has(char) else without(char) for char in text)

    def _has(self, char: str) -> bool:
        return any(font.get_char_index(ord(char)) for font in self._fonts)
