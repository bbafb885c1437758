"""(g) Function words and content words: how predictions made at them differ."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..schema import Survey
from . import plots
from .finding import Finding, NotApplicableError
from .intervals import ALPHA, Floats, compare_pairs, correct, ratio, surest
from .units import Part, threshold_index, units_of
from .wording import head_name, listed, number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Universal part-of-speech tags (Petrov et al. 2012; Universal Dependencies).
FUNCTION_TAGS = frozenset(["ADP", "AUX", "CCONJ", "CONJ", "DET", "PART", "PRON", "PRT", "SCONJ"])
CONTENT_TAGS = frozenset(["ADJ", "ADV", "NOUN", "PROPN", "VERB"])
FUNCTION_WORDS = frozenset(
    """a about above across after against all along although am among an and another any anybody
    anyone anything are around as at be because been before behind being below beneath beside
    between beyond both but by can could despite did do does doing done down during each either
    else ever every everybody everyone everything except few for from had has have having he her
    here hers herself him himself his how i if in inside into is it its itself just less like many
    may me might mine more most much must my myself near neither no nobody none nor not nothing
    of off on once one onto or other others ought our ours ourselves out outside over own past per
    rather shall she should since so some somebody someone something such than that the their
    theirs them themselves then there these they this those though through throughout till to
    toward towards under unless until up upon us was we were what whatever when where whether
    which whichever while who whoever whom whose why will with within without would yet you your
    yours yourself yourselves""".split()  # noqa: SIM905
)


def function_words(
    survey: Survey,
    corpora: Collection[str] | None = None,
    *,
    label: str | None = None,
    threshold: float | None = None,
    seed: int = 0,
    permutations: int = 9999,
) -> Finding:
    """Compares predictions made at function words with those made at content words.

    label: a label of universal part-of-speech tags; without one, a list of English function words
    decides. threshold: one of the survey's; default: 0.04 or the nearest.

    Each row of the table is a quantity or a component. The comparison is within each document
    that has both kinds.
    """
    k = threshold_index(survey, threshold)
    if label is not None and label not in survey.labels:
        raise NotApplicableError(f"label: the survey has no label {label!r}")
    L, H = survey.n_layers, survey.n_heads
    units = units_of(survey, corpora, seed=seed)
    column = "token" if label is None else f"label_{label}"
    columns = [column, "head_importance", "ffn_importance", "probability",
               *(f"{name}_{k}" for name in ("head_in", "ffn_in", "route_depth"))]  # fmt: skip

    def values(part: Part) -> dict[str, NDArray[np.float64]]:
        kinds = _kinds(part[column].tolist(), label is not None)
        heads_in = part[f"head_in_{k}"].reshape(-1, L * H).astype(np.float64)
        quantities = np.column_stack([
            part["head_importance"].sum((1, 2), dtype=np.float64),
            part["ffn_importance"].sum(1, dtype=np.float64),
            heads_in.sum(1),
            part[f"ffn_in_{k}"].sum(1),
            part[f"route_depth_{k}"],
            part["probability"],
            heads_in,
        ])  # fmt: skip
        two = np.stack([kinds == 0, kinds == 1], axis=1).astype(np.float64)
        return {"n": two, "x": two[:, :, None] * quantities[:, None, :]}

    sums = units.sum(survey.predictions, columns, values)
    n, x = sums["n"], sums["x"]
    both = (n > 0).all(1)
    if both.sum() < 2:
        raise NotApplicableError(
            "documents: fewer than 2 have both function words and content words"
        )
    n, x = n[both], x[both]
    means = x / n[..., None]
    difference, p = compare_pairs(means[:, 0] - means[:, 1], seed=seed, permutations=permutations)
    names = ["attention importance", "FFN importance", "heads in the graph",
             "FFN blocks in the graph", "lowest position change", "probability"]  # fmt: skip
    Q = len(names)
    q = np.concatenate([correct(p[:Q]), correct(p[Q:])])
    pooled = ratio(x, np.broadcast_to(n[..., None], x.shape))
    table = pa.table(
        {
            "quantity": [*names, *["head frequency"] * (L * H)],
            "layer": pa.array([None] * Q + [i // H for i in range(L * H)], pa.int16()),
            "head": pa.array([None] * Q + [i % H for i in range(L * H)], pa.int16()),
            "function_words": pooled[0],
            "content_words": pooled[1],
            "difference": difference,
            "p": p,
            "q": q,
        }
    )
    counts = n.sum(0)
    threshold = survey.thresholds[k]
    told = f"the label {label!r}" if label is not None else "a list of English function words"
    return Finding(
        "function_words",
        "Function words and content words",
        _statement(names, pooled, difference, q, counts, Q, H, threshold),
        f"{int(counts[0]):,} predictions made at function words and {int(counts[1]):,} at content "
        f"words, identified by {told}; other tokens are left out. Means are over predictions; "
        "differences are of each document's own means, over "
        f"{len(n):,} documents or groups of them, with p of a sign-flip test and q after "
        f"Benjamini-Hochberg (quantities and heads apart). Heads are in graphs at {threshold:g}.",
        table,
        table.take([*range(Q), *(Q + i for i in surest(q[None, Q:], difference[Q:], ALPHA, 12))]),
        _figure(pooled, difference, q, Q, L, H),
    )


def _kinds(values: list[str | None], tagged: bool) -> NDArray[np.int64]:
    """Kind of each value: 0 function word, 1 content word, 2 neither."""

    def of(value: str | None) -> int:
        if value is None:
            return 2
        if tagged:
            tag = value.upper()
            return 0 if tag in FUNCTION_TAGS else 1 if tag in CONTENT_TAGS else 2
        word = value.strip().lower()
        if word in FUNCTION_WORDS:
            return 0
        # Only the beginning of a word, longer than a letter: other pieces are ambiguous.
        return 1 if value[:1].isspace() and len(word) > 1 and word.isalpha() else 2

    return np.array([of(value) for value in values], dtype=np.int64)


def _statement(
    names: list[str],
    pooled: Floats,
    difference: Floats,
    q: Floats,
    counts: Floats,
    Q: int,
    H: int,
    threshold: float,
) -> str:
    lines = []
    for i, name in enumerate(names):
        how = "more" if difference[i] > 0 else "less"
        sure = f"{how}, q = {number(q[i])}" if q[i] <= ALPHA else "no significant difference"
        lines.append(
            f"{name[0].upper()}{name[1:]}: {number(pooled[0, i])} at function words, "
            f"{number(pooled[1, i])} at content words ({sure})."
        )
    heads = np.arange(Q, len(q))
    sure_heads = heads[q[Q:] <= ALPHA]
    lines.append(
        f"{len(sure_heads)} of {len(heads)} heads are in graphs (at {threshold:g}) more or less "
        f"often at function words than at content words, after correction."
    )
    for sign, where in ((1, "function"), (-1, "content")):
        best = [i for i in sure_heads[np.argsort(-sign * difference[sure_heads], kind="stable")]
                if sign * difference[i] > 0][:4]  # fmt: skip
        if best:
            lines.append(
                f"More often at {where} words: "
                + listed([
                    f"{head_name((i - Q) // H, (i - Q) % H)} ({percent(pooled[0, i])} against "
                    f"{percent(pooled[1, i])})"
                    for i in best
                ])
                + "."
            )  # fmt: skip
    return "\n".join(lines)


def _figure(pooled: Floats, difference: Floats, q: Floats, Q: int, L: int, H: int) -> Figure:
    with plots.figure(7.2, 3.0) as figure:
        left, right = figure.subplots(1, 2)
        values = difference[Q:].reshape(L, H)
        most = float(np.abs(values).max()) or 1.0
        plots.heads(
            left, values, title="a  Frequency of heads, function − content", colors="RdBu_r",
            limits=(-most, most),
        )  # fmt: skip
        sure = q[Q:] <= ALPHA
        for mask, color, name in ((~sure, plots.RESIDUAL, "no significant difference"),
                                  (sure, plots.ATTENTION, f"q ≤ {ALPHA:g}")):  # fmt: skip
            right.scatter(
                pooled[1, Q:][mask], pooled[0, Q:][mask], s=8, color=color, lw=0, label=name
            )
        right.plot([0, 1], [0, 1], ":", color=plots.MUTED)
        plots.label(right, "b  Every head", "frequency at content words", "at function words")
        right.legend()
    return figure
