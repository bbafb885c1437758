"""(e) Parts of speech and (g) function against content words: whether the components that a
prediction goes through tell which kind of word it is made at.

A prediction's vector is the square root of the importance of every head and FFN block in its graph,
[L * H + L]: importances are shares, and the Euclidean distance of their roots is Hellinger's. Taken
as they are, the few blocks with the greatest importances would decide all distances.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ...errors import IfrError
from ..schema import Survey
from . import plots
from .finding import Finding, NotApplicableError
from .statistics import Floats, compare_pairs, correct, ratio
from .units import Part, threshold_index, units_of
from .wording import head_name, listed, number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Of: TypeAlias = Literal["token", "next"]

_DIMENSIONS = 50  # of the principal components that distances are taken in
_NEIGHBOURS = 10
_MAP_POINTS = 2000
_SILHOUETTE_POINTS = 2000
_LEAST = 20  # predictions of a class
ALPHA = 0.05

# Universal part-of-speech tags (Petrov et al. 2012; Universal Dependencies).
FUNCTION_TAGS = frozenset(["ADP", "AUX", "CCONJ", "CONJ", "DET", "PART", "PRON", "PRT", "SCONJ"])
CONTENT_TAGS = frozenset(["ADJ", "ADV", "NOUN", "PROPN", "VERB"])


class _Sample(NamedTuple):
    """N predictions, at most so many a class, in the order of the survey."""

    vectors: NDArray[np.float32]  # [N, L * H + L]
    labels: NDArray[np.int64]  # [N] index into classes
    documents: NDArray[np.int64]  # [N]
    words: NDArray[np.int64]  # [N] equal where the token is the same but for case and spaces
    classes: list[str]


class _Scores(NamedTuple):
    """One measure of how well vectors tell classes, and what shuffled labels score."""

    value: float
    of_class: Floats  # [C]
    shuffled: Floats  # [P]
    of_class_shuffled: Floats  # [C] mean

    @property
    def p(self) -> float:
        return float((1 + (self.shuffled >= self.value).sum()) / (1 + len(self.shuffled)))


def parts_of_speech(
    survey: Survey,
    corpora: Collection[str] | None = None,
    *,
    label: str = "pos",
    of: Of = "token",
    per_class: int = 300,
    permutations: int = 200,
    seed: int = 0,
) -> Finding:
    """Whether prediction vectors group by the word class in `label_<label>`.

    of: whether the class is that of the token whose position predicts, or of the next one.

    A row of the table is a measure, over all classes or of one. Raises NotApplicableError without
    the label, or with fewer than two classes or documents.
    """
    sample = _draw(survey, corpora, label, of, per_class, seed)
    N, C = len(sample.labels), len(sample.classes)
    space, explained = _principal(sample.vectors, seed)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(N) for _ in range(permutations)]
    elsewhere = _neighbours(space, sample.documents, None)
    other_words = _neighbours(space, sample.documents, sample.words)
    measures = {
        "nearest neighbours": _vote_scores(elsewhere, sample.labels, orders, C),
        "nearest neighbours, other words": _vote_scores(other_words, sample.labels, orders, C),
        "silhouette": _silhouettes(space, sample.labels, permutations, C, rng),
    }
    table = _scores_table(measures, sample, C)
    kind = "the token it is made at" if of == "token" else "the token that follows"
    return Finding(
        "parts_of_speech" if of == "token" else "parts_of_speech_next",
        "Parts of speech" if of == "token" else "Parts of speech of the next token",
        _speech_statement(measures, sample, permutations),
        f"{N:,} predictions, at most {per_class} of each class drawn at random, labelled by "
        f"{label!r} of {kind}. Vectors: importance of {survey.n_layers * survey.n_heads} heads and "
        f"{survey.n_layers} FFN blocks, square roots; distances are Euclidean in their first "
        f"{space.shape[1]} principal components ({percent(explained)} of the variance). "
        f"Nearest neighbours: the class of most of the {_NEIGHBOURS} nearest predictions of other "
        "documents, as balanced accuracy (the mean over classes of the share found); in the "
        "second row neighbours must also be other words, so that knowing the "
        f"word does not help. Shuffled: the same with labels permuted, {permutations} times. The "
        "t-SNE map is for looking at; no number is taken from it.",
        table,
        table.filter(pc.is_null(table["class"])),
        _speech_figure(space, sample, measures, seed),
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
    """How predictions made at function words differ from those made at content words.

    label: a label of universal part-of-speech tags; without one, English function words are
    told by a list. threshold: at which heads are in graphs; default 0.04 or the nearest there is.

    A row of the table is a quantity or a component. Documents that have both kinds are
    compared within themselves.
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
            "documents: fewer than 2 have function and content words that are told apart"
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
        _function_statement(names, pooled, difference, q, counts, Q, H, threshold),
        f"{int(counts[0]):,} predictions made at function words and {int(counts[1]):,} at content "
        f"words, told by {told}; other tokens are left out. Means are over predictions; "
        "differences are of each document's own means, over "
        f"{len(n):,} documents or groups of them, with p of a sign-flip test and q after "
        f"Benjamini-Hochberg (quantities and heads apart). Heads are in graphs at {threshold:g}.",
        table,
        table.take([*range(Q), *_surest(difference, q, Q)]),
        _function_figure(pooled, difference, q, Q, L, H),
    )


