"""Two graphs compared node by node: two prompts, or two models of one shape.

The tokens of both texts are put into common *columns*. A node is then (layer, kind, column). An
edge of either graph has a weight in both. The weight is 0 in a graph without the edge: there it is
not above the threshold, or its target was not reached.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..arguments import as_index, check_count, listed, shown
from ..errors import needing
from ..graph.data import GraphData
from ..graph.tables import EdgeKind, EdgeTable, HeadEdgeTable

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd


class Column(NamedTuple):
    """A pair of corresponding positions; None where a text has no such token."""

    first: int | None
    second: int | None


class EdgeDifferences(NamedTuple):
    """The edges of either graph, in order of layer, kind, target, source."""

    layer: Tensor  # [E] int64
    kind: Tensor  # [E] int64, an EdgeKind
    target: Tensor  # [E] int64, a column
    source: Tensor  # [E] int64, a column
    first: Tensor  # [E] float32, weight in the first graph
    second: Tensor  # [E] float32, weight in the second


class HeadDifferences(NamedTuple):
    """Each head's share of the attention edges, in order of layer, head, target, source."""

    layer: Tensor  # [M] int64
    head: Tensor  # [M] int64
    target: Tensor  # [M] int64, a column
    source: Tensor  # [M] int64, a column
    first: Tensor  # [M] float32
    second: Tensor  # [M] float32


class Change(NamedTuple):
    """One edge whose weight differs."""

    layer: int
    kind: EdgeKind
    target: int  # a column
    source: int  # a column
    first: float
    second: float


@dataclass(frozen=True, eq=False)
class GraphDifference:
    """The differences of two graphs; tensors on the CPU."""

    first: GraphData
    second: GraphData
    columns: list[Column]
    edges: EdgeDifferences
    head_edges: HeadDifferences

    def __repr__(self) -> str:
        one, two = (int((x > 0).sum()) for x in (self.edges.first, self.edges.second))
        both = one + two - len(self.edges.layer)
        return (
            f"GraphDifference({one} edges and {two}, {both} in both, {len(self.columns)} columns)"
        )

    @property
    def tokens(self) -> list[tuple[str | None, str | None]]:
        """Each column's token in both texts."""
        return [
            (
                None if column.first is None else self.first.tokens[column.first],
                None if column.second is None else self.second.tokens[column.second],
            )
            for column in self.columns
        ]

    def token_importance(self) -> Tensor:
        """[C, 2] float32: importance of each column in both graphs; 0 where a text lacks it."""
        out = torch.zeros(len(self.columns), 2)
        for i, graph in enumerate((self.first, self.second)):
            importance = graph.token_importance()
            for c, column in enumerate(self.columns):
                if (position := column[i]) is not None:
                    out[c, i] = importance[position]
        return out

    def head_importance(self) -> Tensor:
        """[L, H] float32: head importance in the second graph minus that in the first."""
        return self.second.head_importance() - self.first.head_importance()

    def ffn_importance(self) -> Tensor:
        """[L] float32: FFN importance in the second graph minus that in the first."""
        return self.second.ffn_importance() - self.first.ffn_importance()

    def top_changes(self, k: int = 10) -> list[Change]:
        """The k edges whose weights differ most, the largest difference first."""
        k = check_count("k", k)
        size = (self.edges.second - self.edges.first).abs()
        found = []
        for i in size.argsort(descending=True, stable=True)[:k].tolist():
            if size[i] > 0:
                layer, kind, target, source = (int(column[i]) for column in self.edges[:4])
                weights = float(self.edges.first[i]), float(self.edges.second[i])
                found.append(Change(layer, EdgeKind(kind), target, source, *weights))
        return found

    def to_pandas(self) -> pd.DataFrame:
        """One row per edge: layer, kind, columns and tokens, both weights, difference."""
        with needing("to_pandas", "pandas", "pip install 'ifr-fast[tables]'"):
            import pandas as pd
        tokens = self.tokens
        layer, kind, target, source, first, second = (x.tolist() for x in self.edges)
        return pd.DataFrame(
            {
                "layer": layer,
                "kind": [EdgeKind(k).name.lower() for k in kind],
                "target": target,
                "source": source,
                "target_first": [tokens[i][0] for i in target],
                "target_second": [tokens[i][1] for i in target],
                "source_first": [tokens[i][0] for i in source],
                "source_second": [tokens[i][1] for i in source],
                "first": first,
                "second": second,
                "difference": (self.edges.second - self.edges.first).tolist(),
            }
        )

    def to_networkx(self) -> nx.MultiDiGraph:
        """The union of both graphs; nodes are named kind_layer_column.

        The attributes `first` and `second` hold a node's token in each graph (missing in a graph
        without the node), and an edge's weight in each graph. An edge also has `difference`. The
        graph's `columns`, the positions in both texts, are JSON.
        """
        from ..export.networkx import to_networkx

        out: nx.MultiDiGraph | None = None
        for i, (name, graph) in enumerate((("first", self.first), ("second", self.second))):
            place = _places(self.columns, i).tolist()
            single = to_networkx(graph)
            if out is None:
                out = single.__class__(columns=json.dumps(self.columns))
            node_of: dict[str, str] = {}
            for node, data in single.nodes(data=True):
                kind, layer, column = data["kind"], data["layer"], place[data["position"]]
                node_of[node] = joint = f"{kind}_{layer}_{column}"
                if joint not in out:
                    out.add_node(joint, kind=kind, layer=layer, column=column)
                out.nodes[joint][name] = data["token"]
            for source, target, data in single.edges(data=True):
                ends, kind = (node_of[source], node_of[target]), data["kind"]
                if not out.has_edge(*ends, key=kind):
                    out.add_edge(
                        *ends, key=kind, kind=kind, layer=data["layer"], first=0.0, second=0.0
                    )
                out.edges[(*ends, kind)][name] = data["weight"]
        assert out is not None
        for _, _, data in out.edges(data=True):
            data["difference"] = data["second"] - data["first"]
        return out


