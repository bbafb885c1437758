"""The float64 oracle of whole texts, and the tie rule for comparing graphs with it.

From a model's own account of itself (tiny.account): every part is formed, no part is skipped.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from tiny import LayerAccount
from torch import Tensor

from ifr_fast.graph.tables import EdgeKind
from ifr_fast.routes.route_graph import RouteGraph

TOLERANCE = 1e-5


def proximity(part: Tensor, y: Tensor) -> Tensor:
    """max(|y|_1 - |y - part|_1, 0) over the last dimension (paper section 2.2)."""
    return torch.relu(y.abs().sum(-1) - (y - part).abs().sum(-1))


class LayerImportance(NamedTuple):
    """Dense importances of one layer, float64."""

    residual: Tensor  # [T]
    ffn: Tensor  # [T]
    ffn_residual: Tensor | None  # [T]
    heads: Tensor  # [H, T, T]
    made_by: int | None = None  # the layer whose resid_pre attention's sources are; None: this one


def importances(layer: LayerAccount) -> LayerImportance:
    """Importances of all parts of all nodes of a layer (paper section 2.2)."""
    H, T, _ = layer.pattern.shape
    y = layer.unscaled if layer.resid_mid is None else layer.resid_mid
    u = torch.einsum("jhv,hvd->hjd", layer.v, layer.W_O)  # [H, T, D]
    heads = torch.zeros(H, T, T, dtype=torch.float64)
    for t in range(T):
        if layer.gate is not None:
            u = torch.einsum("jhv,hvd->hjd", layer.v * layer.gate[t], layer.W_O)
        parts = layer.pattern[:, t, : t + 1, None] * u[:, : t + 1]
        if layer.after is not None:
            parts = parts * layer.after[t]
        heads[:, t, : t + 1] = proximity(parts, y[t])
    residual = layer.resid_pre if layer.to_mid is None else layer.to_mid(layer.resid_pre)
    passed = None if layer.to_post is None else layer.to_post(layer.resid_mid)
    states = (residual, layer.resid_mid, layer.unscaled, layer.ffn)
    return shared(*states, heads, passed)._replace(made_by=layer.made_by)


def shared(
    resid_pre: Tensor,
    resid_mid: Tensor | None,
    resid_post: Tensor,
    ffn: Tensor,
    heads: Tensor,
    passed: Tensor | None = None,
) -> LayerImportance:
    """Importances of a layer's parts: its states and its FFN's output, all [T, D], and the
    proximities of its heads' parts [H, T, T]. resid_mid: None in a parallel block. passed: the part
    of resid_mid in resid_post, where it is another; likewise resid_pre is its part.
    """
    parallel = resid_mid is None
    y = resid_post if parallel else resid_mid
    residual = proximity(resid_pre, y)
    of_ffn = proximity(ffn, resid_post)
    shares, heads = _shares([residual, of_ffn] if parallel else [residual], heads)
    if parallel:
        return LayerImportance(shares[0], shares[1], None, heads)
    passed = resid_mid if passed is None else passed
    both, _ = _shares([proximity(passed, resid_post), of_ffn], heads[:0])
    return LayerImportance(shares[0], both[1], both[0], heads)


def _shares(parts: list[Tensor], heads: Tensor) -> tuple[list[Tensor], Tensor]:
    """Proximities over their sum; 1/n each of n parts where the sum is 0."""
    H, T = heads.shape[0], len(parts[0])
    total = heads.sum((0, 2)) + sum(parts) if H else sum(parts)
    flat = total == 0
    n_parts = len(parts) + H * torch.arange(1, T + 1)
    total = torch.where(flat, n_parts, total)
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    return [(p + flat) / total for p in parts], (
        (heads + (flat[:, None] & visible)) / total[:, None] if H else heads
    )


def assert_graph_agrees(
    graph: RouteGraph, layers: list[LayerImportance], tolerance: float = TOLERANCE
) -> None:
    """The tie rule: graph and oracle agree on every node that both reach without crossing an
    edge whose weight is within the tolerance of the threshold, and on weights within it.
    """
    threshold = graph.threshold
    got: dict[tuple[int, EdgeKind, int, int], float] = {}
    for *key, weight in zip(*(column.tolist() for column in graph.edges), strict=True):
        got[key[0], EdgeKind(key[1]), key[2], key[3]] = weight
    assert len(got) == len(graph.edges.layer)
    got_heads: dict[tuple[int, int, int], float] = {}
    for *key, weight in zip(*(column.tolist() for column in graph.head_edges), strict=True):
        got_heads[key[0], key[2], key[3]] = got_heads.get((key[0], key[2], key[3]), 0) + weight

    ties, checked = 0, set()

    def follows(key: tuple[int, EdgeKind, int, int], weight: float, nearest: float) -> bool:
        """Checks one edge; whether it is surely kept."""
        nonlocal ties
        if abs(nearest - threshold) < tolerance:
            ties += 1
            checked.add(key)
            return False
        assert (key in got) == (weight > threshold), (key, weight, got.get(key))
        if key in got:
            assert abs(got[key] - weight) < tolerance, (key, weight, got[key])
            checked.add(key)
            return True
        return False

    reached, waiting = {graph.position}, defaultdict[int, set[int]](set)
    for i in reversed(range(graph.n_layers)):
        layer, below = layers[i], set()
        for t in sorted(reached):
            passes = []
            if layer.ffn_residual is None:
                mid_kind, through = EdgeKind.RESIDUAL_POST, True
                weight = float(layer.ffn[t])
                if follows((i, EdgeKind.FFN, t, t), weight, weight):
                    below.add(t)
            else:
                mid_kind = EdgeKind.RESIDUAL_MID
                for kind, weights in (
                    (EdgeKind.FFN, layer.ffn),
                    (EdgeKind.RESIDUAL_POST, layer.ffn_residual),
                ):
                    weight = float(weights[t])
                    passes.append(follows((i, kind, t, t), weight, weight))
                through = any(passes)
            if not through:
                continue
            weight = float(layer.residual[t])
            if follows((i, mid_kind, t, t), weight, weight):
                below.add(t)
            of_heads = layer.heads[:, t, : t + 1]
            if graph.granularity == "head":
                weights = (of_heads * (of_heads > threshold)).sum(0).tolist()
                closest = (of_heads - threshold).abs().argmin(0, keepdim=True)
                nearest = of_heads.gather(0, closest)[0].tolist()
            else:
                weights = nearest = of_heads.sum(0).tolist()
            for j, (weight, near) in enumerate(zip(weights, nearest, strict=True)):
                if follows((i, EdgeKind.ATTENTION, t, j), weight, near):
                    waiting[i if layer.made_by is None else layer.made_by].add(j)
                    assert abs(got_heads[i, t, j] - weight) < tolerance
        reached = below | waiting[i]
    if ties == 0:
        assert checked == set(got)
