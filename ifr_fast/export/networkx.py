"""A RouteGraph as a networkx graph, edges in the direction in which information flows.

Nodes are tuples (kind, layer, position); an `embed` is at layer 0. `resid_pre` of a layer is the
`post` of the one below. An FFN edge becomes two, into the `ffn` node with weight 1 and out of it
with its own, so that the product of weights along a path stays that of the path.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from ..errors import IfrError
from ..graph import EdgeKind, NodeKind

if TYPE_CHECKING:
    import networkx as nx

    from ..graph import RouteGraph

    _Node = tuple[str, int, int]


def to_networkx(graph: RouteGraph) -> nx.MultiDiGraph:
    """Nodes carry token, layer, kind, position; edges weight, kind, layer, and attention heads.

    The graph's `starts` are the positions explained and their weights.
    """
    try:
        import networkx as nx
    except ImportError as error:
        raise IfrError(
            "to_networkx needs networkx, which is not installed: pip install 'ifr-fast[networkx]'"
        ) from error
    parallel = graph.parallel.tolist()
    heads: defaultdict[tuple[int, int, int], dict[int, float]] = defaultdict(dict)
    for layer, head, target, source, weight in _rows(graph.head_edges):
        heads[layer, target, source][head] = weight

    def node(kind: NodeKind, layer: int, position: int) -> _Node:
        return kind.value, layer, position

    def pre(layer: int, position: int) -> _Node:
        if layer == 0:
            return node(NodeKind.EMBED, 0, position)
        return node(NodeKind.POST, layer - 1, position)

    links: list[tuple[_Node, _Node, dict[str, Any]]] = []
    for layer, kind, target, source, weight in _rows(graph.edges):
        post = node(NodeKind.POST, layer, target)
        mid = node(NodeKind.MID, layer, target)
        one_step = parallel[layer]
        into_post = one_step or kind in (EdgeKind.FFN, EdgeKind.RESIDUAL_POST)
        above = post if into_post else mid
        below = mid if into_post and not one_step else pre(layer, source)
        attributes = {"weight": weight, "kind": EdgeKind(kind).name.lower(), "layer": layer}
        if kind == EdgeKind.FFN:
            ffn = node(NodeKind.FFN, layer, target)
            links.append((below, ffn, {**attributes, "weight": 1.0}))
            below = ffn
        elif kind == EdgeKind.ATTENTION:
            attributes["heads"] = heads[layer, target, source]
        links.append((below, above, attributes))

    out = nx.MultiDiGraph(
        tokens=graph.tokens,
        position=graph.position,
        starts=graph.starts,
        threshold=graph.threshold,
        granularity=graph.granularity,
    )
    tops = [node(NodeKind.POST, graph.n_layers - 1, position) for position in graph.starts]
    nodes = dict.fromkeys([*tops, *(end for link in links for end in link[:2])])
    out.add_nodes_from(
        (
            (kind, layer, position),
            {"token": graph.tokens[position], "kind": kind, "layer": layer, "position": position},
        )
        for kind, layer, position in nodes
    )
    out.add_edges_from(links)
    return out


def _rows(table: Any) -> Any:
    return zip(*(column.tolist() for column in table), strict=True)
