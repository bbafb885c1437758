"""RouteGraph, one prediction's routes, and Routes, those of every position of a text.

The graph of a prediction at position t is grown from the node (last layer, post, t) downwards:
an edge is kept where its importance exceeds the threshold and its target has been reached. The
nodes are (layer, kind, position); `resid_pre` of a layer is `post` of the one below, or `embed`.
The graph of a span of predictions is grown from all of their nodes at once: since an edge's weight
depends on its target alone, it is the union of their graphs, and what flows in it is their
mean by the span's weights.
In a sequential block an edge leads

    post <- mid   RESIDUAL_POST, and FFN, whose block reads `mid` at the same position
    mid  <- pre   RESIDUAL_MID at the same position, ATTENTION from any visible one

and in a parallel block all of RESIDUAL_POST, FFN and ATTENTION lead from pre straight into post.
A path's weight is the product of its edges'. Tables are equal-length 1-D tensors.
"""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from functools import cached_property
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from .errors import FormatError
from .kernels.contract import EdgeList
from .storage import load_tensors, save_tensors

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd
    import pyarrow as pa
    from matplotlib.figure import Figure

    from .comparison import GraphDifference
    from .export.tables import TableName
    from .reach import Reach

Granularity = Literal["token", "head"]

_AGGREGATE_ELEMENTS = 1 << 24  # of [T, P] when P predictions are walked at once


class EdgeKind(IntEnum):
    """The operation that carried the information."""

    ATTENTION = 0
    RESIDUAL_MID = 1
    FFN = 2
    RESIDUAL_POST = 3


class NodeKind(StrEnum):
    """Where in a layer a node stands."""

    EMBED = "embed"
    MID = "mid"
    FFN = "ffn"
    POST = "post"


class EdgeTable(NamedTuple):
    """Edges, by layer, kind, target, source."""

    layer: Tensor  # [E] int64
    kind: Tensor  # [E] int64, an EdgeKind
    target: Tensor  # [E] int64, token position
    source: Tensor  # [E] int64, token position
    weight: Tensor  # [E] float32, importance of the part in its target


class HeadEdgeTable(NamedTuple):
    """Each head's share of the attention edges, by layer, target, source, head."""

    layer: Tensor  # [M] int64
    head: Tensor  # [M] int64
    target: Tensor  # [M] int64
    source: Tensor  # [M] int64
    weight: Tensor  # [M] float32


class Node(NamedTuple):
    """One token representation."""

    layer: int
    kind: NodeKind
    position: int


class Prediction(NamedTuple):
    """A candidate for the next token."""

    token: str
    token_id: int
    probability: float


class Span(NamedTuple):
    """Positions whose predictions are explained together."""

    positions: list[int]  # two or more, ascending
    weights: list[float]  # of each position's prediction; they sum to 1
    predictions: list[list[Prediction]]  # of each position, most probable first


class Step(NamedTuple):
    """One edge of a path."""

    layer: int
    kind: EdgeKind
    target: int
    source: int
    weight: float


class WeightedPath(NamedTuple):
    """A path from the prediction down to a token's embedding."""

    weight: float  # product of its steps' weights
    steps: list[Step]  # top-down


class Hop(NamedTuple):
    """One change of position on a route."""

    layer: int
    target: int
    source: int
    weight: float  # of the attention edge
    heads: list[tuple[int, float]]  # (head, weight), strongest first


class Route(NamedTuple):
    """All paths that change position at the same edges, taken together."""

    weight: float  # sum of the paths' weights
    source: int  # the token it starts at
    hops: list[Hop]  # top-down


class LayerTable(NamedTuple):
    """What the graph needs of one layer's scores: R rows, weights above `threshold` or more."""

    rows: Tensor  # [R] int64, on the graph's device
    residual: Tensor  # [R]
    ffn: Tensor  # [R]
    ffn_residual: Tensor | None  # [R]; None in a parallel block
    edges: EdgeList
    unattributed: Tensor  # [R] bool
    ffn_unattributed: Tensor | None  # [R] bool


class Steps(NamedTuple):
    """Edges of one kind into some of a layer's nodes, as many as the kernel listed."""

    kind: EdgeKind
    target: Tensor  # [N]
    source: Tensor  # [N]
    weight: Tensor  # [N]
    kept: Tensor  # [N] bool


class NodeImportance(NamedTuple):
    """Weight of all paths between a graph's predictions, or a token, and each node."""

    embed: Tensor  # [T] float32
    mid: Tensor  # [L, T] float32; in a parallel block what `post` has
    post: Tensor  # [L, T] float32


class Grown(NamedTuple):
    """One layer of a graph, with flags that say which of its edges and nodes it has."""

    layer: int
    steps: list[Steps]  # attention last
    head_weight: Tensor  # [E, H] of the attention edges
    head_kept: Tensor  # [E, H] bool
    unattributed: list[tuple[bool, Tensor, Tensor]]  # whether `mid` (else `post`), [R], bool [R]


def grow_layer(
    layer: int,
    table: LayerTable,
    reached: Tensor,
    threshold: float,
    granularity: Granularity,
) -> tuple[Grown, Tensor]:
    """One step down: the edges into the `reached` [T] bool posts of a layer.

    Returns them, and which positions' `resid_pre` [T] bool they reach. No value is read by the
    host: sizes depend on shapes alone.
    """
    grown = edges_into(layer, table, reached[table.rows], threshold, granularity)
    *own, attention = grown.steps
    leads_to_pre = torch.zeros(len(reached), dtype=torch.int32, device=table.rows.device)
    leads_to_pre.index_add_(0, attention.source, attention.kept.int())
    passes = own[-1].kept
    if table.ffn_residual is None:
        passes = passes | own[0].kept
    leads_to_pre.index_add_(0, table.rows, passes.int())
    return grown, leads_to_pre > 0


