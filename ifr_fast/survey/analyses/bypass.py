"""(d) Block bypass: tokens whose residual stream passes the layers mostly untouched."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..schema import Survey
from . import plots
from .finding import Finding
from .intervals import Floats, Interval, bootstrap
from .units import Part, units_of
from .wording import number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNTOUCHED = 0.9  # share of the residual in a block's sum from which the block counts as bypassed
_SHARES = ("residual_mid", "residual_post")


class _Class(NamedTuple):
    name: str
    holds: Callable[[NDArray[np.int64], list[str]], NDArray[np.bool_]]  # by position and token
    color: str


def _token_is(*texts: str) -> Callable[[NDArray[np.int64], list[str]], NDArray[np.bool_]]:
    return lambda _, tokens: np.array([token.strip(" \u2581") in texts for token in tokens], bool)


# A token belongs to the first class that holds.
_CLASSES = (
    _Class("first token", lambda positions, _: positions == 0, plots.ALERT),
    _Class("period", _token_is("."), plots.FFN),
    _Class("comma", _token_is(","), plots.GROUPS[5]),
    _Class(
        "line break",
        lambda _, tokens: np.array(["\n" in t and not t.strip() for t in tokens], bool),
        plots.GROUPS[6],
    ),
    _Class(
        "other punctuation",
        lambda _, tokens: np.array(
            [bool(t.strip()) and not any(c.isalnum() for c in t) for t in tokens], bool
        ),
        plots.TINT,
    ),
    _Class("other tokens", lambda positions, _: np.ones(len(positions), bool), plots.RESIDUAL),
)


def bypass(
    survey: Survey,
    corpora: Collection[str] | None = None,
    *,
    seed: int = 0,
    resamples: int = 1000,
    min_count: int = 20,
) -> Finding:
    """Share of the residual stream in each block's sum, by class of tokens and by token.

    Each row of the table is a class of tokens, or a token with at least `min_count` occurrences.
    """
    units = units_of(survey, corpora, seed=seed)
    L = survey.n_layers
    C = len(_CLASSES)
    by_token: dict[str, NDArray[np.float64]] = {}

    def values(part: Part) -> dict[str, NDArray[np.float64]]:
        shares = np.concatenate([part[name].astype(np.float64) for name in _SHARES], axis=1)
        tokens = [str(token) for token in part["token"]]
        which = classify(part["position"], tokens)
        passed = np.nansum(shares >= UNTOUCHED, axis=1) / max(1, _blocks(shares))
        row = np.column_stack([np.nanmean(shares, axis=1), passed, np.ones(len(tokens))])
        later = part["position"] > 0
        kinds, index = np.unique(np.array(tokens, dtype=object)[later], return_inverse=True)
        totals = np.zeros((len(kinds), 3))
        np.add.at(totals, index, row[later])
        for kind, total in zip(kinds.tolist(), totals, strict=True):
            by_token[kind] = by_token.get(kind, np.zeros(3)) + total
        one_hot = np.eye(C)[which]
        return {
            "n": one_hot,
            "shares": one_hot[:, :, None] * shares[:, None, :],
            "kept": one_hot * row[:, :1],
            "passed": one_hot * row[:, 1:2],
        }

    sums = units.sum(survey.predictions, ["position", "token", *_SHARES], values)
    n = sums["n"]

    def over(name: str) -> Interval:
        return bootstrap(
            sums[name], n[..., None] if sums[name].ndim == 3 else n, seed=seed, resamples=resamples
        )

    shares, kept, passed = over("shares"), over("kept"), over("passed")
    counts = n.sum(0).astype(np.int64)
    table = _table(counts, kept, passed, by_token, min_count)
    return Finding(
        "bypass",
        "Tokens that pass blocks by",
        _statement(counts, kept, passed, shares, by_token, min_count, L),
        "Share of the residual stream in resid_mid and resid_post at each token's own position; it "
        "is 1 for a block that adds nothing, and does not depend on graphs. A block counts as "
        f"passed by if that share is at least {UNTOUCHED:g}. 95% bootstrap intervals over "
        "documents. Tokens are grouped by their text, at whatever position in a document.",
        table,
        _excerpt(table),
        _figure(L, shares, kept, passed, counts),
    )


def classify(positions: NDArray[np.int64], tokens: list[str]) -> NDArray[np.int64]:
    """Index of each token's class."""
    return np.stack([c.holds(positions, tokens) for c in _CLASSES]).argmax(0)


def _blocks(shares: NDArray[np.float64]) -> int:
    """Number of blocks: NaN stands for the block that a parallel layer lacks."""
    return int((~np.isnan(shares[0])).sum()) if len(shares) else 0