def _surest(difference: Floats, q: Floats, begin: int, most: int = 12) -> list[int]:
    """Rows from `begin` on that pass the test, the greatest differences first."""
    rows = np.arange(begin, len(q))[q[begin:] <= ALPHA]
    ranked = rows[np.argsort(-np.abs(difference[rows]), kind="stable")]
    return [int(i) for i in ranked[:most]]


# Parts of speech: the sample


def _draw(
    survey: Survey,
    corpora: Collection[str] | None,
    label: str,
    of: Of,
    per_class: int,
    seed: int,
) -> _Sample:
    """Those predictions of each class that a hash of their place puts first: independent of how
    a survey is cut into parts, and no more in memory than are drawn.
    """
    if label not in survey.labels:
        there = listed(survey.labels) or "none"
        raise NotApplicableError(f"label: the survey has no label {label!r}; it has {there}")
    if of not in ("token", "next"):
        raise ValueError(f"of: expected 'token' or 'next', got {of!r}")
    column = f"label_{label}"
    drawn: dict[str, dict[str, NDArray[np.generic]]] = {}
    columns = ["position", "token", "next_token", column, "head_importance", "ffn_importance"]
    for _, part in units_of(survey, corpora).parts(survey.predictions, *columns):
        names, words = part[column], part["token"]
        if of == "next":
            names, words = _following(part, names), part["next_token"]
        key = _hash(part["document"], part["position"], seed)
        for name in sorted({x for x in names.tolist() if x is not None}):
            mine = (names == name).nonzero()[0]
            mine = mine[key[mine].argsort(kind="stable")[:per_class]]
            rows: dict[str, NDArray[np.generic]] = {
                "key": key[mine],
                "document": part["document"][mine],
                "position": part["position"][mine],
                "word": np.array([str(x).strip().lower() for x in words[mine]], dtype=object),
                "vector": np.concatenate(
                    [
                        part["head_importance"][mine].reshape(len(mine), -1),
                        part["ffn_importance"][mine],
                    ],
                    axis=1,
                ),
            }
            if name in drawn:
                rows = {k: np.concatenate([drawn[name][k], x]) for k, x in rows.items()}
            first = rows["key"].argsort(kind="stable")[:per_class]
            drawn[name] = {k: x[first] for k, x in rows.items()}
    classes = sorted(name for name, rows in drawn.items() if len(rows["key"]) >= _LEAST)
    if len(classes) < 2:
        raise NotApplicableError(
            f"label: {label!r} has {len(classes)} classes of {_LEAST} predictions or more; "
            "expected at least 2"
        )
    together = {k: np.concatenate([drawn[name][k] for name in classes]) for k in drawn[classes[0]]}
    labels = np.repeat(np.arange(len(classes)), [len(drawn[name]["key"]) for name in classes])
    order = np.lexsort((together["position"], together["document"]))
    if len(np.unique(together["document"])) < 2:
        raise NotApplicableError("documents: expected at least 2 with labels, got 1")
    _, words = np.unique(together["word"].astype(str), return_inverse=True)
    return _Sample(
        np.sqrt(together["vector"][order]).astype(np.float32),
        labels[order],
        together["document"][order].astype(np.int64),
        words[order],
        classes,
    )