def edges_into(
    layer: int, table: LayerTable, post: Tensor, threshold: float, granularity: Granularity
) -> Grown:
    """The edges into those posts of a table that are reached, by `post` [R] bool.

    All of the table may be numpy arrays: it is done with what these and tensors have in common.
    """
    rows, (row, source, edge_weight, head_weight) = table.rows, table.edges
    ffn_kept = post & (table.ffn > threshold)
    steps = [Steps(EdgeKind.FFN, rows, rows, table.ffn, ffn_kept)]
    if table.ffn_residual is None:
        mid, mid_kind = post, EdgeKind.RESIDUAL_POST
        unattributed = [(False, rows, post & table.unattributed)]
    else:
        residual_kept = post & (table.ffn_residual > threshold)
        steps.append(Steps(EdgeKind.RESIDUAL_POST, rows, rows, table.ffn_residual, residual_kept))
        mid, mid_kind = ffn_kept | residual_kept, EdgeKind.RESIDUAL_MID
        assert table.ffn_unattributed is not None
        unattributed = [
            (False, rows, post & table.ffn_unattributed),
            (True, rows, mid & table.unattributed),
        ]
    passes = mid & (table.residual > threshold)
    steps.append(Steps(mid_kind, rows, rows, table.residual, passes))

    if granularity == "head":
        head_kept = head_weight > threshold
        edge_weight = (head_weight * head_kept).sum(-1)
    else:
        head_kept = head_weight > 0
    attention_kept = (edge_weight > threshold) & mid[row]
    steps.append(Steps(EdgeKind.ATTENTION, rows[row], source, edge_weight, attention_kept))

    head_kept = head_kept & attention_kept[:, None]
    return Grown(layer, steps, head_weight, head_kept, unattributed)


def assemble(grown: list[Grown], parallel: list[bool], **fields: Any) -> RouteGraph:
    """The RouteGraph of all layers' edges, on the CPU, in canonical order; one read by the host."""
    tables = _columns(grown)
    flat = torch.cat([table.flatten() for table in tables]).cpu()
    with torch.inference_mode(False):
        edges, heads, flagged = (
            columns.view(table.shape)[:-1, columns.view(table.shape)[-1] > 0]
            for columns, table in zip(flat.split([t.numel() for t in tables]), tables, strict=True)
        )
    kinds = (NodeKind.POST, NodeKind.MID)
    nodes_flagged = [
        Node(int(layer), kinds[int(mid)], int(position))
        for layer, mid, position in flagged.T.tolist()
    ]
    return in_order(edges, heads, nodes_flagged, parallel, **fields)


def in_order(
    edges: Tensor, heads: Tensor, unattributed: list[Node], parallel: list[bool], **fields: Any
) -> RouteGraph:
    """The RouteGraph of edges and heads' edges in any order, as [5, E] and [5, M] float64 on the
    CPU: the columns of their tables.
    """
    with torch.inference_mode(False):
        # By layer, then kind, target, source; by layer, then target, source, head.
        return RouteGraph(
            edges=EdgeTable._make(_sorted(edges, (0, 1, 2, 3))),
            head_edges=HeadEdgeTable._make(_sorted(heads, (0, 2, 3, 1))),
            unattributed=sorted(unattributed),
            parallel=torch.tensor(parallel),
            **fields,
        )


def _columns(grown: list[Grown]) -> list[Tensor]:
    """Edges, head edges and unattributed nodes, [columns, N] each, on the graph's device; the last
    column of each is the flags. Sizes depend on shapes alone.
    """
    H = grown[0].head_weight.shape[1]
    steps = [(g.layer, step) for g in grown for step in g.steps]
    attention = [(g.layer, g.steps[-1]) for g in grown]
    nodes = [(g.layer, *node) for g in grown for node in g.unattributed]

    def each(values: Iterable[int], of: list[Tensor]) -> Tensor:
        """A column that holds one value for all rows of each of some tables."""
        sizes = torch.tensor([len(x) for x in of])
        n = sum(map(len, of))
        column = torch.tensor(list(values)).repeat_interleave(sizes, output_size=n)
        return column.to(of[0].device)

    kept = [step.kept for _, step in steps]
    attention_kept = [step.kept for _, step in attention]
    node_kept = [flag for *_, flag in nodes]
    return [
        _pack(
            each((layer for layer, _ in steps), kept),
            each((step.kind for _, step in steps), kept),
            torch.cat([step.target for _, step in steps]),
            torch.cat([step.source for _, step in steps]),
            torch.cat([step.weight.float() for _, step in steps]),
            torch.cat(kept),
        ),
        _pack(
            each((layer for layer, _ in attention), attention_kept).repeat_interleave(H),
            torch.arange(H, device=kept[0].device).repeat(sum(map(len, attention_kept))),
            torch.cat([step.target for _, step in attention]).repeat_interleave(H),
            torch.cat([step.source for _, step in attention]).repeat_interleave(H),
            torch.cat([g.head_weight for g in grown]).float().flatten(),
            torch.cat([g.head_kept for g in grown]).flatten(),
        ),
        _pack(
            each((layer for layer, *_ in nodes), node_kept),
            each((mid for _, mid, *_ in nodes), node_kept),
            torch.cat([rows for _, _, rows, _ in nodes]),
            torch.cat(node_kept),
        ),
    ]


def _pack(*columns: Tensor) -> Tensor:
    """Columns as rows of one float64 matrix, exact for positions and float32 weights."""
    return torch.stack([column.double() for column in columns])


