"""Routes bottom-up: the nodes that a token's information reaches.

The same sweep as that of token_importance(), the other way: a node's weight is that of all paths
from the token's embedding up to it, so the share of the node that came from the token along the
edges kept. At a prediction's node it is the token's importance for that prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import GraphData
from .flow import LayerFlow, flow_up
from .tables import Node, NodeKind


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


def reach_in_graph(graph: GraphData, source: int) -> Reach:
    """The reach of one token along a graph's edges."""
    return reach_in_layers(graph.flows, graph.parallel.tolist(), source)


def reach_in_layers(layers: Sequence[LayerFlow], parallel: list[bool], source: int) -> Reach:
    """The reach of one token along the edges of all predictions' graphs."""
    top = layers[0].to_mid
    mids, posts = zip(*flow_up(layers, _one_hot(len(top), source).to(top.device)), strict=True)
    mid, post = (torch.stack(flows).float().cpu() for flows in (mids, posts))
    return Reach(source, mid, post, parallel)


def reached_in_graph(graph: GraphData, source: int) -> tuple[Tensor, Tensor]:
    """Flags of the `mid` (in a parallel block, `post`) and the `post` nodes to which a path leads
    from a token: [L, T] bool each. A path of many layers may weigh less than floating point holds.
    """
    connected = [layer.connected() for layer in graph.flows]
    flow = _one_hot(len(graph.tokens), source)
    mids, posts = zip(*flow_up(connected, flow, saturated=True), strict=True)
    return torch.stack(mids) > 0, torch.stack(posts) > 0


def _one_hot(n_tokens: int, source: int) -> Tensor:
    flow = torch.zeros(n_tokens, dtype=torch.float64)
    flow[source] = 1
    return flow
