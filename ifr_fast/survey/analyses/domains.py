"""(f) Domains: heads whose frequency differs between corpora."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..schema import Survey
from . import plots
from .finding import Finding, NotApplicableError
from .intervals import ALPHA, Differences, Floats, compare, correct, surest
from .units import Part, Units, threshold_index, units_of
from .wording import head_name, listed, number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    """Finds heads that are in graphs more or less often in one corpus than in the others.

    Two corpora are compared with each other; of more, each is compared with all others together.
    Each row of the table is a corpus and a head. threshold: one of the survey's; default: 0.04 or
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
        f"Share of predictions with a head in their graph, at {survey.thresholds[k]:g}. Documents, "
        f"or groups of them: {sizes}. Intervals: 95% bootstrap over documents. p: permutation of "
        f"documents between the groups ({permutations:,} times), statistic studentized; q: "
        f"Benjamini-Hochberg over all {q.size:,} tests, at {alpha:g}. Corpora may also "
        "differ because their documents have different lengths. "
        "Control: the same test between two random halves of each corpus' documents.",
        table,
        table.take(pa.array(surest(q, table["difference"].to_numpy(), alpha), pa.int64())),
        _figure(names, found, q, alpha, L, H, against),
    )


def _frequencies(survey: Survey, units: Units, k: int) -> tuple[Floats, Floats]:
    """Number of predictions [U], and of those with each head in their graph [U, L * H]."""
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
    """Control: q [C, M] of the same test between two random halves of each corpus.

    corpus, counts [U] and sums [U, M]: one per unit. Corpora of fewer than 4 units are left out.
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
