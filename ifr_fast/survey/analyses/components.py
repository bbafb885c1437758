"""(a) Importance of attention, heads and FFN blocks; (b) frequency of heads in graphs."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..schema import Survey
from . import plots
from .finding import Finding
from .intervals import Floats, bootstrap, ratio
from .units import Part, units_of
from .wording import head_name, listed, number, percent

_SHARES = ("residual_mid", "residual_post")


def importance(
    survey: Survey, corpora: Collection[str] | None = None, *, seed: int = 0, resamples: int = 1000
) -> Finding:
    """Mean importance of every FFN block and attention head, with 95% intervals.

    Each row of the table is a layer's attention, its FFN, or one head.
    """
    units = units_of(survey, corpora, seed=seed)
    L, H = survey.n_layers, survey.n_heads

    def values(part: Part) -> dict[str, NDArray[np.float32]]:
        written = {f"{name}_written": 1 - part[name] for name in _SHARES}
        return {
            "n": np.ones(len(part["document"]), np.float32),
            "head": part["head_importance"],
            "attention": part["head_importance"].sum(-1, dtype=np.float64),
            "ffn": part["ffn_importance"],
            **written,
        }

    sums = units.sum(survey.predictions, ["head_importance", "ffn_importance", *_SHARES], values)
    n = sums["n"]
    of = {
        name: bootstrap(sums[name], n, seed=seed, resamples=resamples)
        for name in ("attention", "ffn", "head", *(f"{name}_written" for name in _SHARES))
    }
    attention, ffn, head = of["attention"], of["ffn"], of["head"]
    parallel = np.isnan(of["residual_mid_written"].value).any()

    layer: list[int] = []
    what: list[str] = []
    which: list[int | None] = []
    columns = []
    for name, kind in (("attention", "attention"), ("ffn", "FFN")):
        layer += list(range(L))
        what += [kind] * L
        which += [None] * L
        columns.append(np.stack([of[name].value, of[name].low, of[name].high]))
    layer += [i for i in range(L) for _ in range(H)]
    what += ["head"] * (L * H)
    which += list(range(H)) * L
    columns.append(np.stack([x.reshape(-1) for x in head]))
    value, low, high = np.concatenate(columns, axis=1)
    table = pa.table(
        {
            "component": what,
            "layer": pa.array(layer, pa.int16()),
            "head": pa.array(which, pa.int16()),
            "importance": value,
            "low": low,
            "high": high,
        }
    )

    with plots.figure(7.2, 5.6) as figure:
        top, bottom = figure.subplots(2, 2)
        plots.band(top[0], attention, plots.ATTENTION, "attention, all heads")
        plots.band(top[0], ffn, plots.FFN, "FFN")
        plots.label(
            top[0], "a  In the graphs of predictions", "layer", "importance (flow-weighted)"
        )
        top[0].legend()
        if parallel:
            both = of["residual_post_written"]
            plots.band(top[1], both, plots.INK, "attention and FFN together")
        else:
            plots.band(top[1], of["residual_mid_written"], plots.ATTENTION, "attention")
            plots.band(top[1], of["residual_post_written"], plots.FFN, "FFN")
        plots.label(top[1], "b  At the token itself", "layer", "share of the block in its sum")
        top[1].set_ylim(0, 1)
        top[1].legend()
        plots.heads(bottom[0], head.value, title="c  Every head", bar="importance")
        order = np.sort(head.value.reshape(-1))[::-1]
        share = order.cumsum() / (order.sum() or 1)
        bottom[1].plot(np.arange(1, L * H + 1), share, color=plots.ATTENTION)
        bottom[1].plot([1, L * H], [1 / (L * H), 1], ":", color=plots.MUTED, label="uniform")
        plots.label(bottom[1], "d  Concentration", "heads, strongest first", "share of importance")
        bottom[1].set_ylim(0, 1.02)
        bottom[1].legend(loc="lower right")

    best = np.argsort(-head.value.reshape(-1), kind="stable")[:5]
    some = max(1, round(0.1 * L * H))
    total_attention, total_ffn = attention.value.sum(), ffn.value.sum()
    whole = total_attention + total_ffn or 1.0
    statement = (
        f"Attention carries {percent(total_attention / whole)} of the flow through blocks in these "
        f"graphs, and FFN blocks {percent(total_ffn / whole)}. "
        f"Attention is most important in layer {_top(attention.value)}; FFN blocks are most "
        f"important in {listed([f'layer {i}' for i in _leading(ffn.value, 3)])}. "
        f"{_thirds(ffn.value, 'FFN blocks')} {_thirds(attention.value, 'Attention')}\n"
        f"The {some} strongest of {L * H} heads carry {percent(float(share[some - 1]))} of all "
        "heads' importance; the strongest are "
        + listed([
            f"{head_name(int(i) // H, int(i) % H)} ({number(head.value.reshape(-1)[i])})"
            for i in best
        ])
        + "."
    )  # fmt: skip
    return Finding(
        "importance",
        "Importance of blocks and heads",
        statement,
        f"Means over {int(n.sum()):,} predictions of {len(units.documents):,} documents. The "
        "importance of a component in a prediction's graph is the weight of its edges times the "
        "weight of all paths from the prediction to their targets, at threshold "
        f"{survey.thresholds[0]:g}; edges below the threshold are missing in the lower layers. "
        "Panel b does not depend on graphs: it shows a block's own share in its sum, at every "
        "token. Bands and columns low, high: 95% bootstrap intervals over documents.",
        table,
        table.take(np.argsort(-value, kind="stable")[:15]),
        figure,
    )


def frequency(
    survey: Survey, corpora: Collection[str] | None = None, *, seed: int = 0, resamples: int = 1000
) -> Finding:
    """Frequency of each head in the graphs of predictions, by threshold, with 95% intervals."""
    units = units_of(survey, corpora, seed=seed)
    L, H, thresholds = survey.n_layers, survey.n_heads, survey.thresholds
    names = [f"head_in_{k}" for k in range(len(thresholds))]
    depths = [f"route_depth_{k}" for k in range(len(thresholds))]

    def values(part: Part) -> dict[str, NDArray[np.float32]]:
        return {
            "n": np.ones(len(part["document"]), np.float32),
            **{name: part[name] for name in names},
            **{name: np.where(part[name] < L, part[name], 0) for name in depths},
            **{f"moved_{name}": part[name] < L for name in depths},
            **{f"count_{name}": part[name].sum((1, 2)) for name in names},
        }

    sums = units.sum(survey.predictions, [*names, *depths], values)
    of = [bootstrap(sums[name], sums["n"], seed=seed, resamples=resamples) for name in names]
    n = sums["n"].sum()
    count = [float(sums[f"count_{name}"].sum() / n) for name in names]
    depth = [float(ratio(sums[name], sums[f"moved_{name}"])) for name in depths]

    table = pa.table(
        {
            "layer": pa.array([i for i in range(L) for _ in range(H)], pa.int16()),
            "head": pa.array(list(range(H)) * L, pa.int16()),
        }
        | {
            f"{column}_{threshold:g}": np.asarray(x).reshape(-1)
            for threshold, interval in zip(thresholds, of, strict=True)
            for column, x in zip(("frequency", "low", "high"), interval, strict=True)
        }
    )

    with plots.figure(7.2, 5.6) as figure:
        panels = figure.subplots(2, 2).reshape(-1)
        lowest, highest = of[0].value, of[-1].value
        plots.heads(
            panels[0], lowest, title=f"a  At {thresholds[0]:g}", limits=(0, 1), bar="frequency"
        )
        plots.heads(
            panels[1], highest, title=f"b  At {thresholds[-1]:g}", limits=(0, 1), bar="frequency"
        )
        shades = np.linspace(0.35, 1, len(thresholds))[::-1]
        for interval, threshold, shade in zip(of, thresholds, shades, strict=True):
            ordered = np.sort(interval.value.reshape(-1))[::-1]
            panels[2].plot(ordered, color=plots.ATTENTION, alpha=shade, label=f"{threshold:g}")
            mean = interval.value.sum(1)
            panels[3].plot(mean, color=plots.ATTENTION, alpha=shade, label=f"{threshold:g}")
        plots.label(panels[2], "c  Heads by frequency", "heads, most frequent first", "frequency")
        panels[2].set_ylim(0, 1.02)
        panels[2].legend(title="threshold")
        plots.label(panels[3], "d  Active heads of a layer", "layer", "heads in a graph, mean")
        panels[3].set_ylim(bottom=0)

    lines = [
        f"At {threshold:g}, {number(heads_in)} of {L * H} heads are in a prediction's graph on "
        f"average; {_count(interval.value > 0.5)} are in more than half of the graphs, and "
        f"{_count(interval.value < 0.001)} in fewer than one in a thousand; "
        + (
            "no route changes position."
            if np.isnan(lowest_layer)
            else "the lowest layer in which a route changes position is "
            f"{number(lowest_layer)} on average."
        )
        for threshold, interval, heads_in, lowest_layer in zip(
            thresholds, of, count, depth, strict=True
        )
    ]
    middle = len(thresholds) // 2
    flat = of[middle].value.reshape(-1)
    best = np.argsort(-flat, kind="stable")[:5]
    lines.append(
        f"Most frequent at {thresholds[middle]:g}: "
        + listed([f"{head_name(int(i) // H, int(i) % H)} ({percent(flat[i])})" for i in best])
        + "."
    )
    return Finding(
        "frequency",
        "How often heads are active",
        "\n".join(lines),
        "A head is in a graph if one of its edges into a node of the graph exceeds the "
        f"threshold. {int(n):,} predictions of {len(units.documents):,} documents; "
        "columns low, high: 95% bootstrap intervals over documents.",
        table,
        table.take(np.argsort(-flat, kind="stable")[:15]),
        figure,
    )


def _count(mask: NDArray[np.bool_]) -> int:
    return int(mask.sum())


def _top(values: Floats) -> int:
    return int(values.argmax())


def _leading(values: Floats, k: int) -> list[int]:
    return sorted(np.argsort(-values, kind="stable")[:k].tolist())


def _thirds(values: Floats, name: str) -> str:
    """Importance of one kind of block in each third of the layers, in words."""
    thirds = [float(x.sum()) for x in np.array_split(values, 3)]
    whole = sum(thirds) or 1.0
    low, middle, high = (percent(x / whole) for x in thirds)
    return f"{name}: {low} in the lower third of the layers, {middle} in the middle, {high} above."