def _following(part: Part, names: NDArray[np.generic]) -> NDArray[np.generic]:
    """The label of the next token: that of the next row, where that is its row."""
    document, position = part["document"], part["position"]
    found = np.full(len(names), None, dtype=object)
    adjoins = (document[1:] == document[:-1]) & (position[1:] == position[:-1] + 1)
    found[:-1][adjoins] = names[1:][adjoins]
    return found


def _hash(
    document: NDArray[np.int64], position: NDArray[np.int32], seed: int
) -> NDArray[np.uint64]:
    """SplitMix64 of a row's place."""
    x = (document.astype(np.uint64) << np.uint64(24)) ^ position.astype(np.uint64)
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


# Parts of speech: measures


def _principal(vectors: NDArray[np.float32], seed: int) -> tuple[Floats, float]:
    """Coordinates in the first principal components, and the share of the variance they have."""
    try:
        from sklearn.decomposition import PCA
    except ImportError as error:
        raise IfrError(
            "parts of speech need scikit-learn, which is not installed: "
            "pip install 'ifr-fast[report]'"
        ) from error
    pca = PCA(min(_DIMENSIONS, *vectors.shape), svd_solver="full", random_state=seed)
    space = pca.fit_transform(vectors.astype(np.float64))
    return space, float(pca.explained_variance_ratio_.sum())


