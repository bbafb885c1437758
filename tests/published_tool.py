"""The published tool's documented arithmetic (docs/design.md, section 3.5), written anew: every
part formed, every distance taken, every edge an `.item()`. In float64 it is what parity is tested
against, in float32 what the tool itself would say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import networkx as nx
import torch
from tiny import LayerAccount
from torch import Tensor


class Layer(NamedTuple):
    """What the tool's model gives of a layer; values without their bias, heads repeated."""

    resid_pre: Tensor  # [T, D]
    resid_mid: Tensor  # [T, D]
    resid_post: Tensor  # [T, D]
    ffn: Tensor  # [T, D]
    pattern: Tensor  # [H, T, T]
    v: Tensor  # [T, H, V]
    W_O: Tensor  # [H, V, D]


def layer_of(account: LayerAccount, value_bias: Tensor | float = 0.0) -> Layer:
    """value_bias: [H, V] to take out of the values."""
    return Layer(
        account.resid_pre,
        account.resid_mid,
        account.resid_post,
        account.ffn,
        account.pattern,
        account.v - value_bias,
        account.W_O,
    )


def decomposed(layer: Layer) -> Tensor:
    """[T, T, H, D], masked pairs included."""
    weighted = torch.einsum("jhv,htj->tjhv", layer.v, layer.pattern)
    return torch.einsum("tjhv,hvd->tjhd", weighted, layer.W_O)


def shares(parts: list[Tensor], whole: Tensor) -> list[Tensor]:
    """Of parts [n, T, D] in lists, to a whole [T, D]; each [n, T]."""
    length = whole.abs().sum(-1)
    scores = []
    for part in parts:
        gap = torch.nn.functional.pairwise_distance(part, whole.expand_as(part), p=1)
        scores.append((length - gap).clamp(min=1e-5))
    total = sum(score.sum(0) for score in scores)
    return [score / total for score in scores]


def layer_shares(layer: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads [T, T, H], residual [T]; FFN [T], its residual [T]."""
    T, H = layer.pattern.shape[1], len(layer.pattern)
    parts = decomposed(layer).permute(1, 2, 0, 3).flatten(0, 1)  # [key * head, T, D]
    heads, residual = shares([parts, layer.resid_pre[None]], layer.resid_mid)
    ffn, passed = shares([layer.ffn[None], layer.resid_mid[None]], layer.resid_post)
    return heads.view(T, H, T).permute(2, 0, 1), residual[0], ffn[0], passed[0]


def cut(
    threshold: float, blocks: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Blocks [T, T, H] by row; blocks [T] by all rows at once."""
    blocks, residual = blocks * (blocks > threshold), residual * (residual > threshold)
    if blocks.ndim == 1:
        total = residual + blocks.sum()
        return blocks / total, residual / total
    total = residual + blocks.sum((1, 2))
    return blocks / total[:, None, None], residual / total


def full_graph(
    layers: list[Layer],
    threshold: float | None = None,
    on_ties: Callable[[int, str, Tensor], None] | None = None,
) -> nx.DiGraph:
    """Edge by edge. on_ties: told (layer, 'mid' or 'post', rows [T] bool) which rows have a
    contribution within 1e-5 of the threshold.
    """
    graph = nx.DiGraph()

    def add(source: str, target: str, weight: float) -> None:
        if graph.has_edge(source, target):
            graph[source][target]["weight"] += weight
        else:
            graph.add_edge(source, target, weight=weight)

    for i, layer in enumerate(layers):
        heads, residual, ffn, passed = layer_shares(layer)
        if threshold is not None:
            if on_ties is not None:
                near = (heads - threshold).abs().flatten(1).amin(-1) < 1e-5
                on_ties(i, "mid", near | ((residual - threshold).abs() < 1e-5))
                near = torch.minimum((ffn - threshold).abs(), (passed - threshold).abs()) < 1e-5
                on_ties(i, "post", near.any().expand(len(near)))
            heads, residual = cut(threshold, heads, residual)
            ffn, passed = cut(threshold, ffn, passed)
        T = len(residual)
        below = f"I{i - 1}_" if i else "X0_"
        for source in range(T):
            for target in range(T):
                weight = heads[target, source].sum().item()
                add(f"{below}{source}", f"A{i}_{target}", weight)
        for t in range(T):
            add(f"{below}{t}", f"A{i}_{t}", residual[t].item())
        for t in range(T):
            add(f"A{i}_{t}", f"M{i}_{t}", ffn[t].item())
            add(f"M{i}_{t}", f"I{i}_{t}", ffn[t].item())
            add(f"A{i}_{t}", f"I{i}_{t}", passed[t].item())
    return graph


def paths(graph: nx.DiGraph, n_layers: int, starts: list[int], threshold: float) -> list[nx.DiGraph]:
    """By networkx's own depth-first search over a filtered view, as the tool searches."""
    backwards = graph.reverse()
    seen = nx.subgraph_view(
        backwards, filter_edge=lambda u, v: backwards[u][v]["weight"] > threshold
    )
    found = []
    for start in starts:
        edges = nx.edge_dfs(seen, source=f"I{n_layers - 1}_{start}")
        found.append(seen.edge_subgraph(edges).reverse())
    return found


def largest_gap(mine: nx.DiGraph, theirs: nx.DiGraph, skip: set[str] = frozenset()) -> float:
    """Of all edges' weights, but those into nodes to skip; an edge that is not there weighs 0."""
    worst = 0.0
    for source, target in {*mine.edges, *theirs.edges}:
        if target in skip:
            continue
        a, b = (g.get_edge_data(source, target, {"weight": 0.0})["weight"] for g in (mine, theirs))
        if math.isnan(a) or math.isnan(b):
            assert math.isnan(a) and math.isnan(b), (source, target, a, b)
            continue
        worst = max(worst, abs(a - b))
    return worst
