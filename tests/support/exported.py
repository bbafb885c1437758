"""Edges and names of nodes in exported graphs."""

from __future__ import annotations

import io
import json
from collections import Counter
from typing import Any

import networkx as nx

Edges = Counter[tuple[Any, Any, str, float]]


def edges_of(graph: nx.MultiDiGraph, name: Any = lambda node: node) -> Edges:
    return Counter(
        (name(u), name(v), data["kind"], data["weight"]) for u, v, data in graph.edges(data=True)
    )


def keyed(graph: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """The graph of `to_networkx` with nodes (kind, layer, position), and heads by number."""
    keys = {n: (d["kind"], d["layer"], d["position"]) for n, d in graph.nodes(data=True)}
    assert {name: named(key) for name, key in keys.items()} == {name: name for name in keys}
    out = nx.relabel_nodes(graph, keys)
    for _, _, data in out.edges(data=True):
        if "heads" in data:
            data["heads"] = {int(h): weight for h, weight in json.loads(data["heads"]).items()}
    return out


def written(graph: nx.MultiDiGraph, form: str) -> nx.MultiDiGraph:
    """The graph as networkx writes it, in a format of its own, and reads it again."""
    file = io.BytesIO()
    getattr(nx, f"write_{form}")(graph, file)
    file.seek(0)
    if form == "graphml":
        return nx.read_graphml(file, force_multigraph=True)
    return getattr(nx, f"read_{form}")(file)


def named(node: tuple[str, int, int]) -> str:
    return "_".join(map(str, node))
