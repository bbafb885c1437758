"""A RouteGraph as a JSON document: keys are the graph's attributes, tables are stored by column.

Weights are float32 and can be read back exactly. The document is ASCII, so that no token, not even
a lone surrogate, can break the file.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..graph.tables import EdgeKind

if TYPE_CHECKING:
    from ..graph.data import GraphData
    from ..graph.tables import Span

FORMAT = "ifr_fast.route_graph.json"
VERSION = 2  # version 1 has no spans


def to_json(graph: GraphData) -> str:
    """The JSON document. Raises ValueError for a weight or probability that is not finite."""
    return json.dumps(document(graph), allow_nan=False, separators=(",", ":"))


def document(graph: GraphData) -> dict[str, Any]:
    """The document as JSON values."""
    edges = {name: column.tolist() for name, column in graph.edges._asdict().items()}
    names = {int(kind): kind.name.lower() for kind in EdgeKind}
    edges["kind"] = [names[kind] for kind in edges["kind"]]
    return {
        "format": FORMAT,
        "version": VERSION,
        **described(graph),
        "span": None if graph.span is None else _span(graph.span),
        "edges": edges,
        "head_edges": {k: column.tolist() for k, column in graph.head_edges._asdict().items()},
        "unattributed": [node._asdict() for node in graph.unattributed],
        "token_importance": graph.token_importance().tolist(),
    }


def described(graph: GraphData) -> dict[str, Any]:
    """Attributes of a graph other than its tables, as JSON values."""
    return {
        "tokens": graph.tokens,
        "token_ids": graph.token_ids.tolist(),
        "position": graph.position,
        "threshold": graph.threshold,
        "granularity": graph.granularity,
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "parallel": graph.parallel.tolist(),
        "value_layers": graph.source_layers,
        "predictions": [prediction._asdict() for prediction in graph.predictions],
    }


def _span(span: Span) -> dict[str, Any]:
    of_each = [[prediction._asdict() for prediction in of] for of in span.predictions]
    return {**span._asdict(), "predictions": of_each}
