"""The heaviest paths and routes of a graph."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import as_index
from .data import GraphData
from .tables import EdgeKind, Hop, Route, Step, WeightedPath


def top_paths(graph: GraphData, k: int) -> list[WeightedPath]:
    """The k heaviest paths from the prediction to an embedding, heaviest first."""
    tables = [s for layer in reversed(range(graph.n_layers)) for s in graph.steps(layer)]
    weights = [table.weight.double() for table in tables]
    found = _best_paths(
        [(t.target, t.source, w) for t, w in zip(tables, weights, strict=True)],
        graph.starts,
        k,
    )
    paths = []
    for weight, chosen in found:
        steps = []
        for table, i in zip(tables, chosen, strict=True):
            layer, kind, target, source = (int(column[i]) for column in table[:4])
            steps.append(Step(layer, EdgeKind(kind), target, source, float(table.weight[i])))
        paths.append(WeightedPath(weight, steps))
    return paths


def top_routes(graph: GraphData, k: int) -> list[Route]:
    """The k heaviest routes: paths taken together that change position at the same edges."""
    T = len(graph.tokens)
    tables = []
    for layer in reversed(range(graph.n_layers)):
        steps = graph.steps(layer)
        through = torch.ones(T, dtype=torch.float64)
        if len(steps) == 2:
            through = torch.zeros_like(through)
            through.index_add_(0, steps[0].target, steps[0].weight.double())
        edges = steps[-1]
        pair, inverse = torch.unique(edges.target * T + edges.source, return_inverse=True)
        summed = torch.zeros(len(pair), dtype=torch.float64)
        summed.index_add_(0, inverse, edges.weight.double())
        target = pair // T
        tables.append((target, pair % T, summed * through[target]))
    routes = []
    for weight, chosen in _best_paths(tables, graph.starts, k):
        hops, source = [], 0
        for depth, i in enumerate(chosen):
            reader, source = int(tables[depth][0][i]), int(tables[depth][1][i])
            if reader != source:
                hops.append(_hop(graph, graph.n_layers - 1 - depth, reader, source))
        routes.append(Route(weight, source, hops))
    return routes


def _hop(graph: GraphData, layer: int, target: int, source: int) -> Hop:
    table = graph.head_edges
    mine = (table.layer == layer) & (table.target == target) & (table.source == source)
    weight, order = table.weight[mine].sort(descending=True, stable=True)
    heads = table.head[mine][order]
    pairs = list(zip(heads.tolist(), weight.tolist(), strict=True))
    return Hop(layer, target, source, sum(w for _, w in pairs), pairs)


def _best_paths(
    tables: list[tuple[Tensor, Tensor, Tensor]], starts: dict[int, float], k: int
) -> list[tuple[float, list[int]]]:
    """The k heaviest chains of one edge a table, from any of `starts`, which have weights of their
    own: (product, edge index a table).

    tables: (target [E], source [E], weight [E] float64), top-down. After each table, every node
    holds its k heaviest chains; all nodes at once.
    """
    k = as_index("k", k)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    node = torch.tensor(list(starts))
    weight = torch.tensor(list(starts.values()), dtype=torch.float64)
    trail: list[tuple[Tensor, Tensor]] = []
    for target, source, edge_weight in tables:
        order = target.argsort(stable=True)
        ordered = target[order]
        first = torch.searchsorted(ordered, node)
        count = torch.searchsorted(ordered, node, right=True) - first
        parent = torch.arange(len(node)).repeat_interleave(count)
        offset = torch.arange(len(parent)) - (count.cumsum(0) - count).repeat_interleave(count)
        edge = order[first[parent] + offset]
        product, reached = weight[parent] * edge_weight[edge], source[edge]
        best = product.argsort(descending=True, stable=True)
        best = best[reached[best].argsort(stable=True)]
        at = reached[best]
        kept = best[torch.arange(len(best)) - torch.searchsorted(at, at) < k]
        node, weight = reached[kept], product[kept]
        trail.append((parent[kept], edge[kept]))
    found = []
    for i in weight.argsort(descending=True, stable=True)[:k].tolist():
        chosen, at_entry = [], i
        for parent, edge in reversed(trail):
            chosen.append(int(edge[at_entry]))
            at_entry = int(parent[at_entry])
        found.append((float(weight[i]), chosen[::-1]))
    return found
