"""GraphData: the tables of a route graph, and the importances that follow from them.

The graph of a prediction at position t is grown from the node (last layer, post, t) downwards:
an edge is kept where its importance exceeds the threshold and its target has been reached. The
nodes are (layer, kind, position); `resid_pre` of a layer is `post` of the one below, or `embed`.
The graph of a span of predictions is grown from all of their nodes at once: since an edge's weight
depends on its target alone, it is the union of their graphs, and the flow in it is the mean of
theirs by the span's weights.
In a sequential block an edge leads

    post <- mid   RESIDUAL_POST, and FFN, whose block reads `mid` at the same position
    mid  <- pre   RESIDUAL_MID at the same position, ATTENTION from any visible one, and in a layer
                  that shares keys and values from the pre of the layer that made them

and in a parallel block all of RESIDUAL_POST, FFN and ATTENTION lead from pre straight into post.
A path's weight is the product of its edges'. Tables are equal-length 1-D tensors.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..arguments import index_within
from ..kernels.contract import EdgeList
from .flow import LayerFlow, flow_down
from .tables import (
    EdgeKind,
    EdgeTable,
    Granularity,
    GraphHeader,
    HeadEdgeTable,
    LayerTable,
    Node,
    NodeImportance,
    NodeKind,
    Prediction,
    Span,
    plain_tensor,
)


@dataclass(frozen=True, eq=False)
class GraphData:
    """The tables of a graph; tensors on the CPU. `RouteGraph` is its public face."""

    tokens: list[str]
    token_ids: Tensor  # [T] int64
    position: int  # the position whose next-token prediction is explained
    threshold: float
    granularity: Granularity
    n_layers: int
    n_heads: int
    predictions: list[Prediction]  # most probable first
    edges: EdgeTable
    head_edges: HeadEdgeTable
    unattributed: list[Node]  # nodes whose parts all have proximity 0 and got 1/n each
    parallel: Tensor  # [L] bool: blocks with attention and FFN side by side
    span: Span | None = None  # for several positions; `position` and `predictions` are its last
    # [L] the layer from whose resid_pre the values that a layer's attention reads were made: a
    # lower one where keys and values are shared between layers. None: each layer's own.
    value_layers: list[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", plain_tensor(self.token_ids))

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle holds the fields, not what was computed of them.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __repr__(self) -> str:
        top = f" -> {self.predictions[0].token!r}" if self.predictions else ""
        where = f"position {self.position}{top}"
        if self.span is not None:
            first, *_, last = self.span.positions
            where = f"{len(self.span.positions)} positions from {first} to {last}"
        return (
            f"{type(self).__name__}({len(self.tokens)} tokens, {where}, "
            f"threshold {self.threshold:g}, {len(self.edges.layer)} edges)"
        )

    @property
    def header(self) -> GraphHeader:
        """All fields but the tables, from which a graph of the same prediction is made."""
        return GraphHeader(
            tokens=self.tokens,
            token_ids=self.token_ids,
            position=self.position,
            threshold=self.threshold,
            granularity=self.granularity,
            n_heads=self.n_heads,
            parallel=self.parallel.tolist(),
            predictions=self.predictions,
            span=self.span,
            value_layers=self.value_layers,
        )

    @property
    def source_layers(self) -> list[int]:
        """[L] the layer whose resid_pre the sources of a layer's attention edges are."""
        return self.value_layers or list(range(self.n_layers))

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
    def flows(self) -> list[LayerFlow]:
        """The weights of each layer's edges, in float64, without heads; bottom first."""
        return [
            LayerFlow.of(self.layer_table(layer, heads=False), 0.0, "token", torch.float64)
            for layer in range(self.n_layers)
        ]

    @cached_property
    def flow(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight of all paths from the prediction to each post, mid [L, T] and embed [T], float64.

        In a span, the paths from each prediction are multiplied by its weight. In a parallel block
        mid is post, into which attention leads there.
        """
        top = torch.zeros(len(self.tokens), dtype=torch.float64)
        for position, weight in self.starts.items():
            top[position] = weight
        post, mid = torch.zeros(2, self.n_layers, len(top), dtype=top.dtype)
        flow = top
        for layer, of_post, of_mid, below in flow_down(self.flows, top):
            post[layer], mid[layer], flow = of_post, of_mid, below
        return post, mid, flow

    def steps(self, layer: int) -> list[EdgeTable]:
        """A layer's edges in the order in which a path takes them: one step, or post then mid."""
        layer = index_within("layer", layer, self.n_layers)
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

        For a span, it is the mean of its predictions' importances, by its weights.
        """
        return self.flow[2].float()

    def node_importance(self) -> NodeImportance:
        """Weight of all paths from the prediction to every node; 0 where there is none.

        For a span, it is the mean of its predictions' weights, by the span's weights.
        """
        post, mid, embed = self.flow
        return NodeImportance(embed.float(), mid.float(), post.float())

    def head_importance(self) -> Tensor:
        """[L, H] float32: sum over head_edges of weight times the flow into their targets."""
        layer, head, target, _, weight = self.head_edges
        carried = self.flow[1][layer, target] * weight
        out = torch.zeros(self.n_layers * self.n_heads, dtype=torch.float64)
        out.index_add_(0, layer * self.n_heads + head, carried)
        return out.view(self.n_layers, self.n_heads).float()

    def ffn_importance(self) -> Tensor:
        """[L] float32: sum over FFN edges of weight times the flow into their targets."""
        of_ffn = self.edges.kind == EdgeKind.FFN
        layer, target = self.edges.layer[of_ffn], self.edges.target[of_ffn]
        carried = self.flow[0][layer, target] * self.edges.weight[of_ffn]
        out = torch.zeros(self.n_layers, dtype=torch.float64)
        return out.index_add_(0, layer, carried).float()

    def layer_table(self, layer: int, *, heads: bool = True) -> LayerTable:
        """A layer's edges, as scores of all T rows (0 where there is no edge).

        heads: whether edges have a column for each head; if not, they have none.
        """
        T = len(self.tokens)
        edges = self._layer_edges[layer]

        def of_kind(kind: EdgeKind) -> Tensor:
            mine = edges.kind == kind
            return torch.zeros(T).index_put((edges.target[mine],), edges.weight[mine])

        parallel = bool(self.parallel[layer])
        attention = edges.kind == EdgeKind.ATTENTION
        target, source = edges.target[attention], edges.source[attention]
        head_weight = torch.zeros(len(target), self.n_heads if heads else 0)
        if heads:
            of_heads = HeadEdgeTable(*(c[self.head_edges.layer == layer] for c in self.head_edges))
            place = torch.searchsorted(target * T + source, of_heads.target * T + of_heads.source)
            head_weight[place, of_heads.head] = of_heads.weight

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
            None if self.source_layers[layer] == layer else self.source_layers[layer],
        )
