"""(f) Domains: heads whose frequency differs between corpora; (h) two sets of prompts compared."""

from __future__ import annotations

from collections.abc import Collection
from hashlib import sha256
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..schema import Survey
from . import plots
from .finding import Finding, NotApplicableError
from .statistics import Differences, Floats, compare, correct
from .units import Part, Units, threshold_index, units_of
from .wording import head_name, listed, number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALPHA = 0.05  # rate of false discoveries
_PANELS = 6


def domains(
    survey: Survey,
    corpora: Collection[str] | None = None,
    *,
    threshold: float | None = None,
    alpha: float = ALPHA,
    seed: int = 0,
    resamples: int = 1000,
    permutations: int = 9999,
) -> Finding:
    """Heads that are more or less often in graphs in one corpus than in the others.

    Of two corpora, the first is compared with the second; of more, each with all others together.
    A row of the table is a corpus and a head. threshold: one of the survey's; default 0.04 or
    the nearest. Raises NotApplicableError with fewer than two corpora of two documents.
    """
    k = threshold_index(survey, threshold)
    units = units_of(survey, corpora, seed=seed)
    enough = [i for i in range(len(units.corpora)) if (units.corpus == i).sum() >= 2]
    if len(enough) < 2:
        raise NotApplicableError(
            "corpora: expected at least 2 with 2 documents or more, got "
            + (listed([repr(units.corpora[i]) for i in enough]) or "none")
        )
    L, H = survey.n_layers, survey.n_heads
    counts, sums = _frequencies(survey, units, k)
    subjects = enough[:1] if len(enough) == 2 else enough
    found: list[Differences] = []
    for i in subjects:
        mine = units.corpus == i
        rest = np.isin(units.corpus, enough) & ~mine
        found.append(
            compare(
                (sums[mine], counts[mine]), (sums[rest], counts[rest]),
                seed=seed, resamples=resamples, permutations=permutations,
            )
        )  # fmt: skip
    q = correct(np.stack([of.p for of in found]))
    control = halves_differ(units.corpus, counts, sums, seed=seed, permutations=permutations)
    names = [units.corpora[i] for i in subjects]
    table = pa.concat_tables(
        [
            _table(name, of, q[i], L, H)
            for i, (name, of) in enumerate(zip(names, found, strict=True))
        ]
    )
    against = repr(units.corpora[enough[1]]) if len(enough) == 2 else "all other corpora"
    sizes = listed([
        f"{units.corpora[i]!r} ({int((units.corpus == i).sum()):,})" for i in enough
    ])  # fmt: skip
    return Finding(
        "domains",
        "Domains",
        _statement(names, found, q, against, alpha, H) + _control_statement(control, alpha),
        f"Share of predictions whose graph a head is in, at {survey.thresholds[k]:g}. Documents, "
        f"or groups of them: {sizes}. Intervals: 95% bootstrap over documents. p: permutation of "
        f"documents between the groups ({permutations:,} times), statistic studentized; q: "
        f"Benjamini-Hochberg over all {q.size:,} tests, at {alpha:g}. Corpora that differ in the "
        "length of documents, or in how much of them is at the beginning, differ in that too. "
        "Control: the same test of two halves of each corpus, its documents dealt out at random.",
        table,
        table.take(pa.array(_surest(q, table["difference"].to_numpy(), alpha), pa.int64())),
        _figure(names, found, q, alpha, L, H, against),
    )


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
    """Which components matter more in one set of prompts than in another.

    first, second: corpora of the survey, each document a prompt. position: "last", the last
    prediction of each prompt (that of its last token), or "all" of them.

    A row of the table is a quantity or a component, compared by importance. Raises
    NotApplicableError where a set has fewer than two prompts.
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
        _contrast_statement(of, q, quantities, first, second, alpha, L, H),
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
                    for i in _surest(q[None, Q:], table["difference"].to_numpy()[Q:], alpha, 12)
                ),
            ]
        ),
        _contrast_figure(of, q, first, second, alpha, L, H),
    )


def _frequencies(survey: Survey, units: Units, k: int) -> tuple[Floats, Floats]:
    """Predictions [U], and those whose graph each head is in [U, L * H]."""
    M = survey.n_layers * survey.n_heads

    def values(part: Part) -> dict[str, NDArray[np.float64]]:
        inside = part[f"head_in_{k}"].reshape(-1, M)
        return {"n": np.ones(len(inside)), "in": inside}

    sums = units.sum(survey.predictions, [f"head_in_{k}"], values)
    return sums["n"], sums["in"]


def halves_differ(
    corpus: NDArray[np.int64],
    counts: Floats,
    sums: Floats,
    *,
    seed: int,
    permutations: int = 9999,
) -> Floats:
    """Of two random halves of each corpus, where nothing is to be found: q [C, M] of the same test.

    corpus, counts [U] and sums [U, M] of each unit; corpora of fewer than 4 units are left out.
    """
    rng = np.random.default_rng(seed)
    p = []
    for i in np.unique(corpus):
        units = rng.permutation(np.flatnonzero((corpus == i) & (counts > 0)))
        if len(units) >= 4:
            first, second = units[: len(units) // 2], units[len(units) // 2 :]
            groups = (sums[first], counts[first]), (sums[second], counts[second])
            p.append(compare(*groups, seed=seed, resamples=1, permutations=permutations).p)
    return correct(np.stack(p)) if p else np.zeros((0, sums.shape[1]))


def _last_positions(survey: Survey) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents, ascending, and the last position of each that predicts."""
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
    """What may stand in a file's name, and is no other corpus' name."""
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in name)[:40].lower()
    return kept if kept == name else f"{kept}-{sha256(name.encode()).hexdigest()[:6]}"


