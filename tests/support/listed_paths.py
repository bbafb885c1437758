"""Every path of a graph, listed one by one, and the importances that follow from the list."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from ifr_fast import RouteGraph
from ifr_fast.graph.tables import EdgeKind, Step

PathNode = tuple[int, str, int]  # layer, kind, position; layer -1 for embeddings


def edges_of(graph: RouteGraph) -> list[Step]:
    rows = zip(*(column.tolist() for column in graph.edges), strict=True)
    return [Step(layer, EdgeKind(kind), t, s, weight) for layer, kind, t, s, weight in rows]


def head_edges_of(graph: RouteGraph) -> list[tuple[int, int, int, int, float]]:
    """Rows of layer, head, target, source, weight."""
    return list(zip(*(column.tolist() for column in graph.head_edges), strict=True))


def target_of(graph: RouteGraph, step: Step) -> PathNode:
    """The node that an edge leads into."""
    reads_pre = step.kind in (EdgeKind.ATTENTION, EdgeKind.RESIDUAL_MID)
    kind = "mid" if reads_pre and not graph.parallel[step.layer] else "post"
    return step.layer, kind, step.target


def walk(graph: RouteGraph) -> Iterator[tuple[float, list[Step], PathNode]]:
    """Every path from the prediction to every node, by recursion: (product, steps, node)."""
    into: dict[PathNode, list[Step]] = defaultdict(list)
    for step in edges_of(graph):
        into[target_of(graph, step)].append(step)
    parallel = graph.parallel.tolist()

    def down(
        node: PathNode, weight: float, steps: list[Step]
    ) -> Iterator[tuple[float, list[Step], PathNode]]:
        yield weight, steps, node
        layer, kind, _ = node
        to_mid = layer >= 0 and kind == "post" and not parallel[layer]
        for step in into[node]:
            pre = graph.source_layers[layer] if step.kind == EdgeKind.ATTENTION else layer
            below = (layer, "mid", step.source) if to_mid else (pre - 1, "post", step.source)
            yield from down(below, weight * step.weight, [*steps, step])

    yield from down((graph.n_layers - 1, "post", graph.position), 1.0, [])


def paths(graph: RouteGraph) -> list[tuple[float, list[Step]]]:
    """Every whole path, from the prediction to an embedding."""
    return [(weight, steps) for weight, steps, node in walk(graph) if node[0] == -1]


def listed_importances(graph: RouteGraph) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Importances of tokens [T], heads [L, H] and FFN blocks [L], float64."""
    flow: dict[PathNode, float] = defaultdict(float)
    for weight, _, node in walk(graph):
        flow[node] += weight
    tokens = torch.tensor(
        [flow[-1, "post", j] for j in range(len(graph.tokens))], dtype=torch.float64
    )
    heads = torch.zeros(graph.n_layers, graph.n_heads, dtype=torch.float64)
    for layer, head, target, _, weight in head_edges_of(graph):
        node = "post" if graph.parallel[layer] else "mid"
        heads[layer, head] += weight * flow[layer, node, target]
    ffn = torch.zeros(graph.n_layers, dtype=torch.float64)
    for step in edges_of(graph):
        if step.kind == EdgeKind.FFN:
            ffn[step.layer] += step.weight * flow[step.layer, "post", step.target]
    return tokens, heads, ffn
