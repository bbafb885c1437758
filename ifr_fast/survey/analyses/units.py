"""Documents as the units of statistics, and sums over each unit, one part of a survey at a time.

The documents of a large corpus are assigned at random to a fixed number of units, each of whole
documents. So memory does not grow with the corpus, and units stay independent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schema import Survey, Table
from .finding import NotApplicableError
from .intervals import Floats

Part = Mapping[str, NDArray[Any]]
MOST = 1024  # most units of all corpora together


@dataclass(frozen=True, eq=False)
class Units:
    """Assignment of N documents to U units."""

    corpora: list[str]
    corpus: NDArray[np.int64]  # [U] index into corpora
    documents: NDArray[np.int64]  # [N] ascending
    unit: NDArray[np.int64]  # [N] the unit of each document

    def __len__(self) -> int:
        return len(self.corpus)

    def parts(self, table: Table, *columns: str) -> Iterator[tuple[NDArray[np.int64], Part]]:
        """The unit of each row and the columns, for each part of a table; these documents only."""
        for part in table.parts("document", *columns):
            at = np.searchsorted(self.documents, part["document"]).clip(max=len(self.unit) - 1)
            mine = self.documents[at] == part["document"]
            if mine.all():
                yield self.unit[at], part
            else:
                yield self.unit[at[mine]], {name: x[mine] for name, x in part.items()}

    def sum(
        self,
        table: Table,
        columns: list[str],
        values: Callable[[Part], Mapping[str, NDArray[Any]]],
    ) -> dict[str, Floats]:
        """Sums [U, ...] over the rows of each unit. values: maps a part's columns to terms."""
        sums: dict[str, Floats] = {}
        for unit, part in self.parts(table, *columns):
            for name, x in values(part).items():
                total = sums.setdefault(name, np.zeros((len(self), *x.shape[1:])))
                add(total, unit, x)
        return sums


def add(total: Floats, index: NDArray[np.int64], values: NDArray[Any]) -> None:
    """total[index[i]] += values[i], fast if many rows share an index."""
    if len(index) == 0:
        return
    order = index.argsort(kind="stable")
    there, starts = np.unique(index[order], return_index=True)
    total[there] += np.add.reduceat(values[order].astype(np.float64), starts, axis=0)


def units_of(
    survey: Survey, corpora: Collection[str] | None = None, *, seed: int = 0, most: int = MOST
) -> Units:
    """Units of a survey's documents, from all corpora or some.

    Raises ValueError for a corpus that the survey does not have, and NotApplicableError without
    documents.
    """
    found: dict[int, str] = {}
    for part in survey.predictions.parts("document", "corpus"):
        documents, first = np.unique(part["document"], return_index=True)
        found.update(zip(documents.tolist(), part["corpus"][first].tolist(), strict=True))
    if not found or (corpora is not None and not corpora):
        raise NotApplicableError(f"{survey.path}: holds no predictions")
    there = sorted(set(found.values()))
    if corpora is not None:
        unknown = sorted(set(corpora) - set(there))
        if unknown:
            names = ", ".join(map(repr, there))
            raise ValueError(f"corpora: the survey has no corpus {unknown[0]!r}; it has {names}")
        found = {i: name for i, name in found.items() if name in corpora}
        there = sorted(set(corpora))
    documents = np.array(sorted(found), dtype=np.int64)
    named = np.array([found[i] for i in documents.tolist()], dtype=object)
    each = max(2, most // len(there))
    rng = np.random.default_rng(seed)
    unit = np.zeros(len(documents), dtype=np.int64)
    corpus: list[int] = []
    for i, name in enumerate(there):
        rows = (named == name).nonzero()[0]
        dealt = np.arange(len(rows))
        if len(rows) > each:
            dealt = rng.permutation(len(rows)) % each
        unit[rows] = len(corpus) + dealt
        corpus += [i] * min(len(rows), each)
    return Units(there, np.array(corpus, dtype=np.int64), documents, unit)


def threshold_index(survey: Survey, threshold: float | None) -> int:
    """Index of a threshold; default: the one nearest to 0.04, as a ratio.

    Raises ValueError for one that the survey does not have.
    """
    if threshold is None:
        return int(np.abs(np.log(np.maximum(survey.thresholds, 1e-9)) - np.log(0.04)).argmin())
    near = np.isclose(survey.thresholds, threshold, rtol=1e-9, atol=0)
    if not near.any():
        there = ", ".join(f"{x:g}" for x in survey.thresholds)
        raise ValueError(f"threshold: expected one of {there}, got {threshold:g}")
    return int(near.argmax())
