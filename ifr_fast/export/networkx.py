"""A RouteGraph as a networkx graph, with edges in the direction of information.

Nodes are named kind_layer_position, as in GraphML; an `embed` node is at layer 0. `resid_pre` of a
layer is the `post` node of the layer below. An FFN edge becomes two edges, into the `ffn` node with
weight 1 and out of it with its own weight, so that the product of the weights along a path does not
change.

Attributes are numbers and strings alone, so that networkx can write the graph as GraphML, GML, GEXF
and others: lists and mappings are JSON, and U+FFFD replaces a character that XML cannot hold.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..errors import needing
from .graphml import in_xml
from .links import Link, links_of, name_of, nodes_of

if TYPE_CHECKING:
    import networkx as nx

    from ..graph.data import GraphData


def to_networkx(graph: GraphData) -> nx.MultiDiGraph:
    """Nodes have token, token_id, layer, kind, position; edges have weight, kind, layer, and for
    attention heads, each head's share. The graph's `starts` are the explained positions and their
    weights; these, `heads` and the graph's `tokens` are JSON.
    """
    with needing("to_networkx", "networkx", "pip install 'ifr-fast[networkx]'"):
        import networkx as nx
    links = links_of(graph)
    out = nx.MultiDiGraph(
        tokens=json.dumps(graph.tokens),
        position=graph.position,
        starts=json.dumps(graph.starts),
        threshold=graph.threshold,
        granularity=graph.granularity,
    )
    token_ids = graph.token_ids.tolist()
    for node in nodes_of(graph, links):
        layer, kind, position = node
        out.add_node(
            name_of(node),
            token=in_xml(graph.tokens[position]),
            token_id=token_ids[position],
            kind=kind.value,
            layer=layer,
            position=position,
        )
    out.add_edges_from((name_of(x.source), name_of(x.target), _attributes(x)) for x in links)
    return out


def _attributes(link: Link) -> dict[str, Any]:
    attributes = {"weight": link.weight, "kind": link.kind.name.lower(), "layer": link.layer}
    return attributes if link.heads is None else {**attributes, "heads": json.dumps(link.heads)}
