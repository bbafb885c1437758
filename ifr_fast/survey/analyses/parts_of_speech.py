"""(e) Parts of speech: do the components of a prediction's graph depend on the kind of its word?

The vector of a prediction holds the square roots of the importances of all heads and FFN blocks in
its graph, [L * H + L]. Importances are shares, so the Euclidean distance of their roots is
Hellinger's; without roots, the few most important blocks would decide all distances.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ...errors import needing
from ..schema import Survey
from . import plots
from .finding import Finding, NotApplicableError
from .intervals import ALPHA, Floats
from .units import Part, units_of
from .wording import listed, number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Of: TypeAlias = Literal["token", "next"]

_DIMENSIONS = 50  # principal components in which distances are measured
_NEIGHBOURS = 10
_MAP_POINTS = 2000
_SILHOUETTE_POINTS = 2000
_LEAST = 20  # fewest predictions of a class


class _Sample(NamedTuple):
    """N predictions, of each class a limited number, in the order of the survey."""

    vectors: NDArray[np.float32]  # [N, L * H + L]
    labels: NDArray[np.int64]  # [N] index into classes
    documents: NDArray[np.int64]  # [N]
    words: NDArray[np.int64]  # [N] equal for tokens that differ only in case and spaces
    classes: list[str]


class _Scores(NamedTuple):
    """A measure of how well vectors separate classes, and its values for shuffled labels."""

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
    """Tests if prediction vectors group by the word class in `label_<label>`.

    of: "token" for the class of the token whose position predicts, "next" for that of the next one.

    Each row of the table is a measure, over all classes or of one. Raises NotApplicableError
    without the label, or with fewer than two classes or documents.
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
        _statement(measures, sample, permutations),
        f"{N:,} predictions, at most {per_class} of each class drawn at random, labelled by "
        f"{label!r} of {kind}. Vectors: importance of {survey.n_layers * survey.n_heads} heads and "
        f"{survey.n_layers} FFN blocks, square roots; distances are Euclidean in their first "
        f"{space.shape[1]} principal components ({percent(explained)} of the variance). "
        f"Nearest neighbours: the class of most of the {_NEIGHBOURS} nearest predictions of other "
        "documents, as balanced accuracy (the mean over classes of the share found); in the "
        "second row neighbours must also be other words, so that knowing the "
        f"word does not help. Shuffled: the same with labels permuted, {permutations} times. The "
        "t-SNE map is an illustration; no number depends on it.",
        table,
        table.filter(pc.is_null(table["class"])),
        _figure(space, sample, measures, seed),
    )


# Parts of speech: the sample


def _draw(
    survey: Survey,
    corpora: Collection[str] | None,
    label: str,
    of: Of,
    per_class: int,
    seed: int,
) -> _Sample:
    """Draws the predictions of each class whose positions have the lowest hashes.

    The draw does not depend on the parts of a survey, and holds only drawn rows in memory.
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
    """Label of the next token, from the next row if that is the next position."""
    document, position = part["document"], part["position"]
    found = np.full(len(names), None, dtype=object)
    adjoins = (document[1:] == document[:-1]) & (position[1:] == position[:-1] + 1)
    found[:-1][adjoins] = names[1:][adjoins]
    return found


def _hash(
    document: NDArray[np.int64], position: NDArray[np.int32], seed: int
) -> NDArray[np.uint64]:
    """SplitMix64 of a row's document and position."""
    x = (document.astype(np.uint64) << np.uint64(24)) ^ position.astype(np.uint64)
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


# Parts of speech: measures


def _principal(vectors: NDArray[np.float32], seed: int) -> tuple[Floats, float]:
    """Coordinates in the first principal components, and their share of the variance."""
    with needing(
        "the analysis of parts of speech", "scikit-learn", "pip install 'ifr-fast[report]'"
    ):
        from sklearn.decomposition import PCA
    pca = PCA(min(_DIMENSIONS, *vectors.shape), svd_solver="full", random_state=seed)
    space = pca.fit_transform(vectors.astype(np.float64))
    return space, float(pca.explained_variance_ratio_.sum())


def _neighbours(
    space: Floats, documents: NDArray[np.int64], words: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """Nearest rows [N, k] of other documents (and other words), nearest first; -1 for none."""
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
    """Balanced accuracy of the neighbours' majority; nearer neighbours decide ties."""
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
    """Mean silhouette of a sample of the rows (Rousseeuw 1987), and of each class."""
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


def _statement(measures: dict[str, _Scores], sample: _Sample, permutations: int) -> str:
    near, other, silhouette = measures.values()
    C = len(sample.classes)
    ranked = np.argsort(-other.of_class, kind="stable")

    def of(i: int) -> str:
        return f"{sample.classes[i]} ({percent(other.of_class[i])})"

    verdict = (
        "Vectors separate parts of speech far better than chance"
        if max(near.p, other.p) <= ALPHA and other.value >= 2 * other.shuffled.max()
        else "Vectors separate parts of speech better than chance"
        if max(near.p, other.p) <= ALPHA
        else "Vectors do not separate parts of speech better than chance"
    )
    return (
        f"{verdict}: the nearest predictions of other documents give the right class for "
        f"{percent(near.value)} (mean over {C} classes), and for {percent(other.value)} if they "
        f"must be other words; with "
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


def _figure(space: Floats, sample: _Sample, measures: dict[str, _Scores], seed: int) -> Figure:
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
        # Points are rasterized in the SVG: there are thousands.
        axes.scatter(x, y, s=4, color=color, label=name, alpha=0.7, linewidths=0, rasterized=True)
    axes.set_xticks([])
    axes.set_yticks([])


# Function words
