"""A RouteGraph as GraphML, for Gephi, yEd, Cytoscape, networkx and others.

Nodes are named kind_layer_position, and edges have the direction of information; two edges may join
the same nodes (the residual and self-attention). Weights can be read back exactly. XML cannot hold
every character: U+FFFD replaces the others, and `token_id` identifies the token. Lists and mappings
(the heads' shares of an edge, the graph's `tokens`) are JSON in ASCII.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from .links import flow_of, links_of, name_of, nodes_of

if TYPE_CHECKING:
    from ..graph.data import GraphData

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ESCAPED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\r": "&#13;"}


class _Key(NamedTuple):
    """A GraphML attribute."""

    of: str  # "graph", "node" or "edge"
    name: str
    type: str

    @property
    def id(self) -> str:
        return f"{self.of}_{self.name}"


_KEYS = [
    _Key(of, name, kind)
    for of, attributes in {
        "graph": {
            "tokens": "string",
            "starts": "string",
            "position": "int",
            "threshold": "double",
            "granularity": "string",
        },
        "node": {
            "kind": "string",
            "layer": "int",
            "position": "int",
            "token": "string",
            "token_id": "long",
            "flow": "double",
        },
        "edge": {"weight": "double", "kind": "string", "layer": "int", "heads": "string"},
    }.items()
    for name, kind in attributes.items()
]


def to_graphml(graph: GraphData) -> str:
    """The GraphML document, for UTF-8. `flow` of a node: weight of all paths down to it."""
    links = links_of(graph)
    flow = flow_of(graph)
    token_ids = graph.token_ids.tolist()
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">',
        *(
            f'<key id="{key.id}" for="{key.of}" attr.name="{key.name}" attr.type="{key.type}"/>'
            for key in _KEYS
        ),
        '<graph edgedefault="directed">',
        _data(
            "graph",
            tokens=json.dumps(graph.tokens),
            starts=json.dumps(graph.starts),
            position=graph.position,
            threshold=graph.threshold,
            granularity=graph.granularity,
        ),
    ]
    for node in nodes_of(graph, links):
        data = _data(
            "node",
            kind=node.kind.value,
            layer=node.layer,
            position=node.position,
            token=graph.tokens[node.position],
            token_id=token_ids[node.position],
            flow=flow.get(node, 0.0),
        )
        lines.append(f'<node id="{name_of(node)}">{data}</node>')
    for i, link in enumerate(links):
        data = _data("edge", weight=link.weight, kind=link.kind.name.lower(), layer=link.layer)
        if link.heads is not None:
            data += _data("edge", heads=json.dumps(link.heads))
        ends = f'source="{name_of(link.source)}" target="{name_of(link.target)}"'
        lines.append(f'<edge id="e{i}" {ends}>{data}</edge>')
    return "\n".join([*lines, "</graph>", "</graphml>", ""])


def _data(of: str, **values: Any) -> str:
    return "".join(
        f'<data key="{of}_{name}">{_text(value)}</data>' for name, value in values.items()
    )


def in_xml(text: str) -> str:
    """The text with U+FFFD in place of each character that XML cannot hold."""
    return _FORBIDDEN.sub("\ufffd", text)


def _text(value: Any) -> str:
    return "".join(_ESCAPED.get(char, char) for char in in_xml(str(value)))
