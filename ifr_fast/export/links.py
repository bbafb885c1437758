"""Nodes and links of a RouteGraph, for all formats.

`resid_pre` of a layer is the `post` node of the layer below, or an `embed` node at layer 0. A layer
that shares keys and values reads the `resid_pre` of the layer that made them. An FFN
edge becomes two links, into the `ffn` node with weight 1 and out of it with the edge's weight, so
that the product of the weights along a path does not change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..graph.tables import EdgeKind, Node, NodeKind

if TYPE_CHECKING:
    from ..graph.data import GraphData

_RANK = {NodeKind.MID: 0, NodeKind.FFN: 1, NodeKind.POST: 2}


class Link(NamedTuple):
    """One step of information, from `source` up to `target`."""

    source: Node
    target: Node
    kind: EdgeKind
    layer: int
    weight: float  # importance of the source in the target; 1 into an `ffn` node
    heads: dict[int, float] | None  # each head's share, for attention only


def links_of(graph: GraphData) -> list[Link]:
    """All links, in the order of the graph's edges."""
    parallel, read = graph.parallel.tolist(), graph.source_layers
    heads: defaultdict[tuple[int, int, int], dict[int, float]] = defaultdict(dict)
    for layer, head, target, source, weight in rows(graph.head_edges):
        heads[layer, target, source][head] = weight

    found = []
    for layer, number, target, source, weight in rows(graph.edges):
        kind = EdgeKind(number)
        post, mid = (Node(layer, of, target) for of in (NodeKind.POST, NodeKind.MID))
        one_step = parallel[layer]
        into_post = one_step or kind in (EdgeKind.FFN, EdgeKind.RESIDUAL_POST)
        above = post if into_post else mid
        pre = read[layer] if kind == EdgeKind.ATTENTION else layer
        below = mid if into_post and not one_step else _pre(pre, source)
        if kind == EdgeKind.FFN:
            ffn = Node(layer, NodeKind.FFN, target)
            found.append(Link(below, ffn, kind, layer, 1.0, None))
            below = ffn
        of_heads = heads[layer, target, source] if kind == EdgeKind.ATTENTION else None
        found.append(Link(below, above, kind, layer, weight, of_heads))
    return found


def nodes_of(graph: GraphData, links: list[Link]) -> list[Node]:
    """The explained nodes, then those that links join, each once."""
    ends = (end for link in links for end in (link.source, link.target))
    return list(dict.fromkeys([*tops_of(graph), *ends]))


def tops_of(graph: GraphData) -> list[Node]:
    """The explained nodes, by position."""
    return [Node(graph.n_layers - 1, NodeKind.POST, position) for position in graph.starts]


def flow_of(graph: GraphData) -> dict[Node, float]:
    """Weight of all paths from the predictions down to each node; nodes with 0 are not listed."""
    post, mid, embed = graph.flow
    flow = {Node(0, NodeKind.EMBED, j): x for j, x in _nonzero(embed)}
    for layer, parallel in enumerate(graph.parallel.tolist()):
        for kind, of_kind in ((NodeKind.POST, post), (NodeKind.MID, mid)):
            if kind == NodeKind.POST or not parallel:
                flow |= {Node(layer, kind, t): x for t, x in _nonzero(of_kind[layer])}
        through = graph.flows[layer].ffn * post[layer]
        flow |= {Node(layer, NodeKind.FFN, t): x for t, x in _nonzero(through)}
    return flow


def _nonzero(flow: Tensor) -> Iterator[tuple[int, float]]:
    at = flow.nonzero().squeeze(1)
    return zip(at.tolist(), flow[at].tolist(), strict=True)


def level(node: Node) -> int:
    """Height of a node: a link's target is higher than its source."""
    return -1 if node.kind == NodeKind.EMBED else 3 * node.layer + _RANK[node.kind]


def name_of(node: Node) -> str:
    """Name of a node in formats with node names."""
    return f"{node.kind.value}_{node.layer}_{node.position}"


def rows(table: Any) -> Any:
    """Rows of a table, as Python numbers."""
    return zip(*(column.tolist() for column in table), strict=True)


def _pre(layer: int, position: int) -> Node:
    if layer == 0:
        return Node(0, NodeKind.EMBED, position)
    return Node(layer - 1, NodeKind.POST, position)