def _sorted(table: Tensor, keys: tuple[int, ...]) -> list[Tensor]:
    """The columns [5, N] of a table, four of whole numbers and one of weights, by some of the
    former, the first of `keys` first.
    """
    columns = table.numpy()
    whole = columns[:4].astype(np.int64)
    # Layers, kinds or heads, and two positions of at most 2^24 fit into 63 bits.
    packed = np.zeros(whole.shape[1], dtype=np.int64)
    for column in whole[list(keys)]:
        packed = packed * (column.max(initial=0) + 1) + column
    order = packed.argsort()
    weights = columns[4, order].astype(np.float32)
    # take: a copy whose rows are contiguous, which an index does not promise.
    return [torch.from_numpy(column) for column in (*whole.take(order, axis=1), weights)]


@dataclass(frozen=True, eq=False)
class RouteGraph:
    """The information flow routes of one prediction (paper section 2); tensors on the CPU."""

    tokens: list[str]
    token_ids: Tensor  # [T] int64
    position: int  # whose next-token prediction is explained
    threshold: float
    granularity: Granularity
    n_layers: int
    n_heads: int
    predictions: list[Prediction]  # most probable first
    edges: EdgeTable
    head_edges: HeadEdgeTable
    unattributed: list[Node]  # whose parts all have proximity 0 and got 1/n each
    parallel: Tensor  # [L] bool: blocks with attention and FFN side by side
    span: Span | None = None  # of several positions; `position`, `predictions` are its last's

    _FORMAT = "ifr_fast.route_graph"
    _VERSION = 2
    _OLDEST = 1  # which knew no spans

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", _normal(self.token_ids))

    def __repr__(self) -> str:
        top = f" -> {self.predictions[0].token!r}" if self.predictions else ""
        where = f"position {self.position}{top}"
        if self.span is not None:
            first, *_, last = self.span.positions
            where = f"{len(self.span.positions)} positions from {first} to {last}"
        return (
            f"RouteGraph({len(self.tokens)} tokens, {where}, "
            f"threshold {self.threshold:g}, {len(self.edges.layer)} edges)"
        )

    @property
    def starts(self) -> dict[int, float]:
        """The positions that are explained, ascending, and the weight of each; 1 where single."""
        if self.span is None:
            return {self.position: 1.0}
        return dict(zip(self.span.positions, self.span.weights, strict=True))

    @cached_property
    def _layer_edges(self) -> list[EdgeTable]:
        bounds = torch.searchsorted(self.edges.layer, torch.arange(self.n_layers + 1)).tolist()
        return [EdgeTable(*(column[a:b] for column in self.edges)) for a, b in pairwise(bounds)]

    @cached_property
    def _flow(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight of all paths from the prediction to each post, mid [L, T] and embed [T], float64.

        In a span, those from each prediction count as much as it weighs.
        In a parallel block mid stands for post, which is what attention leads into there.
        """
        T = len(self.tokens)
        flow = torch.zeros(T, dtype=torch.float64)
        for position, weight in self.starts.items():
            flow[position] = weight
        posts, mids = [], []
        for layer in reversed(range(self.n_layers)):
            posts.append(flow)
            for step in self.steps(layer):
                mids.append(flow)
                carried = flow[step.target] * step.weight.double()
                flow = torch.zeros_like(flow).index_add_(0, step.source, carried)
            if not self.parallel[layer]:
                mids.pop(-2)
        return torch.stack(posts[::-1]), torch.stack(mids[::-1]), flow

    def steps(self, layer: int) -> list[EdgeTable]:
        """A layer's edges in the order in which a path takes them: one step, or post then mid."""
        edges = self._layer_edges[layer]
        if self.parallel[layer]:
            return [edges]
        into_post = (edges.kind == EdgeKind.FFN) | (edges.kind == EdgeKind.RESIDUAL_POST)
        return [
            EdgeTable(*(c[into_post] for c in edges)),
            EdgeTable(*(c[~into_post] for c in edges)),
        ]

    def token_importance(self) -> Tensor:
        """[T] float32: weight of all paths from the prediction to each token's embedding.

        Of a span: the mean of its predictions' importances, by its weights.
        """
        return self._flow[2].float()

    def node_importance(self) -> NodeImportance:
        """Weight of all paths from the prediction to every node; 0 where there is none.

        Of a span: the mean of its predictions', by its weights.
        """
        post, mid, embed = self._flow
        return NodeImportance(embed.float(), mid.float(), post.float())

    def head_importance(self) -> Tensor:
        """[L, H] float32: sum over head_edges of weight times the flow into their targets."""
        layer, head, target, _, weight = self.head_edges
        carried = self._flow[1][layer, target] * weight
        out = torch.zeros(self.n_layers * self.n_heads, dtype=torch.float64)
        out.index_add_(0, layer * self.n_heads + head, carried)
        return out.view(self.n_layers, self.n_heads).float()

    def ffn_importance(self) -> Tensor:
        """[L] float32: sum over FFN edges of weight times the flow into their targets."""
        of_ffn = self.edges.kind == EdgeKind.FFN
        layer, target = self.edges.layer[of_ffn], self.edges.target[of_ffn]
        carried = self._flow[0][layer, target] * self.edges.weight[of_ffn]
        out = torch.zeros(self.n_layers, dtype=torch.float64)
        return out.index_add_(0, layer, carried).float()

    def reach(self, source: SupportsIndex) -> Reach:
        """What a token's information reaches: the weight of all paths from its embedding up to
        each node, along this graph's edges.
        """
        from .reach import reach_in_graph

        return reach_in_graph(self, _position("source", source, len(self.tokens)))

    def routes_from(self, source: SupportsIndex) -> RouteGraph:
        """The part of this graph that one token's information takes: the edges on paths from its
        embedding to the prediction, with the weights that they have here.
        """
        from .reach import reached_in_graph

        position = _position("source", source, len(self.tokens))
        mid, post = reached_in_graph(self, position)
        embed = torch.zeros(1, len(self.tokens), dtype=torch.bool)
        embed[0, position] = True
        pre = torch.cat([embed, post[:-1]])
        below = torch.where(self.parallel[:, None], pre, mid)

        def kept(layer: Tensor, source: Tensor, into_post: Tensor) -> Tensor:
            return torch.where(into_post, below[layer, source], pre[layer, source])

        layer, kind, _, source_of, _ = self.edges
        into_post = (kind == EdgeKind.FFN) | (kind == EdgeKind.RESIDUAL_POST)
        edges = kept(layer, source_of, into_post)
        layer, _, _, source_of, _ = self.head_edges
        heads = kept(layer, source_of, torch.zeros_like(layer, dtype=torch.bool))
        of_kind = {NodeKind.MID: mid, NodeKind.POST: post}
        return dataclasses.replace(
            self,
            edges=EdgeTable(*(column[edges] for column in self.edges)),
            head_edges=HeadEdgeTable(*(column[heads] for column in self.head_edges)),
            unattributed=[n for n in self.unattributed if of_kind[n.kind][n.layer, n.position]],
        )

    def compare(
        self, other: RouteGraph, *, positions: Iterable[tuple[int, int]] | None = None
    ) -> GraphDifference:
        """How another graph differs from this one: of another prompt, or another model with as
        many layers and heads.

        positions: pairs of a position here and one there, ascending, that stand for each other.
        Default: texts of equal length token by token, others as their tokens match.
        """
        from .comparison import compare

        return compare(self, other, positions)

    def prune(self, threshold: float) -> RouteGraph:
        """The same prediction's graph at a threshold of at least the present one."""
        threshold = check_threshold(threshold)
        if threshold < self.threshold:
            raise ValueError(
                f"threshold: this graph holds edges above {self.threshold:g} only, "
                f"got {threshold:g}; trace again for a lower one"
            )
        grown = []
        T = len(self.tokens)
        reached = torch.zeros(T, dtype=torch.bool)
        reached[list(self.starts)] = True
        for layer in reversed(range(self.n_layers)):
            table = self._layer_table(layer)
            step, reached = grow_layer(layer, table, reached, threshold, self.granularity)
            grown.append(step)
        return assemble(
            grown,
            self.parallel.tolist(),
            tokens=self.tokens,
            token_ids=self.token_ids,
            position=self.position,
            threshold=threshold,
            granularity=self.granularity,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            predictions=self.predictions,
            span=self.span,
        )

    def _layer_table(self, layer: int) -> LayerTable:
        """A layer's edges, as scores of all T rows (0 where there is no edge)."""
        T = len(self.tokens)
        edges = self._layer_edges[layer]

        def of_kind(kind: EdgeKind) -> Tensor:
            mine = edges.kind == kind
            return torch.zeros(T).index_put((edges.target[mine],), edges.weight[mine])

        parallel = bool(self.parallel[layer])
        attention = edges.kind == EdgeKind.ATTENTION
        target, source = edges.target[attention], edges.source[attention]
        heads = HeadEdgeTable(*(c[self.head_edges.layer == layer] for c in self.head_edges))
        place = torch.searchsorted(target * T + source, heads.target * T + heads.source)
        head_weight = torch.zeros(len(target), self.n_heads)
        head_weight[place, heads.head] = heads.weight

        def flags(kind: NodeKind) -> Tensor:
            out = torch.zeros(T, dtype=torch.bool)
            out[[n.position for n in self.unattributed if n.layer == layer and n.kind == kind]] = (
                True
            )
            return out

        return LayerTable(
            torch.arange(T),
            of_kind(EdgeKind.RESIDUAL_POST if parallel else EdgeKind.RESIDUAL_MID),
            of_kind(EdgeKind.FFN),
            None if parallel else of_kind(EdgeKind.RESIDUAL_POST),
            EdgeList(target, source, edges.weight[attention], head_weight),
            flags(NodeKind.POST if parallel else NodeKind.MID),
            None if parallel else flags(NodeKind.POST),
        )

    def top_paths(self, k: int = 10) -> list[WeightedPath]:
        """The k heaviest paths from the prediction to an embedding, heaviest first.

        A path from a prediction of a span starts with that prediction's weight.
        """
        tables = [s for layer in reversed(range(self.n_layers)) for s in self.steps(layer)]
        weights = [table.weight.double() for table in tables]
        found = _best_paths(
            [(t.target, t.source, w) for t, w in zip(tables, weights, strict=True)],
            self.starts,
            k,
        )
        paths = []
        for weight, chosen in found:
            steps = []
            for table, i in zip(tables, chosen, strict=True):
                layer, kind, target, source = (int(column[i]) for column in table[:4])
                steps.append(Step(layer, EdgeKind(kind), target, source, float(table.weight[i])))
            paths.append(WeightedPath(weight, steps))
        return paths

    def top_routes(self, k: int = 10) -> list[Route]:
        """The k heaviest routes: paths taken together that change position at the same edges.

        Residual, FFN and self-attention edges leave the position as it is; a route's weight is
        the sum over all ways through them, times the weight of its prediction in a span.
        """
        T = len(self.tokens)
        tables = []
        for layer in reversed(range(self.n_layers)):
            steps = self.steps(layer)
            through = torch.ones(T, dtype=torch.float64)
            if len(steps) == 2:
                through = torch.zeros_like(through)
                through.index_add_(0, steps[0].target, steps[0].weight.double())
            edges = steps[-1]
            pair, inverse = torch.unique(edges.target * T + edges.source, return_inverse=True)
            summed = torch.zeros(len(pair), dtype=torch.float64)
            summed.index_add_(0, inverse, edges.weight.double())
            target = pair // T
            tables.append((target, pair % T, summed * through[target]))
        routes = []
        for weight, chosen in _best_paths(tables, self.starts, k):
            hops, source = [], 0
            for depth, i in enumerate(chosen):
                reader, source = int(tables[depth][0][i]), int(tables[depth][1][i])
                if reader != source:
                    hops.append(self._hop(self.n_layers - 1 - depth, reader, source))
            routes.append(Route(weight, source, hops))
        return routes

    def _hop(self, layer: int, target: int, source: int) -> Hop:
        table = self.head_edges
        mine = (table.layer == layer) & (table.target == target) & (table.source == source)
        weight, order = table.weight[mine].sort(descending=True, stable=True)
        heads = table.head[mine][order]
        pairs = list(zip(heads.tolist(), weight.tolist(), strict=True))
        return Hop(layer, target, source, sum(w for _, w in pairs), pairs)

    def to_json(self) -> str:
        """The graph as one JSON document; its keys are the attributes' names."""
        from .export.json import to_json

        return to_json(self)

    def to_networkx(self) -> nx.MultiDiGraph:
        """The graph in networkx, edges in the direction in which information flows."""
        from .export.networkx import to_networkx

        return to_networkx(self)

    def to_graphml(self) -> str:
        """The graph in GraphML, for Gephi, yEd, Cytoscape and others."""
        from .export.graphml import to_graphml

        return to_graphml(self)

    def to_dot(self) -> str:
        """The graph in DOT, for Graphviz."""
        from .export.dot import to_dot

        return to_dot(self)

    def to_neuronpedia(
        self, *, slug: str | None = None, scan: str = "unknown", max_links: int = 10_000
    ) -> str:
        """The graph as an attribution graph of Neuronpedia and circuit-tracer, in JSON.

        slug: the graph's name, by default made of its text. scan: the model's, as Neuronpedia
        calls it. max_links: how many links to keep at most, those that most flows through.
        """
        from .export.neuronpedia import to_neuronpedia

        return to_neuronpedia(self, slug, scan, max_links)

    def to_pandas(self, table: TableName = "edges") -> pd.DataFrame:
        """The graph's edges, a row each; or its "parts", with a row a head, or its "tokens"
        (export/tables.py).
        """
        from .export.tables import to_pandas

        return to_pandas(self, table)

    def to_arrow(self, table: TableName = "edges") -> pa.Table:
        """The same as an Arrow table, which also knows what the graph says of itself."""
        from .export.tables import to_arrow

        return to_arrow(self, table)

    def to_parquet(self, path: str | os.PathLike[str], table: TableName = "parts") -> None:
        """Writes one of the same tables to a Parquet file; "parts" holds the whole graph."""
        from .export.tables import to_parquet

        to_parquet(self, path, table)

    def to_html(self) -> str:
        """A standalone page that draws the graph; needs no network."""
        from .export.html import to_html

        return to_html(self)

    def plot(self) -> Figure:
        """The graph as a matplotlib figure."""
        from .export.plot import plot

        return plot(self)

    def _repr_html_(self) -> str:
        from .export.html import to_notebook_html

        return to_notebook_html(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves to a safetensors file; `load` gives the same graph back, bit for bit."""
        tensors = {f"edges.{k}": v for k, v in self.edges._asdict().items()}
        tensors |= {f"head_edges.{k}": v for k, v in self.head_edges._asdict().items()}
        tensors |= {"token_ids": self.token_ids, "parallel": self.parallel}
        fields = {
            "tokens": self.tokens,
            "position": self.position,
            "threshold": self.threshold,
            "granularity": self.granularity,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "predictions": self.predictions,
            "unattributed": self.unattributed,
            "span": self.span,
        }
        save_tensors(path, self._FORMAT, self._VERSION, tensors, fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RouteGraph:
        """What `save` saved. Raises FormatError for a truncated or foreign file."""
        tensors, fields = load_tensors(path, cls._FORMAT, cls._VERSION, oldest=cls._OLDEST)
        try:
            edges = EdgeTable(*(tensors.pop(f"edges.{name}") for name in EdgeTable._fields))
            heads = HeadEdgeTable(
                *(tensors.pop(f"head_edges.{name}") for name in HeadEdgeTable._fields)
            )
            predictions = [Prediction(*p) for p in fields.pop("predictions")]
            span = fields.pop("span", None)
            if span is not None:
                positions, weights, of_each = span
                of_each = [[Prediction(*p) for p in of] for of in of_each]
                span = Span(positions, weights, of_each)
            nodes = [Node(n[0], NodeKind(n[1]), n[2]) for n in fields.pop("unattributed")]
            graph = cls(
                edges=edges,
                head_edges=heads,
                predictions=predictions,
                span=span,
                unattributed=nodes,
                token_ids=tensors["token_ids"],
                parallel=tensors["parallel"],
                **fields,
            )
            _check_graph(graph)
            return graph
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise FormatError(f"{path}: not a whole {cls._FORMAT} file ({error})") from error


def _best_paths(
    tables: list[tuple[Tensor, Tensor, Tensor]], starts: dict[int, float], k: int
) -> list[tuple[float, list[int]]]:
    """The k heaviest chains of one edge a table, from any of `starts`, which have weights of their
    own: (product, edge index a table).

    tables: (target [E], source [E], weight [E] float64), top-down. After each table, every node
    holds its k heaviest chains; all nodes at once.
    """
    k = as_index("k", k)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    node = torch.tensor(list(starts))
    weight = torch.tensor(list(starts.values()), dtype=torch.float64)
    trail: list[tuple[Tensor, Tensor]] = []
    for target, source, edge_weight in tables:
        order = target.argsort(stable=True)
        ordered = target[order]
        first = torch.searchsorted(ordered, node)
        count = torch.searchsorted(ordered, node, right=True) - first
        parent = torch.arange(len(node)).repeat_interleave(count)
        offset = torch.arange(len(parent)) - (count.cumsum(0) - count).repeat_interleave(count)
        edge = order[first[parent] + offset]
        product, reached = weight[parent] * edge_weight[edge], source[edge]
        best = product.argsort(descending=True, stable=True)
        best = best[reached[best].argsort(stable=True)]
        at = reached[best]
        kept = best[torch.arange(len(best)) - torch.searchsorted(at, at) < k]
        node, weight = reached[kept], product[kept]
        trail.append((parent[kept], edge[kept]))
    found = []
    for i in weight.argsort(descending=True, stable=True)[:k].tolist():
        chosen, at_entry = [], i
        for parent, edge in reversed(trail):
            chosen.append(int(edge[at_entry]))
            at_entry = int(parent[at_entry])
        found.append((float(weight[i]), chosen[::-1]))
    return found


def check_threshold(threshold: float) -> float:
    """The threshold as a float. Raises ValueError unless it is a number from 0 to 1."""
    number = isinstance(threshold, Real) and not isinstance(threshold, bool)
    if not number or not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number from 0 to 1, got {threshold!r}")
    return float(threshold)


def as_index(name: str, value: SupportsIndex) -> int:
    """An int from any integer, numpy's and torch's too. Raises ValueError for anything else."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected an int, got {value!r}") from None


def _position(name: str, value: SupportsIndex, n_tokens: int) -> int:
    """A position from 0; negative ones count from the end."""
    position = as_index(name, value)
    if not -n_tokens <= position < n_tokens:
        raise ValueError(f"{name}: expected {-n_tokens} to {n_tokens - 1}, got {position}")
    return position % n_tokens


def _normal(x: Tensor) -> Tensor:
    """A tensor that autograd takes: a copy where x was made in inference mode."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


@dataclass(frozen=True, eq=False)
class Routes:
    """The route graphs of every position's prediction, from one sweep over the layers.

    Each layer was scored once for all T rows; a position's graph is what its last-layer node
    reaches over these edges. Tensors are on the device that scored them.
    """

    tokens: list[str]
    token_ids: Tensor  # [T] int64
    threshold: float
    granularity: Granularity
    layers: list[LayerTable]  # bottom first, all T rows, edges above the threshold scored with
    predict: Callable[[list[int]], list[list[Prediction]]] = field(repr=False)
    scored_threshold: float

    _FORMAT = "ifr_fast.routes"
    _VERSION = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", _normal(self.token_ids))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def n_heads(self) -> int:
        """Attention heads a layer."""
        return self.layers[0].edges.head_weight.shape[1]

    def at(self, threshold: float) -> Routes:
        """The same routes at any threshold not below the one scored with."""
        threshold = check_threshold(threshold)
        if threshold < self.scored_threshold:
            raise ValueError(
                f"threshold: these routes were scored with {self.scored_threshold:g}, "
                f"got {threshold:g}; call trace_all again for a lower one"
            )
        return dataclasses.replace(self, threshold=threshold)

    def __getitem__(self, position: SupportsIndex) -> RouteGraph:
        """The graph of one position, negative from the end."""
        T = len(self)
        position = as_index("position", position)
        if not -T <= position < T:
            raise IndexError(f"position: expected {-T} to {T - 1}, got {position}")
        position %= T
        reached = torch.zeros(T, dtype=torch.bool, device=self.layers[0].rows.device)
        reached[position] = True
        grown = []
        for layer in reversed(range(self.n_layers)):
            step, reached = grow_layer(
                layer, self.layers[layer], reached, self.threshold, self.granularity
            )
            grown.append(step)
        return assemble(
            grown,
            [table.ffn_residual is None for table in self.layers],
            tokens=self.tokens,
            token_ids=self.token_ids,
            position=position,
            threshold=self.threshold,
            granularity=self.granularity,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            predictions=self.predict([position])[0],
        )

    def reach(self, source: SupportsIndex) -> Reach:
        """What a token's information reaches, of all predictions and nodes: the weight of all paths
        from its embedding up to them. `predictions[t]` is `self[t].token_importance()[source]`.
        """
        from .reach import reach_in_routes

        return reach_in_routes(self, _position("source", source, len(self)))

    def head_frequency(self) -> Tensor:
        """[L, H] float32: share of predictions whose graph a head is in.

        It is where one of its head_edges into a reached node exceeds the threshold by itself.
        """
        return self._aggregates[0]

    def head_importance(self) -> Tensor:
        """[T, L, H] float32: `RouteGraph.head_importance` of every position."""
        return self._aggregates[1]

    def ffn_importance(self) -> Tensor:
        """[T, L] float32: `RouteGraph.ffn_importance` of every position."""
        return self._aggregates[2]

    @cached_property
    def _aggregates(self) -> tuple[Tensor, Tensor, Tensor]:
        T, L, H = len(self), self.n_layers, self.n_heads
        device = self.layers[0].rows.device
        steps = [AllStep.of(table, self.threshold, self.granularity) for table in self.layers]
        frequency = torch.zeros(L, H, device=device)
        head_importance = torch.empty(T, L, H, device=device)
        ffn_importance = torch.empty(T, L, device=device)
        size = max(1, _AGGREGATE_ELEMENTS // T)
        for begin in range(0, T, size):
            end = min(T, begin + size)
            # Columns are predictions; a row of `reach` is a node, `flow` the weight of all paths.
            flow = torch.zeros(T, end - begin, device=device)
            flow[torch.arange(begin, end), torch.arange(end - begin)] = 1
            reach = flow > 0
            for layer in reversed(range(L)):
                step = steps[layer]
                ffn_importance[begin:end, layer] = flow.T @ step.ffn
                flow, reach = flow * step.to_mid[:, None], reach & (step.to_mid > 0)[:, None]
                head_importance[begin:end, layer] = flow.T @ step.head_sum
                frequency[layer] += ((reach.T.float() @ step.head_in) > 0).sum(0)
                reach = (reach & (step.to_pre > 0)[:, None]) | (step.carry(reach.float(), 1) > 0)
                flow = flow * step.to_pre[:, None] + step.carry(flow, step.edge_weight)
        return frequency / T, head_importance, ffn_importance

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves to a safetensors file, with every position's predictions."""
        tensors: dict[str, Tensor] = {"token_ids": self.token_ids}
        for i, table in enumerate(self.layers):
            columns = {**table._asdict(), **table.edges._asdict()}
            del columns["edges"], columns["rows"]
            tensors |= {f"{i}.{k}": v for k, v in columns.items() if v is not None}
        fields = {
            "tokens": self.tokens,
            "threshold": self.threshold,
            "granularity": self.granularity,
            "scored_threshold": self.scored_threshold,
            "parallel": [table.ffn_residual is None for table in self.layers],
            "predictions": self.predict(list(range(len(self)))),
        }
        save_tensors(path, self._FORMAT, self._VERSION, tensors, fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Routes:
        """What `save` saved. Raises FormatError for a truncated or foreign file."""
        tensors, fields = load_tensors(path, cls._FORMAT, cls._VERSION)
        try:
            layers = []
            rows = torch.arange(len(fields["tokens"]))
            for i, parallel in enumerate(fields.pop("parallel")):
                edges = EdgeList(*(tensors.pop(f"{i}.{name}") for name in EdgeList._fields))
                layers.append(
                    LayerTable(
                        rows=rows,
                        residual=tensors.pop(f"{i}.residual"),
                        ffn=tensors.pop(f"{i}.ffn"),
                        ffn_residual=None if parallel else tensors.pop(f"{i}.ffn_residual"),
                        edges=edges,
                        unattributed=tensors.pop(f"{i}.unattributed"),
                        ffn_unattributed=None if parallel else tensors.pop(f"{i}.ffn_unattributed"),
                    )
                )
            predictions = [[Prediction(*p) for p in of] for of in fields.pop("predictions")]
            routes = cls(
                token_ids=tensors.pop("token_ids"),
                layers=layers,
                predict=lambda positions: [predictions[t] for t in positions],
                **fields,
            )
            if tensors:
                raise ValueError(f"parallel: tells nothing of {min(tensors)}")
            _check_routes(routes)
            _check_predictions("predictions", predictions, len(routes))
            return routes
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise FormatError(f"{path}: not a whole {cls._FORMAT} file ({error})") from error


class AllStep(NamedTuple):
    """One layer of all predictions' walks; T nodes."""

    ffn: Tensor  # [T] FFN edges kept
    to_mid: Tensor  # [T] what passes from post to mid
    to_pre: Tensor  # [T] what passes from mid to pre at the same position
    target: Tensor  # [N] attention edges kept
    source: Tensor  # [N]
    edge_weight: Tensor  # [N]
    head_sum: Tensor  # [T, H] weights of a target's heads, summed
    head_in: Tensor  # [T, H] 1 where a head's edge exceeds the threshold by itself

    @staticmethod
    def of(table: LayerTable, threshold: float, granularity: Granularity) -> AllStep:
        def above(x: Tensor) -> Tensor:
            return torch.where(x > threshold, x, 0)

        row, source, weight, head_weight = table.edges
        single = above(head_weight)
        if granularity == "head":
            head_weight, weight = single, single.sum(-1)
        edge_weight = above(weight)
        head_weight = head_weight * (edge_weight > 0)[:, None]
        T, H = len(table.rows), head_weight.shape[1]
        ffn, residual = above(table.ffn), above(table.residual)
        parallel = table.ffn_residual is None
        return AllStep(
            ffn,
            torch.ones_like(ffn) if parallel else ffn + above(table.ffn_residual),  # type: ignore[arg-type]
            ffn + residual if parallel else residual,
            row,
            source,
            edge_weight,
            head_weight.new_zeros(T, H).index_add_(0, row, head_weight),
            head_weight.new_zeros(T, H).index_add_(0, row, (single > 0).to(single.dtype)),
        )

    def carry(self, x: Tensor, weight: Tensor | float) -> Tensor:
        """Along attention edges, from targets to sources: [T, P] -> [T, P]."""
        kept = (self.edge_weight > 0).to(x.dtype)
        indices = torch.stack([self.source, self.target])
        size = (len(x), len(x))
        matrix = torch.sparse_coo_tensor(indices, kept * weight, size, check_invariants=False)
        return torch.sparse.mm(matrix, x)


# What `load` asks of a file whose tensors and fields are all there. Each raises ValueError.


def _check_graph(graph: RouteGraph) -> None:
    T = _check_text(graph)
    L, H = (_check_int(name, getattr(graph, name), 1, None) for name in ("n_layers", "n_heads"))
    _check_int("position", graph.position, 0, T)
    _check_predictions("predictions", [graph.predictions], 1)
    if graph.span is not None:
        _check_span(graph.span, graph)
    _check_tensor("parallel", graph.parallel, torch.bool, L)
    for name, table in (("edges", graph.edges), ("head_edges", graph.head_edges)):
        n = len(table[0]) if table[0].ndim else 0
        for column, x in table._asdict().items():
            of = f"{name}.{column}"
            _check_tensor(of, x, torch.float32 if column == "weight" else torch.int64, n)
            if column != "weight":
                end = {"layer": L, "kind": len(EdgeKind), "head": H}.get(column, T)
                _check_range(of, x, end)
        _check_weights(f"{name}.weight", table.weight)

    layer, kind, target, source, _ = graph.edges
    _check_order("edges", ((layer * len(EdgeKind) + kind) * T + target) * T + source)
    attention = kind == EdgeKind.ATTENTION
    if bool((source > target).any() or ((source < target) & ~attention).any()):
        raise ValueError("edges: a source is no position that its target reads")
    if bool((graph.parallel[layer] & (kind == EdgeKind.RESIDUAL_MID)).any()):
        raise ValueError("edges.kind: RESIDUAL_MID in a parallel block")
    pair = (layer * T + target) * T + source
    layer, head, target, source, _ = graph.head_edges
    pair_of_head = (layer * T + target) * T + source
    _check_order("head_edges", pair_of_head * H + head)
    if not bool(torch.isin(pair_of_head, pair[attention]).all()):
        raise ValueError("head_edges: not all belong to an attention edge")
    for node in graph.unattributed:
        _check_int("unattributed", node.layer, 0, L)
        _check_int("unattributed", node.position, 0, T)
        if node.kind not in (NodeKind.MID, NodeKind.POST):
            raise ValueError(f"unattributed: expected mid or post, got {node.kind}")


def _check_span(span: Span, graph: RouteGraph) -> None:
    positions, weights, predictions = span
    for position in positions:
        _check_int("span", position, 0, len(graph.tokens))
    if len(positions) < 2 or any(b <= a for a, b in pairwise(positions)):
        raise ValueError("span: expected two positions or more, ascending")
    if not all(isinstance(w, float) and w >= 0 for w in weights) or len(weights) != len(positions):
        raise ValueError("span: expected a weight of at least 0 for each position")
    if not abs(sum(weights) - 1) < 1e-6:
        raise ValueError("span: expected weights that sum to 1")
    _check_predictions("span", predictions, len(positions))
    if positions[-1] != graph.position or predictions[-1] != graph.predictions:
        raise ValueError("span: its last position is not the graph's")


def _check_routes(routes: Routes) -> None:
    T = _check_text(routes)
    if not check_threshold(routes.scored_threshold) <= routes.threshold:
        raise ValueError("threshold: is below the one scored with")
    if not routes.layers:
        raise ValueError("parallel: is empty; expected at least one layer")
    for i, table in enumerate(routes.layers):
        for name in ("residual", "ffn", "ffn_residual"):
            if (x := getattr(table, name)) is not None:
                _check_tensor(f"{i}.{name}", x, None, T)
                _check_weights(f"{i}.{name}", x)
        for name in ("unattributed", "ffn_unattributed"):
            if (x := getattr(table, name)) is not None:
                _check_tensor(f"{i}.{name}", x, torch.bool, T)
        row, source, weight, head_weight = table.edges
        n = len(row) if row.ndim else 0
        _check_tensor(f"{i}.row", row, torch.int64, n)
        _check_tensor(f"{i}.source", source, torch.int64, n)
        _check_tensor(f"{i}.weight", weight, None, n)
        _check_tensor(f"{i}.head_weight", head_weight, None, n, max(1, routes.n_heads))
        _check_range(f"{i}.row", row, T)
        _check_range(f"{i}.source", source, T)
        _check_weights(f"{i}.weight", weight)
        _check_weights(f"{i}.head_weight", head_weight)
        row, source = row[weight > 0], source[weight > 0]
        if bool((source > row).any()) or len(torch.unique(row * T + source)) < len(row):
            raise ValueError(f"{i}.source: edges from later positions, or listed twice")


def _check_text(of: RouteGraph | Routes) -> int:
    """What both have in common; the number of tokens."""
    if not isinstance(of.tokens, list) or not all(isinstance(token, str) for token in of.tokens):
        raise ValueError("tokens: expected strings")
    if not of.tokens:
        raise ValueError("tokens: is empty; expected at least one")
    _check_tensor("token_ids", of.token_ids, torch.int64, len(of.tokens))
    check_threshold(of.threshold)
    if of.granularity not in ("token", "head"):
        raise ValueError(f"granularity: expected 'token' or 'head', got {of.granularity!r}")
    return len(of.tokens)


def _check_predictions(name: str, predictions: list[list[Prediction]], n: int) -> None:
    if len(predictions) != n:
        raise ValueError(f"{name}: expected those of {n} positions, got {len(predictions)}")
    for token, token_id, probability in (p for of in predictions for p in of):
        if not isinstance(token, str) or not isinstance(probability, float):
            raise ValueError(f"{name}: expected a token, its id and probability")
        _check_int(name, token_id, 0, None)


def _check_int(name: str, value: int, start: int, end: int | None) -> int:
    if type(value) is not int or value < start or (end is not None and value >= end):
        upper = "" if end is None else f" and below {end}"
        raise ValueError(f"{name}: expected an int of at least {start}{upper}, got {value!r}")
    return value


def _check_tensor(name: str, x: Tensor, dtype: torch.dtype | None, *shape: int) -> None:
    """Of that shape and dtype; None: of any floating one."""
    if tuple(x.shape) != shape or (x.dtype != dtype if dtype else not x.is_floating_point()):
        kind = str(dtype or "floats").removeprefix("torch.")
        got = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected {kind} {list(shape)}, got {got} {list(x.shape)}")


def _check_range(name: str, x: Tensor, end: int) -> None:
    if len(x) and not 0 <= int(x.min()) <= int(x.max()) < end:
        raise ValueError(f"{name}: expected 0 to {end - 1}, got {int(x.min())} to {int(x.max())}")


def _check_weights(name: str, x: Tensor) -> None:
    if not bool((x.isfinite() & (x >= 0)).all()):
        raise ValueError(f"{name}: expected finite numbers of at least 0")


def _check_order(name: str, keys: Tensor) -> None:
    if not bool((keys[1:] > keys[:-1]).all()):
        raise ValueError(f"{name}: not in canonical order, each once")
