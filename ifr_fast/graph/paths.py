"""The heaviest paths and routes of a graph."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_count
from .data import GraphData
from .tables import EdgeKind, Hop, Route, Step, WeightedPath


class _Edges(NamedTuple):
    """The edges of one step down, from keys to keys. Key j + T * (m + 1) is position j of layer m's
    resid_pre, for a path that leaves the layers above m out; key j is one of the layer at hand.
    """

    target: Tensor  # [E] int64
    source: Tensor  # [E] int64
    weight: Tensor  # [E] float64


def top_paths(graph: GraphData, k: int) -> list[WeightedPath]:
    """The k heaviest paths from the prediction to an embedding, heaviest first."""
    steps, tables = [], []
    for layer in reversed(range(graph.n_layers)):
        of_layer = graph.steps(layer)
        for table in of_layer:
            steps.append(table)
            read = table.kind == EdgeKind.ATTENTION
            edges = _Edges(table.target, table.source, table.weight.double())
            tables.append(_with_jumps(graph, layer, edges, read, last=table is of_layer[-1]))
    paths = []
    for weight, chosen in _best_paths(tables, graph.starts, k):
        taken = []
        for table, i in zip(steps, chosen, strict=True):
            if i < len(table.layer):  # beyond are nodes that wait for a lower layer
                layer, kind, target, source = (int(column[i]) for column in table[:4])
                taken.append(Step(layer, EdgeKind(kind), target, source, float(table.weight[i])))
        paths.append(WeightedPath(weight, taken))
    return paths


def top_routes(graph: GraphData, k: int) -> list[Route]:
    """The k heaviest routes: paths taken together that change position at the same edges. An edge
    to a lower layer, whose keys and values are shared, counts among these at its own position too.
    """
    T = len(graph.tokens)
    tables = []
    for layer in reversed(range(graph.n_layers)):
        steps = graph.steps(layer)
        through = torch.ones(T, dtype=torch.float64)
        if len(steps) == 2:
            through = torch.zeros_like(through)
            through.index_add_(0, steps[0].target, steps[0].weight.double())
        edges = steps[-1]
        # Where attention reads a lower layer, it is not one edge with the residual.
        apart = (edges.kind == EdgeKind.ATTENTION) & (graph.source_layers[layer] != layer)
        pair = (edges.target * T + edges.source) * 2 + apart
        pair, inverse = torch.unique(pair, return_inverse=True)
        summed = torch.zeros(len(pair), dtype=torch.float64)
        summed.index_add_(0, inverse, edges.weight.double())
        target, source, apart = pair // 2 // T, pair // 2 % T, pair % 2 == 1
        of_layer = _Edges(target, source, summed * through[target])
        tables.append(_with_jumps(graph, layer, of_layer, apart, last=True))
    routes = []
    for weight, chosen in _best_paths(tables, graph.starts, k):
        hops, source = [], graph.position
        for depth, i in enumerate(chosen):
            reader, read = int(tables[depth].target[i]) % T, int(tables[depth].source[i])
            source = read % T
            # A hop within a position counts where it leaves layers out.
            if reader != source or (read >= T and int(tables[depth].target[i]) < T):
                hops.append(_hop(graph, graph.n_layers - 1 - depth, reader, source))
        routes.append(Route(weight, source, hops))
    return routes


def _with_jumps(graph: GraphData, layer: int, edges: _Edges, read: Tensor, *, last: bool) -> _Edges:
    """The edges of a step, those that are `read` [E] leading to the layer whose values they are,
    followed by edges of weight 1 that let nodes of lower layers wait. last: the step down from mid.
    """
    if graph.value_layers is None:
        return edges
    T, at = len(graph.tokens), graph.source_layers[layer]
    target, source, weight = edges
    if at != layer:
        source = torch.where(read, source + T * (at + 1), source)
    waiting = torch.arange(T, T * (layer + 2))
    landed = torch.where(waiting >= T * (layer + 1), waiting % T, waiting) if last else waiting
    ones = torch.ones(len(waiting), dtype=weight.dtype)
    return _Edges(
        torch.cat([target, waiting]), torch.cat([source, landed]), torch.cat([weight, ones])
    )


def _hop(graph: GraphData, layer: int, target: int, source: int) -> Hop:
    table = graph.head_edges
    mine = (table.layer == layer) & (table.target == target) & (table.source == source)
    weight, order = table.weight[mine].sort(descending=True, stable=True)
    heads = table.head[mine][order]
    pairs = list(zip(heads.tolist(), weight.tolist(), strict=True))
    return Hop(layer, target, source, sum(w for _, w in pairs), pairs)


def _best_paths(
    tables: list[_Edges], starts: dict[int, float], k: int
) -> list[tuple[float, list[int]]]:
    """The k heaviest chains of one edge a table, from any of `starts`, which have weights of their
    own: (product, edge index a table).

    tables: top-down. After each table, every node holds its k heaviest chains; all nodes at once.
    """
    k = check_count("k", k)
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
