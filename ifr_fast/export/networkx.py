"""A RouteGraph as a networkx graph, with edges in the direction of information.

Nodes are tuples (kind, layer, position); an `embed` node is at layer 0. `resid_pre` of a layer is
the `post` node of the layer below. An FFN edge becomes two edges, into the `ffn` node with weight 1
and out of it with its own weight, so that the product of the weights along a path does not change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import IfrError
from .links import Link, links_of, nodes_of

if TYPE_CHECKING:
    import networkx as nx

    from ..graph.data import GraphData
    from ..graph.tables import Node


def to_networkx(graph: GraphData) -> nx.MultiDiGraph:
    """Nodes have token, layer, kind, position; edges weight, kind, layer, and for attention heads.

    The graph's `starts` are the explained positions and their weights.
    """
    try:
        import networkx as nx
    except ImportError as error:
        raise IfrError(
            "to_networkx needs networkx, which is not installed: pip install 'ifr-fast[networkx]'"
        ) from error
    links = links_of(graph)
    out = nx.MultiDiGraph(
        tokens=graph.tokens,
        position=graph.position,
        starts=graph.starts,
        threshold=graph.threshold,
        granularity=graph.granularity,
    )
    for node in nodes_of(graph, links):
        token = graph.tokens[node.position]
        kind, layer, position = key = _key(node)
        out.add_node(key, token=token, kind=kind, layer=layer, position=position)
    out.add_edges_from((_key(x.source), _key(x.target), _attributes(x)) for x in links)
    return out


def _key(node: Node) -> tuple[str, int, int]:
    return node.kind.value, node.layer, node.position


def _attributes(link: Link) -> dict[str, Any]:
    attributes = {"weight": link.weight, "kind": link.kind.name.lower(), "layer": link.layer}
    return attributes if link.heads is None else {**attributes, "heads": link.heads}
