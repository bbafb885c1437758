"""Nodes (layer, position) that have been scored, and what each adds to a graph that reaches it.

What a node is made of never changes once it is scored, so graphs of a text that grows are gathered
from the same nodes: the lists of those that a graph reaches, end to end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .graph import EdgeKind, Granularity, LayerTable, Node, NodeKind, grow_layer

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


class _Growing:
    """An array that is added to at its end."""

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
        """More lists, end to end, and where each ends."""
        self._ends.extend(ends + self._ends.all[-1])
        self._rows.extend(rows)

    def of(self, nodes: Ints) -> Floats:
        """The lists of some nodes, end to end."""
        ends = self._ends.all
        begins = ends[nodes]
        counts = ends[nodes + 1] - begins
        shift = begins - counts.cumsum() + counts
        rows: Floats = self._rows.all[np.arange(counts.sum()) + shift.repeat(counts)]
        return rows


class Nodes:
    """All nodes known of a text, at one threshold."""

    def __init__(self, n_layers: int, threshold: float, granularity: Granularity) -> None:
        self._threshold, self._granularity = threshold, granularity
        self.at: list[dict[int, int]] = [{} for _ in range(n_layers)]  # position -> node
        self.below: list[list[int]] = []  # positions of the layer below that a node leads to
        self._flagged: dict[int, list[Node]] = {}
        self.edges = Lists()  # an EdgeTable's columns
        self.heads = Lists()  # a HeadEdgeTable's columns

    def flags(self, nodes: list[int]) -> list[Node]:
        """Unattributed ones among some nodes."""
        of = self._flagged
        return [node for i in nodes if i in of for node in of[i]] if of else []

    def add(self, table: LayerTable, layers: list[int], positions: list[int]) -> None:
        """Makes nodes of the rows [N] of a table. layers, positions: [N], where they stand.

        The table's rows are numbered from 0; its edges' sources are positions.
        """
        n, first = len(layers), len(self.below)
        n_positions = max(n, 1 + max(positions))
        reached = torch.ones(n_positions, dtype=torch.bool, device=table.rows.device)
        grown, _ = grow_layer(0, table, reached, self._threshold, self._granularity)
        *own, attention = grown.steps  # those at the node's own position, and the others
        layer_of, position_of = np.array(layers), np.array(positions)

        def column(own_values: list[Tensor], of_attention: Tensor) -> Any:
            return _numpy(torch.cat([*own_values, of_attention]))

        node = column([x.target for x in own], attention.target)
        source = np.concatenate([np.tile(position_of, len(own)), _numpy(attention.source)])
        weight = column([x.weight.float() for x in own], attention.weight.float())
        sizes = [n] * len(own) + [len(node) - n * len(own)]
        kind = np.repeat([int(x.kind) for x in grown.steps], sizes)
        kept = column([x.kept for x in own], attention.kept).nonzero()[0]
        kept = kept[node[kept].argsort(kind="stable")]
        node, kind, source, weight = (x[kept] for x in (node, kind, source, weight))
        self.edges.extend(
            _rows(layer_of[node], kind, position_of[node], source, weight), _ends(node, n)
        )
        leads = (kind == EdgeKind.ATTENTION) | (kind == EdgeKind.RESIDUAL_MID)
        if table.ffn_residual is None:
            leads[:] = True
        below, begin = source[leads].tolist(), 0
        for end in _ends(node[leads], n).tolist():
            self.below.append(below[begin:end])
            begin = end

        entry, head = (_numpy(x) for x in grown.head_kept.nonzero(as_tuple=True))
        node, source = (_numpy(x)[entry] for x in (attention.target, attention.source))
        weight = _numpy(grown.head_weight.float())[entry, head]
        order = node.argsort(kind="stable")
        node = node[order]
        self.heads.extend(
            _rows(layer_of[node], head[order], position_of[node], source[order], weight[order]),
            _ends(node, n),
        )
        for is_mid, _, flags in grown.unattributed:
            place = NodeKind.MID if is_mid else NodeKind.POST
            for i in _numpy(flags).nonzero()[0].tolist():
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
    """Where each of `n` nodes' entries end, in order of nodes."""
    return np.bincount(node, minlength=n).cumsum()


def _numpy(x: Tensor) -> np.ndarray[Any, Any]:
    return x.cpu().numpy()
