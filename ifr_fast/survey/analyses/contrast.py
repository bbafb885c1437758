"""(h) Contrast: components that matter more in one set of prompts than in another."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..schema import Survey
from . import plots
from .finding import Finding, NotApplicableError
from .intervals import ALPHA, Differences, Floats, compare, correct, surest
from .units import Part, units_of
from .wording import head_name, listed, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def contrast(
    survey: Survey,
    first: str,
    second: str,
    *,
    position: Literal["last", "all"] = "last",
    alpha: float = ALPHA,
    seed: int = 0,
    resamples: int = 1000,
    permutations: int = 9999,
) -> Finding:
    """Finds components that matter more in one set of prompts than in another.

    first, second: corpora of the survey, whose documents are prompts. position: "last", the last
    prediction of each prompt (that of its last token), or "all" predictions.

    Each row of the table is a quantity or a component, compared by importance. Raises
    NotApplicableError if a set has fewer than two prompts.
    """
    if position not in ("last", "all"):
        raise ValueError(f"position: expected 'last' or 'all', got {position!r}")
    if first == second:
        raise ValueError(f"second: expected another corpus than the first, got {second!r}")
    units = units_of(survey, {first, second}, seed=seed)
    L, H = survey.n_layers, survey.n_heads
    quantities = ["attention importance", "FFN importance", "lowest position change",
                  "probability"]  # fmt: skip
    Q = len(quantities)
    columns = ["position", "head_importance", "ffn_importance", "route_depth_0", "probability"]
    ends = _last_positions(survey) if position == "last" else None

    def values(part: Part) -> dict[str, NDArray[np.float64]]:
        heads = part["head_importance"].reshape(-1, L * H).astype(np.float64)
        ffn = part["ffn_importance"].astype(np.float64)
        x = np.column_stack([
            heads.sum(1), ffn.sum(1), part["route_depth_0"], part["probability"], ffn, heads
        ])  # fmt: skip
        chosen = np.ones(len(x))
        if ends is not None:
            at = np.searchsorted(ends[0], part["document"])
            chosen = (part["position"] == ends[1][at]).astype(np.float64)
        return {"n": chosen, "x": x * chosen[:, None]}

    for name in (first, second):
        if (units.corpus == units.corpora.index(name)).sum() < 2:
            raise NotApplicableError(f"documents: expected at least 2 in {name!r}, got 1")
    sums = units.sum(survey.predictions, columns, values)
    groups = [units.corpus == units.corpora.index(name) for name in (first, second)]
    of = compare(
        (sums["x"][groups[0]], sums["n"][groups[0]]),
        (sums["x"][groups[1]], sums["n"][groups[1]]),
        seed=seed, resamples=resamples, permutations=permutations,
    )  # fmt: skip
    q = np.concatenate([correct(of.p[:Q]), correct(of.p[Q:])])
    table = pa.table(
        {
            "quantity": [*quantities, *["FFN importance"] * L, *["head importance"] * (L * H)],
            "layer": pa.array(
                [None] * Q + [*range(L)] + [i // H for i in range(L * H)], pa.int16()
            ),
            "head": pa.array([None] * (Q + L) + [i % H for i in range(L * H)], pa.int16()),
            "first": of.first,
            "second": of.second,
            "difference": of.first - of.second,
            "low": of.low,
            "high": of.high,
            "p": of.p,
            "q": q,
        }
    )
    counts = [int(sums["n"][group].sum()) for group in groups]
    which = "the last prediction of each prompt" if position == "last" else "all predictions"
    return Finding(
        f"contrast_{_slug(first)}_{_slug(second)}",
        f"Contrast of {first} with {second}",
        _statement(of, q, quantities, first, second, alpha, L, H),
        f"Importance in graphs at {survey.thresholds[0]:g} of {which}: {counts[0]:,} of {first!r}, "
        f"{counts[1]:,} of {second!r}. Differences with 95% bootstrap intervals over prompts; p: "
        f"permutation of prompts between the sets, {permutations:,} times; q: Benjamini-Hochberg, "
        "quantities and components apart.",
        table,
        table.take(
            [
                *range(Q),
                *(
                    Q + i
                    for i in surest(q[None, Q:], table["difference"].to_numpy()[Q:], alpha, 12)
                ),
            ]
        ),
        _figure(of, q, first, second, alpha, L, H),
    )


def _last_positions(survey: Survey) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents, ascending, and the last position of each in the survey."""
    last: dict[int, int] = {}
    for part in survey.predictions.parts("document", "position"):
        order = np.lexsort((part["position"], part["document"]))
        documents, positions = part["document"][order], part["position"][order]
        ends = np.flatnonzero(np.append(documents[1:] != documents[:-1], True))
        for document, end in zip(documents[ends].tolist(), positions[ends].tolist(), strict=True):
            last[document] = max(end, last.get(document, -1))
    documents = np.array(sorted(last), dtype=np.int64)
    return documents, np.array([last[i] for i in documents.tolist()], dtype=np.int64)


