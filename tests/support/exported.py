"""Edges and names of nodes in exported graphs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import networkx as nx

Edges = Counter[tuple[Any, Any, str, float]]


def edges_of(graph: nx.MultiDiGraph, name: Any = lambda node: node) -> Edges:
    return Counter(
        (name(u), name(v), data["kind"], data["weight"]) for u, v, data in graph.edges(data=True)
    )


def named(node: tuple[str, int, int]) -> str:
    return "_".join(map(str, node))