def _neighbours(
    space: Floats, documents: NDArray[np.int64], words: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """[N, k] nearest rows of other documents (and other words), nearest first; -1 where none is."""
    N = len(space)
    k = min(_NEIGHBOURS, N - 1)
    squares = (space**2).sum(1)
    found = np.empty((N, k), dtype=np.int64)
    for begin in range(0, N, 512):
        rows = slice(begin, min(N, begin + 512))
        distance = squares[rows, None] + squares - 2 * space[rows] @ space.T
        distance[documents[rows, None] == documents] = np.inf
        if words is not None:
            distance[words[rows, None] == words] = np.inf
        nearest = distance.argsort(1, kind="stable")[:, :k]
        there = np.isfinite(np.take_along_axis(distance, nearest, 1))
        found[rows] = np.where(there, nearest, -1)
    return found


def _vote_scores(
    neighbours: NDArray[np.int64],
    labels: NDArray[np.int64],
    orders: list[NDArray[np.int64]],
    C: int,
) -> _Scores:
    """Balanced accuracy of the neighbours' majority; ties go to the class of the nearer ones."""
    N, k = neighbours.shape
    weight = np.where(neighbours >= 0, 1 + 1e-6 * np.arange(k, 0, -1), 0)
    rows = np.arange(N)[:, None] * C

    def recall(of: NDArray[np.int64]) -> Floats:
        votes = np.bincount(
            (rows + of[neighbours]).reshape(-1), weights=weight.reshape(-1), minlength=N * C
        ).reshape(N, C)
        right = votes.argmax(1) == of
        return np.bincount(of, weights=right, minlength=C) / np.bincount(of, minlength=C)

    own = recall(labels)
    null = np.stack([recall(labels[order]) for order in orders])
    return _Scores(float(own.mean()), own, null.mean(1), null.mean(0))


def _silhouettes(
    space: Floats, labels: NDArray[np.int64], permutations: int, C: int, rng: np.random.Generator
) -> _Scores:
    """Mean silhouette of some of the rows (Rousseeuw 1987), and of each class."""
    from sklearn.metrics import pairwise_distances, silhouette_samples

    some = np.sort(rng.permutation(len(space))[:_SILHOUETTE_POINTS])
    distance = pairwise_distances(space[some])
    np.fill_diagonal(distance, 0)
    labels = labels[some]

    def means(of: NDArray[np.int64]) -> tuple[float, Floats]:
        values = silhouette_samples(distance, of, metric="precomputed")
        with np.errstate(invalid="ignore", divide="ignore"):
            each = np.bincount(of, weights=values, minlength=C) / np.bincount(of, minlength=C)
        return float(values.mean()), each

    own, of_class = means(labels)
    null = [means(labels[rng.permutation(len(labels))]) for _ in range(permutations)]
    return _Scores(
        own, of_class, np.array([x for x, _ in null]), np.mean([x for _, x in null], axis=0)
    )


def _scores_table(measures: dict[str, _Scores], sample: _Sample, C: int) -> pa.Table:
    counts = np.bincount(sample.labels, minlength=C)
    rows = []
    for measure, of in measures.items():
        rows.append({
            "measure": measure, "class": None, "count": len(sample.labels), "value": of.value,
            "shuffled": float(of.shuffled.mean()), "shuffled_most": float(of.shuffled.max()),
            "p": of.p,
        })  # fmt: skip
        rows += [
            {
                "measure": measure, "class": sample.classes[i], "count": int(counts[i]),
                "value": float(of.of_class[i]), "shuffled": float(of.of_class_shuffled[i]),
                "shuffled_most": None, "p": None,
            }
            for i in range(C)
        ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def _speech_statement(measures: dict[str, _Scores], sample: _Sample, permutations: int) -> str:
    near, other, silhouette = measures.values()
    C = len(sample.classes)
    ranked = np.argsort(-other.of_class, kind="stable")

    def of(i: int) -> str:
        return f"{sample.classes[i]} ({percent(other.of_class[i])})"

    verdict = (
        "Vectors tell parts of speech far better than chance"
        if max(near.p, other.p) <= ALPHA and other.value >= 2 * other.shuffled.max()
        else "Vectors tell parts of speech better than chance"
        if max(near.p, other.p) <= ALPHA
        else "Vectors do not tell parts of speech from what chance would give"
    )
    return (
        f"{verdict}: the nearest predictions of other documents name the class of "
        f"{percent(near.value)} rightly (the mean over {C} classes), and of "
        f"{percent(other.value)} when they must be other words; with "
        f"shuffled labels {percent(float(near.shuffled.mean()))}, never above "
        f"{percent(float(max(near.shuffled.max(), other.shuffled.max())))} in {permutations} "
        f"shuffles.\n"
        f"Found best among other words: {listed([of(int(i)) for i in ranked[:3]])}; worst: "
        f"{listed([of(int(i)) for i in ranked[-3:]])}.\n"
        f"Silhouette {silhouette.value:.3f}, shuffled {silhouette.shuffled.mean():.3f} "
        f"(at most {silhouette.shuffled.max():.3f}; p = {number(silhouette.p)}): "
        + (
            "classes are clouds apart."
            if silhouette.value >= 0.1
            else "neighbours agree, but classes overlap as clouds."
        )
        + f" Most compact: {_compact(silhouette, sample.classes)}."
    )  # fmt: skip


def _compact(silhouette: _Scores, classes: list[str]) -> str:
    ranked = np.argsort(-np.nan_to_num(silhouette.of_class, nan=-1), kind="stable")[:3]
    return listed([f"{classes[int(i)]} ({silhouette.of_class[i]:.2f})" for i in ranked])


def _speech_figure(
    space: Floats, sample: _Sample, measures: dict[str, _Scores], seed: int
) -> Figure:
    from sklearn.manifold import TSNE

    N, C = len(space), len(sample.classes)
    some = np.sort(np.random.default_rng(seed).permutation(N)[:_MAP_POINTS])
    perplexity = min(30.0, max(2.0, (len(some) - 1) / 4))
    map_ = TSNE(2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(space[some])
    near, other, silhouette = measures.values()
    with plots.figure(7.2, 6.0) as figure:
        top, bottom = figure.subplots(2, 2)
        _scatter(top[0], space[some][:, :2], sample.labels[some], sample.classes)
        plots.label(top[0], "a  First two principal components", "", "")
        _scatter(top[1], map_, sample.labels[some], sample.classes)
        plots.label(top[1], "b  t-SNE", "", "")
        top[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=6.5, markerscale=2)
        x = np.arange(C)
        bottom[0].bar(x - 0.2, near.of_class, 0.38, color=plots.ATTENTION, label="any word")
        bottom[0].bar(x + 0.2, other.of_class, 0.38, color=plots.TINT, label="other words")
        for i in range(C):
            bottom[0].plot([i - 0.4, i + 0.4], [near.of_class_shuffled[i]] * 2, color=plots.ALERT,
                           label="shuffled labels" if i == 0 else None)  # fmt: skip
        bottom[0].set_xticks(x, sample.classes, rotation=60)
        plots.label(bottom[0], "c  Neighbours that name the class", "", "share found")
        bottom[0].set_ylim(top=1.3 * max(float(near.of_class.max()), float(other.of_class.max())))
        bottom[0].legend(loc="upper center", ncols=3, columnspacing=1.0)
        bars = bottom[1]
        bars.barh(np.arange(C), silhouette.of_class, 0.6, color=plots.GROUPS[6])
        bars.set_yticks(np.arange(C), sample.classes)
        bars.axvline(silhouette.value, color=plots.INK, lw=0.8, label="all")
        bars.axvline(silhouette.shuffled.mean(), color=plots.ALERT, lw=0.8, label="shuffled labels")
        bars.invert_yaxis()
        plots.label(bars, "d  Silhouette", "mean", "")
        bars.legend()
    return figure


def _scatter(axes: Axes, points: Floats, labels: NDArray[np.int64], classes: list[str]) -> None:
    for i, name in enumerate(classes):
        x, y = points[labels == i].T
        color = plots.GROUPS[i % len(plots.GROUPS)]
        # As pixels within the SVG: thousands of points are no drawing.
        axes.scatter(x, y, s=4, color=color, label=name, alpha=0.7, linewidths=0, rasterized=True)
    axes.set_xticks([])
    axes.set_yticks([])


# Function words


def _kinds(values: list[str | None], tagged: bool) -> NDArray[np.int64]:
    """0 for function words, 1 for content words, 2 for what is neither."""

    def of(value: str | None) -> int:
        if value is None:
            return 2
        if tagged:
            tag = value.upper()
            return 0 if tag in FUNCTION_TAGS else 1 if tag in CONTENT_TAGS else 2
        word = value.strip().lower()
        if word in FUNCTION_WORDS:
            return 0
        # A word's beginning, and no single letter: other pieces are not known to be either.
        return 1 if value[:1].isspace() and len(word) > 1 and word.isalpha() else 2

    return np.array([of(value) for value in values], dtype=np.int64)


def _function_statement(
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
        sure = f"{how}, q = {number(q[i])}" if q[i] <= ALPHA else "not told apart"
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


def _function_figure(
    pooled: Floats, difference: Floats, q: Floats, Q: int, L: int, H: int
) -> Figure:
    with plots.figure(7.2, 3.0) as figure:
        left, right = figure.subplots(1, 2)
        values = difference[Q:].reshape(L, H)
        most = float(np.abs(values).max()) or 1.0
        plots.heads(
            left, values, title="a  Frequency of heads, function − content", colors="RdBu_r",
            limits=(-most, most),
        )  # fmt: skip
        sure = q[Q:] <= ALPHA
        for mask, color, name in ((~sure, plots.RESIDUAL, "not told apart"),
                                  (sure, plots.ATTENTION, f"q ≤ {ALPHA:g}")):  # fmt: skip
            right.scatter(
                pooled[1, Q:][mask], pooled[0, Q:][mask], s=8, color=color, lw=0, label=name
            )
        right.plot([0, 1], [0, 1], ":", color=plots.MUTED)
        plots.label(right, "b  Every head", "frequency at content words", "at function words")
        right.legend()
    return figure


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
