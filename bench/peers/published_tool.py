"""The LM Transparency Tool's documented arithmetic (docs/design.md, section 3.5), written anew:
every part formed, every distance taken, the graph filled edge by edge with `.item()`.

In float64 it is what parity is tested against; in float32 it strays from that as the tool does, and
takes the time that the tool's way takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import networkx as nx
import torch
from torch import Tensor

TIE = 1e-5
_NO_EDGE = {"weight": 0.0}


class Layer(NamedTuple):
    """A layer as the tool's model holds it; values without their bias, repeated to all heads."""

    resid_pre: Tensor  # [T, D]
    resid_mid: Tensor  # [T, D]
    resid_post: Tensor  # [T, D]
    ffn: Tensor  # [T, D]
    pattern: Tensor  # [H, T, T]
    v: Tensor  # [T, H, V]
    W_O: Tensor  # [H, V, D]

    def to(self, dtype: torch.dtype) -> Layer:
        return Layer(*(x.to(dtype) for x in self))


class Shares(NamedTuple):
    """Contributions of a layer's parts."""

    heads: Tensor  # [T, T, H] by row, key
    residual: Tensor  # [T]
    ffn: Tensor  # [T]
    ffn_residual: Tensor  # [T]


def decomposed(layer: Layer) -> Tensor:
    """[T, T, H, D], later keys included."""
    weighted = torch.einsum("jhv,htj->tjhv", layer.v, layer.pattern)
    return torch.einsum("tjhv,hvd->tjhd", weighted, layer.W_O)


def shares(layer: Layer) -> Shares:
    """Contributions of attention's parts and resid_pre, and of the FFN's output and resid_mid."""
    T, H = layer.pattern.shape[1], len(layer.pattern)
    parts = decomposed(layer).permute(1, 2, 0, 3).flatten(0, 1)  # [key, head] as one, T, D
    into_mid = _shares(torch.cat([parts, layer.resid_pre[None]]), layer.resid_mid)
    ffn, passed = _shares(torch.stack([layer.ffn, layer.resid_mid]), layer.resid_post)
    return Shares(into_mid[:-1].view(T, H, T).permute(2, 0, 1), into_mid[-1], ffn, passed)


def _shares(parts: Tensor, whole: Tensor) -> Tensor:
    """Contributions [n, T] of parts [n, T, D] to a whole [T, D]."""
    gap = torch.nn.functional.pairwise_distance(parts, whole.expand_as(parts), p=1)
    scores = (whole.abs().sum(-1) - gap).clamp(min=1e-5)
    return scores / scores.sum(0)


def cut(threshold: float, x: Shares) -> Shares:
    """Contributions above the threshold, renormalized: attention by row, the FFN over all rows."""
    heads, residual, ffn, passed = (y.where(y > threshold, 0) for y in x)
    total = residual + heads.sum((1, 2))
    ffn_total = passed + ffn.sum()
    return Shares(
        heads / total[:, None, None], residual / total, ffn / ffn_total, passed / ffn_total
    )


def ties(threshold: float, x: Shares) -> tuple[Tensor, bool]:
    """Rows [T] with a contribution after attention that rounding might put on the other side of the
    threshold; whether there is one after the FFN, on which all rows depend.
    """
    near = [(y - threshold).abs() < TIE for y in x]
    return near[0].flatten(1).any(-1) | near[1], bool((near[2] | near[3]).any())


def full_graph(layers: Iterable[Shares], threshold: float | None = None) -> nx.DiGraph:
    """The full graph, filled edge by edge."""
    graph = nx.DiGraph()

    def add(source: str, target: str, weight: float) -> None:
        before = graph.get_edge_data(source, target, _NO_EDGE)["weight"]
        graph.add_edge(source, target, weight=before + weight)

    for i, whole in enumerate(layers):
        x = whole if threshold is None else cut(threshold, whole)
        below = f"I{i - 1}" if i else "X0"
        n_tokens = len(x.residual)
        for t in range(n_tokens):
            for j in range(n_tokens):
                add(f"{below}_{j}", f"A{i}_{t}", x.heads[t, j].sum().item())
            add(f"{below}_{t}", f"A{i}_{t}", x.residual[t].item())
            add(f"A{i}_{t}", f"M{i}_{t}", x.ffn[t].item())
            add(f"M{i}_{t}", f"I{i}_{t}", x.ffn[t].item())
            add(f"A{i}_{t}", f"I{i}_{t}", x.ffn_residual[t].item())
    return graph


def paths(
    graph: nx.DiGraph, n_layers: int, starts: Iterable[int], threshold: float
) -> list[nx.DiGraph]:
    """Edges above the threshold that lead to each start's prediction: networkx's search,
    downwards, of a filtered view of the graph turned around.
    """
    down = graph.reverse()
    above = nx.subgraph_view(down, filter_edge=lambda u, v: down.adj[u][v]["weight"] > threshold)
    found = []
    for start in starts:
        walk = list(nx.edge_dfs(above, f"I{n_layers - 1}_{start}"))
        found.append(graph.edge_subgraph([(v, u) for u, v in walk]).copy())
    return found
