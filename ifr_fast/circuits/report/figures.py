"""The report's figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import needing
from ...storage.files import whole_file
from ..agreement import roc_curve
from ..faithfulness import METHODS, UNITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from .results import Results, ranking, shares
from .tables import share_left


def _figure(width: float, height: float) -> Figure:
    with needing("the report's figures", "matplotlib", "pip install 'ifr-fast[circuits]'"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def roc_figure(results: Results, L: int, H: int) -> Figure:
    figure = _figure(10, 4.6)
    for axes, (direction, effects) in zip(
        figure.subplots(1, 2), results.effects.items(), strict=True
    ):
        hits = shares(effects).mean(0).abs().flatten() >= results.settings.least
        both = 0 < int(hits.sum()) < len(hits)  # otherwise there is no curve
        for name, scores in results.scores.items() if both else ():
            found = results.agreements[direction][name].auc
            axes.plot(*roc_curve(ranking(name, scores), hits), label=f"{name}: {found.value:.2f}")
        axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8, label="chance: 0.50")
        axes.set(xlabel="false positive rate", ylabel="true positive rate")
        axes.set_title(f"against patching ({direction}): {int(hits.sum())} of {L * H} heads")
        axes.legend(fontsize=7, title="area under the curve", title_fontsize=7, loc="lower right")
    return figure


def heads_figure(results: Results, L: int, H: int) -> Figure:
    figure = _figure(12, max(4, 0.2 * L))
    shown = {
        "plain routes": results.scores["plain routes"].mean(0).view(L, H),
        "contrastive routes": results.scores["contrastive routes"].mean(0).view(L, H),
        **{f"patching ({k})": shares(of).mean(0) for k, of in results.effects.items()},
    }
    for axes, (name, values) in zip(figure.subplots(1, 4), shown.items(), strict=True):
        limit = float(values.abs().max()) or 1.0
        image = axes.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        axes.set(title=name, xlabel="head", ylabel="layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes, fraction=0.05)
    return figure


def survival_figure(results: Results) -> Figure:
    figure = _figure(11, 7.5)
    grid = figure.subplots(2, 2, sharex=True)
    of, titles = results.kept, {"ld": "logit difference", "probability": "probability"}
    for row, (what, title) in zip(grid, titles.items(), strict=True):
        for axes, unit in zip(row, UNITS, strict=True):
            for method in METHODS:
                found = [
                    share_left(of, unit, method, m, what, 0)  # type: ignore[arg-type]
                    for m in range(len(of.thresholds))
                ]
                values, low, high = zip(*found, strict=True)
                (line,) = axes.plot(of.thresholds, values, marker="o", markersize=4, label=method)
                axes.fill_between(of.thresholds, low, high, color=line.get_color(), alpha=0.12)
            for level in (0, 1):
                axes.axhline(level, color="#999999", linewidth=0.8, zorder=0)
            axes.set_xscale("log")
            axes.set_xticks(of.thresholds, [f"{x:g}" for x in of.thresholds])
            axes.set_xticks([], minor=True)
            axes.set(ylabel=f"share of the {title} left", title=f"each {unit}")
    for axes in grid[1]:
        axes.set_xlabel("threshold of the route graph")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
