"""Scored nodes (layer, position), and the edges that each adds to a graph that reaches it.

A scored node's edges never change. So the graphs of a growing text are assembled from the same
nodes: the edge lists of all nodes that a graph reaches, end to end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..graph.growth import edges_into
from ..graph.tables import EdgeKind, Granularity, LayerTable, Node, NodeKind

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


class _Growing:
    """An array that grows at its end."""

    def __init__(self, *shape: int, dtype: type[np.generic]) -> None:
        self._room = np.empty((1024, *shape), dtype)
        self._n = 0

    def extend(self, rows: np.ndarray[Any, Any]) -> None:
        end = self._n + len(rows)
        if end > len(self._room):
            grown = np.empty((2 * end, *self._room.shape[1:]), self._room.dtype)
            grown[: self._n] = self.all
            self._room = grown
        self._room[self._n : end] = rows
        self._n = end

    @property
    def all(self) -> Any:
        return self._room[: self._n]


class Lists:
    """Lists [n, 5] of float64 end to end, one for each node."""

    def __init__(self) -> None:
        self._rows = _Growing(5, dtype=np.float64)
        self._ends = _Growing(dtype=np.int64)
        self._ends.extend(np.zeros(1))

    def extend(self, rows: Floats, ends: Ints) -> None:
        """Appends lists, end to end; ends: the row at which each ends."""
        self._ends.extend(ends + self._ends.all[-1])
        self._rows.extend(rows)

    def of(self, nodes: Ints) -> Floats:
        """The lists of `nodes`, end to end."""
        ends = self._ends.all
        begins = ends[nodes]
        counts = ends[nodes + 1] - begins
        shift = begins - counts.cumsum() + counts
        rows: Floats = self._rows.all[np.arange(counts.sum()) + shift.repeat(counts)]
        return rows


class Nodes:
    """All scored nodes of a text, at one threshold."""

    def __init__(self, n_layers: int, threshold: float, granularity: Granularity) -> None:
        self._threshold, self._granularity = threshold, granularity
        self.at: list[dict[int, int]] = [{} for _ in range(n_layers)]  # position -> node
        self.below: list[list[int]] = []  # positions that each node reaches one layer below
        self.read: list[list[int]] = []  # positions that its attention reads
        self._flagged: dict[int, list[Node]] = {}
        self.edges = Lists()  # an EdgeTable's columns
        self.heads = Lists()  # a HeadEdgeTable's columns

    def flags(self, nodes: list[int]) -> list[Node]:
        """The unattributed nodes among `nodes`."""
        of = self._flagged
        return [node for i in nodes if i in of for node in of[i]] if of else []

    def add(self, table: LayerTable, layers: list[int], positions: list[int]) -> None:
        """Makes nodes of the rows [N] of a table, in one layer or in several. layers, positions:
        [N], used in place of the table's own; the sources of the table's edges are positions.
        """
        n, first = len(layers), len(self.below)
        everywhere: Any = np.ones(n, bool)
        of_rows = _arrays(table)._replace(rows=np.arange(n))
        # The result holds arrays, like the table; its targets are rows.
        grown: Any = edges_into(0, of_rows, everywhere, self._threshold, self._granularity)
        *own, attention = grown.steps  # the sources of `own` are at the node's own position
        layer_of, position_of = np.array(layers), np.array(positions)
        node, weight, kept = (
            np.concatenate([getattr(step, name) for step in grown.steps])
            for name in ("target", "weight", "kept")
        )
        source = np.concatenate([*[position_of] * len(own), attention.source])
        kind = np.repeat([int(x.kind) for x in grown.steps], [len(x.kept) for x in grown.steps])
        (at,) = kept.nonzero()
        at = at[node[at].argsort(kind="stable")]
        node, kind, source, weight = node[at], kind[at], source[at], weight[at]
        self.edges.extend(
            _rows(layer_of[node], kind, position_of[node], source, weight), _ends(node, n)
        )
        read = kind == EdgeKind.ATTENTION
        below = ~read if table.ffn_residual is None else kind == EdgeKind.RESIDUAL_MID
        for lists, chosen in ((self.read, read), (self.below, below)):
            positions_of, begin = source[chosen].tolist(), 0
            for end in _ends(node[chosen], n).tolist():
                lists.append(positions_of[begin:end])
                begin = end

        entry, head = grown.head_kept.nonzero()
        entry, head = (x[attention.target[entry].argsort(kind="stable")] for x in (entry, head))
        node, source = attention.target[entry], attention.source[entry]
        weight = grown.head_weight[entry, head]
        self.heads.extend(
            _rows(layer_of[node], head, position_of[node], source, weight), _ends(node, n)
        )
        for is_mid, _, flags in grown.unattributed:
            place = NodeKind.MID if is_mid else NodeKind.POST
            for i in flags.nonzero()[0].tolist():
                flagged = Node(layers[i], place, positions[i])
                self._flagged.setdefault(first + i, []).append(flagged)
        for i, (layer, position) in enumerate(zip(layers, positions, strict=True)):
            self.at[layer][position] = first + i


def _rows(*columns: np.ndarray[Any, Any]) -> Floats:
    rows = np.empty((len(columns[0]), len(columns)))
    for i, column in enumerate(columns):
        rows[:, i] = column
    return rows


def _ends(node: Ints, n: int) -> Ints:
    """The end [n] of each node's entries, when entries are in order of nodes."""
    return np.bincount(node, minlength=n).cumsum()


def _arrays(x: Any) -> Any:
    """A table with numpy arrays in place of tensors; floating tensors become float32."""
    if isinstance(x, int):
        return x
    if isinstance(x, Tensor):
        return (x.float() if x.is_floating_point() else x).cpu().numpy()
    return x if x is None else type(x)._make(map(_arrays, x))
