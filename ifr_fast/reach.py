"""Routes bottom-up: what a token's information reaches.

The same sweep as that of token_importance(), the other way: a node's weight is that of all paths
from the token's embedding up to it, so the share of the node that came from the token along the
edges kept. At a prediction's node it is the token's importance for that prediction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .graph import AllStep, Node, NodeKind, RouteGraph, Routes


@dataclass(frozen=True, eq=False)
class Reach:
    """The weight of all paths from one token up to each node."""

    source: int
    mid: Tensor  # [L, T] float32; in a parallel block what `post` has
    post: Tensor  # [L, T] float32
    parallel: list[bool]  # [L]

    @property
    def predictions(self) -> Tensor:
        """[T] float32: the token's importance for the prediction after each position.

        Of a single graph: 0 wherever it explains no prediction.
        """
        return self.post[-1]

    def nodes(self, threshold: float = 0.0) -> list[tuple[Node, float]]:
        """The nodes reached with a weight above `threshold`, the strongest first."""
        found = []
        for kind, weights in ((NodeKind.MID, self.mid), (NodeKind.POST, self.post)):
            layers, positions = (weights > threshold).nonzero(as_tuple=True)
            for layer, position in zip(layers.tolist(), positions.tolist(), strict=True):
                if kind == NodeKind.POST or not self.parallel[layer]:
                    found.append((Node(layer, kind, position), float(weights[layer, position])))
        return sorted(found, key=lambda entry: (-entry[1], entry[0]))


def reach_in_graph(graph: RouteGraph, source: int) -> Reach:
    """Along a graph's edges."""
    return _reach(source, *_flows(graph, source), graph.parallel.tolist())


def reached_in_graph(graph: RouteGraph, source: int) -> tuple[Tensor, Tensor]:
    """Whether a path leads from a token to each `mid` (in a parallel block, `post`) and `post`:
    [L, T] bool each. A path of many layers may weigh less than floating point holds.
    """
    mids, posts = _flows(graph, source, weighted=False)
    return torch.stack(mids) > 0, torch.stack(posts) > 0


def _flows(
    graph: RouteGraph, source: int, weighted: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer, what reaches `mid` and `post`: the weight of all paths, or 1."""
    flow = _one_hot(len(graph.tokens), source)
    mids, posts = [], []
    for layer in range(graph.n_layers):
        for step in reversed(graph.steps(layer)):
            carried = flow[step.source] * step.weight.double() if weighted else flow[step.source]
            flow = torch.zeros_like(flow).index_add_(0, step.target, carried)
            flow = flow if weighted else flow.clamp_(max=1)
            mids.append(flow)
        posts.append(mids[-1] if graph.parallel[layer] else mids.pop())
    return mids, posts


def reach_in_routes(routes: Routes, source: int) -> Reach:
    """Along the edges of all predictions' graphs."""
    flow = _one_hot(len(routes), source).to(routes.layers[0].rows.device)
    mids, posts = [], []
    for table in routes.layers:
        step = AllStep.of(table, routes.threshold, routes.granularity)
        carried = flow[step.source] * step.edge_weight.double()
        mids.append((flow * step.to_pre).index_add(0, step.target, carried))
        flow = mids[-1] * step.to_mid
        posts.append(flow)
    return _reach(source, mids, posts, [table.ffn_residual is None for table in routes.layers])


def _one_hot(n_tokens: int, source: int) -> Tensor:
    flow = torch.zeros(n_tokens, dtype=torch.float64)
    flow[source] = 1
    return flow


def _reach(source: int, mids: list[Tensor], posts: list[Tensor], parallel: list[bool]) -> Reach:
    mid, post = (torch.stack(flows).float().cpu() for flows in (mids, posts))
    return Reach(source, mid, post, parallel)