def _surest(q: Floats, difference: Floats, alpha: float, most: int = 5) -> list[int]:
    """Of each group's tests [G, M], rows of those that pass, the greatest differences first."""
    rows = []
    for g, (of_q, of) in enumerate(zip(q, difference.reshape(q.shape), strict=True)):
        sure = np.flatnonzero(of_q <= alpha)
        ranked = sure[np.argsort(-np.abs(of[sure]), kind="stable")][:most]
        rows += [g * q.shape[1] + int(i) for i in ranked]
    return rows


def _table(name: str, of: Differences, q: Floats, L: int, H: int) -> pa.Table:
    return pa.table(
        {
            "corpus": [name] * (L * H),
            "layer": pa.array([i // H for i in range(L * H)], pa.int16()),
            "head": pa.array([i % H for i in range(L * H)], pa.int16()),
            "frequency": of.first,
            "elsewhere": of.second,
            "difference": of.first - of.second,
            "low": of.low,
            "high": of.high,
            "p": of.p,
            "q": q,
        }
    )


def _statement(
    names: list[str], found: list[Differences], q: Floats, against: str, alpha: float, H: int
) -> str:
    if not (q <= alpha).any():
        return (
            f"No head's frequency differs between corpora after correction for {q.size:,} tests "
            f"(smallest q: {number(float(q.min()))})."
        )
    lines = []
    for name, of, of_q in zip(names, found, q, strict=True):
        sure = np.flatnonzero(of_q <= alpha)
        difference = of.first - of.second
        lines.append(
            f"{name}: {len(sure)} of {len(of_q)} heads differ in frequency from {against} "
            f"(q ≤ {alpha:g}), {int((difference[sure] > 0).sum())} are more frequent here."
        )
        for sign, word in ((1, "More"), (-1, "Less")):
            ranked = sure[np.argsort(-sign * difference[sure], kind="stable")]
            best = [i for i in ranked if sign * difference[i] > 0][:4]
            if best:
                lines.append(
                    f"{word} often in {name}: "
                    + listed([
                        f"{head_name(i // H, i % H)} ({percent(of.first[i])} against "
                        f"{percent(of.second[i])})"
                        for i in best
                    ])
                    + "."
                )  # fmt: skip
    return "\n".join(lines)


def _control_statement(q: Floats, alpha: float) -> str:
    if not q.size:
        return ""
    found = int((q <= alpha).sum())
    return (
        f"\nControl: between two random halves of each corpus, {found} of {q.size:,} heads differ "
        f"by the same test and correction (smallest q: {number(float(q.min()))})."
    )


def _figure(
    names: list[str],
    found: list[Differences],
    q: Floats,
    alpha: float,
    L: int,
    H: int,
    against: str,
) -> Figure:
    shown = list(zip(names, found, q, strict=True))[:_PANELS]
    columns = 2 if len(shown) == 4 else min(3, len(shown))
    rows = -(-len(shown) // columns)
    most = max(float(np.abs(of.first - of.second).max()) for of in found) or 1.0
    with plots.figure(7.2 if len(shown) > 1 else 3.6, 2.7 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
        for axes in panels[len(shown) :]:
            axes.set_axis_off()
        for axes, (name, of, of_q) in zip(panels, shown, strict=False):
            values = np.where(of_q <= alpha, of.first - of.second, np.nan).reshape(L, H)
            plots.heads(
                axes, values, title=name if len(name) < 32 else f"{name[:30]}…",
                colors="RdBu_r", limits=(-most, most),
            )  # fmt: skip
        figure.suptitle(
            f"Frequency of heads against {against}; blank: q > {alpha:g}", fontsize=8.5, x=0.01,
            ha="left",
        )  # fmt: skip
    return figure


def _contrast_statement(
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
        sure = f"q = {number(q[i])}" if q[i] <= alpha else "not told apart"
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


def _contrast_figure(
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