def compare(
    first: GraphData, second: GraphData, positions: Iterable[tuple[int, int]] | None
) -> GraphDifference:
    """The difference of two graphs of models with equally many layers and heads.

    positions: pairs of corresponding positions in the first and the second text, both ascending.
    Default: token by token in texts of equal length, in others by matching tokens.
    """
    if not isinstance(second, GraphData):
        raise ValueError(f"other: expected a RouteGraph, got {type(second).__name__}")
    shapes = [
        (g.n_layers, g.n_heads, g.parallel.tolist(), g.source_layers) for g in (first, second)
    ]
    if shapes[0] != shapes[1]:
        (l0, h0, *_), (l1, h1, *_) = shapes
        raise ValueError(
            "other: expected a graph of a model with the same layers and heads, got "
            f"{l1} layers of {h1} heads beside {l0} of {h0}"
            + (" and other kinds of blocks" if (l0, h0) == (l1, h1) else "")
        )
    pairs = _matched(first.tokens, second.tokens) if positions is None else _pairs(positions)
    columns = _columns(pairs, len(first.tokens), len(second.tokens))
    places = [_places(columns, i) for i in range(2)]
    edges = _joined([first.edges, second.edges], places)
    heads = _joined([first.head_edges, second.head_edges], places)
    return GraphDifference(first, second, columns, EdgeDifferences(*edges), HeadDifferences(*heads))


def _pairs(positions: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs that a caller gives, as ints."""
    pairs = []
    for pair in listed("positions", positions):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"positions: expected pairs of positions, got {shown(pair)}")
        i, j = (as_index("positions", x) for x in pair)
        pairs.append((i, j))
    return pairs


def _matched(first: list[str], second: list[str]) -> list[tuple[int, int]]:
    """Pairs of corresponding positions."""
    if len(first) == len(second):
        return [(i, i) for i in range(len(first))]
    pairs = []
    matcher = SequenceMatcher(a=first, b=second, autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal" or i_end - i == j_end - j:
            pairs += list(zip(range(i, i_end), range(j, j_end), strict=True))
    return pairs


def _columns(pairs: list[tuple[int, int]], n_first: int, n_second: int) -> list[Column]:
    """The columns of both texts, in order; a position that is in no pair has its own column."""
    found: list[Column] = []
    next_first = next_second = 0
    for i, j in [*pairs, (n_first, n_second)]:
        if not (next_first <= i <= n_first and next_second <= j <= n_second):
            raise ValueError(
                f"positions: expected pairs below ({n_first}, {n_second}), both ascending, "
                f"got {(i, j)}"
            )
        found += [Column(p, None) for p in range(next_first, i)]
        found += [Column(None, p) for p in range(next_second, j)]
        found.append(Column(i, j))
        next_first, next_second = i + 1, j + 1
    return found[:-1]


def _places(columns: list[Column], which: int) -> Tensor:
    """The column of each position of one text, [T]."""
    return torch.tensor([c for c, column in enumerate(columns) if column[which] is not None])


def _joined(tables: list[EdgeTable] | list[HeadEdgeTable], places: list[Tensor]) -> list[Tensor]:
    """The union of the rows of two tables, with columns for positions, and both weights."""
    rows = []
    for table, place in zip(tables, places, strict=True):
        layer, which, target, source, _ = table
        rows.append(torch.stack([layer, which, place[target], place[source]]))
    keys, inverse = torch.unique(torch.cat(rows, dim=1), dim=1, return_inverse=True)
    weights = torch.zeros(2, keys.shape[1])
    ends = rows[0].shape[1]
    weights[0, inverse[:ends]] = tables[0].weight
    weights[1, inverse[ends:]] = tables[1].weight
    return [*keys, *weights]
