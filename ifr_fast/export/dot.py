"""A RouteGraph in DOT, the language of Graphviz: `dot -Tsvg graph.dot -o graph.svg`.

Each level of nodes is a row, from bottom to top. Embeddings and the explained nodes are labelled
with their tokens; other nodes are points with a tooltip. The width of an edge shows its weight, the
colour its kind; the attributes `importance`, `kind`, `layer` and `heads` are for programs.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from ..graph.tables import EdgeKind, Node, NodeKind
from .labels import visible
from .links import Link, level, links_of, name_of, nodes_of, tops_of

if TYPE_CHECKING:
    from ..graph.data import GraphData

_COLOR = {
    EdgeKind.ATTENTION: "#2b5fd9",
    EdgeKind.RESIDUAL_MID: "#8a95a1",
    EdgeKind.RESIDUAL_POST: "#8a95a1",
    EdgeKind.FFN: "#c2560a",
}
_WIDTH = 6.0  # points, for an edge of weight 1


def to_dot(graph: GraphData) -> str:
    """The DOT document. It contains only printable characters, whatever the tokens hold."""
    links = links_of(graph)
    nodes = sorted(nodes_of(graph, links), key=lambda node: (level(node), node.position))
    lines = [
        "digraph routes {",
        "  rankdir=BT; outputorder=edgesfirst;",
        '  node [shape=point, width=0.08, color="#59636e"]; edge [arrowhead=none];',
    ]
    tops = dict.fromkeys(tops_of(graph))
    for _, of_level in groupby(nodes, key=level):
        row = [_node(graph, node, node in tops) for node in of_level]
        lines.append("  { rank=same; " + " ".join(row) + " }")
    lines += [_edge(link) for link in links]
    return "\n".join([*lines, "}", ""])


def _node(graph: GraphData, node: Node, explained: bool) -> str:
    token = visible(graph.tokens[node.position])
    where = f"{node.kind.value} of layer {node.layer}, {token} at {node.position}"
    attributes = [f"group=p{node.position}", f"tooltip={_quoted(where)}"]
    if explained or node.kind == NodeKind.EMBED:
        attributes += ["shape=box", "style=rounded", f"label={_quoted(token)}"]
    return f"{name_of(node)} [{', '.join(attributes)}];"


def _edge(link: Link) -> str:
    attributes = [
        f'color="{_COLOR[link.kind]}"',
        f"penwidth={_WIDTH * link.weight:.3f}",
        f"importance={link.weight!r}",
        f"kind={link.kind.name.lower()}",
        f"layer={link.layer}",
    ]
    if link.heads is not None:
        shares = " ".join(f"{head}:{weight!r}" for head, weight in link.heads.items())
        attributes.append(f'heads="{shares}"')
    return f"  {name_of(link.source)} -> {name_of(link.target)} [{', '.join(attributes)}];"


def _quoted(text: str) -> str:
    """Quotes a DOT string, so that a backslash starts no escape and no record field."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