def _table(
    counts: NDArray[np.int64],
    kept: Interval,
    passed: Interval,
    by_token: dict[str, Floats],
    min_count: int,
) -> pa.Table:
    rows = [
        {
            "kind": "class",
            "token": c.name,
            "count": int(counts[i]),
            "residual_share": float(kept.value[i]),
            "low": float(kept.low[i]),
            "high": float(kept.high[i]),
            "blocks_passed": float(passed.value[i]),
        }
        for i, c in enumerate(_CLASSES)
        if counts[i]
    ]
    for token, (share, blocks, count) in _frequent(by_token, min_count):
        rows.append({
            "kind": "token", "token": token, "count": int(count),
            "residual_share": share / count, "low": None, "high": None,
            "blocks_passed": blocks / count,
        })  # fmt: skip
    return pa.Table.from_pylist(rows)


def _excerpt(table: pa.Table, ends: int = 8) -> pa.Table:
    """The classes, and the tokens with the highest and lowest shares."""
    n = table["kind"].to_pylist().count("class")
    last = table.num_rows
    rows = [*range(min(n + ends, last)), *range(max(n + ends, last - ends), last)]
    return table.take(pa.array(rows, pa.int64()))


def _frequent(by_token: dict[str, Floats], min_count: int) -> list[tuple[str, Floats]]:
    """Tokens that occur often enough, highest share of the residual first."""
    often = [(token, x) for token, x in by_token.items() if x[2] >= min_count]
    return sorted(often, key=lambda item: (-item[1][0] / item[1][2], item[0]))


def _statement(
    counts: NDArray[np.int64],
    kept: Interval,
    passed: Interval,
    shares: Interval,
    by_token: dict[str, Floats],
    min_count: int,
    L: int,
) -> str:
    def of(i: int) -> str:
        return (
            f"{percent(kept.value[i])} (95% interval {percent(kept.low[i])} to "
            f"{percent(kept.high[i])}) and passes {percent(passed.value[i])} of the blocks by"
        )

    other = len(_CLASSES) - 1
    lines = [
        f"At an ordinary token the residual stream's mean share in a block's sum is {of(other)}."
    ]
    for i, c in enumerate(_CLASSES[:-1]):
        if not counts[i]:
            continue
        if kept.low[i] > kept.high[other]:
            than = "more than at other tokens"
        elif kept.high[i] < kept.low[other]:
            than = "less than at other tokens"
        else:
            than = "no significant difference from other tokens"
        lines.append(f"{c.name.capitalize()}: {of(i)}, {than}.")
    first = shares.value[0]
    if counts[0] and not np.isnan(first).all():
        halves = [half for half in (first[:L], first[L:]) if not np.isnan(half).all()]
        untouched = np.stack(halves).min(0) >= UNTOUCHED
        if untouched.any():
            runs = ", ".join(_runs(untouched))
            lines.append(f"The first token passes both blocks by, on average, in layers {runs}.")
    ranked = [token for token, _ in _frequent(by_token, min_count)]
    if "." in ranked:
        lines.append(
            f"By residual share, “.” is number {ranked.index('.') + 1} of the {len(ranked)} tokens "
            f"that occur at least {number(min_count)} times past the first position."
        )
    return "\n".join(lines)


def _runs(mask: NDArray[np.bool_]) -> list[str]:
    """Runs of True, as in "2 to 5"."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [
        str(a) if a == b - 1 else f"{a} to {b - 1}"
        for a, b in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    ]


def _figure(
    L: int, shares: Interval, kept: Interval, passed: Interval, counts: NDArray[np.int64]
) -> Figure:
    there = [i for i in range(len(_CLASSES)) if counts[i]]
    with plots.figure(7.2, 4.6) as figure:
        top, bottom = figure.subplots(2, 2)
        titles = ("a  Residual's share after attention", "b  Residual's share after the FFN")
        for axes, title, half in zip(top, titles, (slice(0, L), slice(L, 2 * L)), strict=True):
            for i in there:
                of = Interval(*(x[i, half] for x in shares))
                plots.band(axes, of, _CLASSES[i].color, _CLASSES[i].name)
            plots.label(axes, title, "layer", "share")
            axes.set_ylim(0, 1.02)
        top[0].legend(fontsize=6.5)
        names = [_CLASSES[i].name for i in there]
        colors = [_CLASSES[i].color for i in there]
        bars = (("c  Mean over blocks", kept), ("d  Blocks passed by", passed))
        for axes, (title, interval) in zip(bottom, bars, strict=True):
            value = interval.value[there]
            error = np.stack([value - interval.low[there], interval.high[there] - value])
            axes.barh(
                names, value, color=colors, xerr=np.maximum(error, 0), height=0.65,
                error_kw={"elinewidth": 0.8, "ecolor": plots.INK},
            )  # fmt: skip
            axes.invert_yaxis()
            plots.label(axes, title, "share", "")
            axes.set_xlim(0, 1)
    return figure