def _slug(name: str) -> str:
    """A name for files, different for every corpus."""
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in name)[:40].lower()
    return kept if kept == name else f"{kept}-{sha256(name.encode()).hexdigest()[:6]}"


def _statement(
    of: Differences,
    q: Floats,
    quantities: list[str],
    first: str,
    second: str,
    alpha: float,
    L: int,
    H: int,
) -> str:
    Q = len(quantities)
    difference = of.first - of.second
    lines = []
    for i, name in enumerate(quantities):
        sure = f"q = {number(q[i])}" if q[i] <= alpha else "no significant difference"
        lines.append(
            f"{name[0].upper()}{name[1:]}: {number(of.first[i])} in {first}, "
            f"{number(of.second[i])} in {second} ({sure})."
        )

    def called(i: int) -> str:
        if i < Q + L:
            return f"the FFN of layer {i - Q}"
        return head_name((i - Q - L) // H, (i - Q - L) % H)

    components = np.arange(Q, len(q))
    sure_ones = components[q[Q:] <= alpha]
    if not len(sure_ones):
        lines.append(
            f"No component's importance differs after correction for {len(components):,} tests "
            f"(smallest q: {number(float(q[Q:].min()))})."
        )
    for sign, more in ((1, first), (-1, second)):
        ranked = sure_ones[np.argsort(-sign * difference[sure_ones], kind="stable")]
        best = [int(i) for i in ranked if sign * difference[i] > 0]
        if best:
            lines.append(
                f"{len(best)} components matter more in {more}: "
                + listed([f"{called(i)} ({number(of.first[i])} against {number(of.second[i])})"
                          for i in best], 5)
                + "."
            )  # fmt: skip
    return "\n".join(lines)


def _figure(
    of: Differences, q: Floats, first: str, second: str, alpha: float, L: int, H: int
) -> Figure:
    M = L * H
    difference = of.first - of.second
    head, ffn = difference[-M:], slice(len(q) - M - L, len(q) - M)
    with plots.figure(7.2, 3.0) as figure:
        left, right = figure.subplots(1, 2)
        most = float(np.abs(head).max()) or 1.0
        marked = [(i // H, i % H) for i in np.flatnonzero(q[-M:] <= alpha).tolist()]
        plots.heads(
            left, head.reshape(L, H), title="a  Heads, difference (framed: sure)",
            colors="RdBu_r", limits=(-most, most), marked=marked,
        )  # fmt: skip
        right.plot(of.first[-M:].reshape(L, H).sum(1), color=plots.ATTENTION,
                   label=f"attention, {first}")  # fmt: skip
        right.plot(of.second[-M:].reshape(L, H).sum(1), ":", color=plots.ATTENTION,
                   label=f"attention, {second}")  # fmt: skip
        right.plot(of.first[ffn], color=plots.FFN, label=f"FFN, {first}")
        right.plot(of.second[ffn], ":", color=plots.FFN, label=f"FFN, {second}")
        plots.label(right, "b  Blocks", "layer", "importance")
        right.legend(fontsize=6.5)
    return figure
