"""The float64 oracle of whole texts, and the tie rule for comparing graphs with it.

From a model's own account of itself (tiny.account): every part is formed, no part is skipped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from tiny import LayerAccount
from torch import Tensor

from ifr_fast.graph import EdgeKind, RouteGraph
from ifr_fast.kernels.reference import proximity

TOLERANCE = 1e-5


class LayerImportance(NamedTuple):
    """Dense importances of one layer, float64."""

    residual: Tensor  # [T]
    ffn: Tensor  # [T]
    ffn_residual: Tensor | None  # [T]
    heads: Tensor  # [H, T, T]


def importances(layer: LayerAccount) -> LayerImportance:
    """Importances of all parts of all nodes of a layer (paper section 2.2)."""
    H, T, _ = layer.pattern.shape
    parallel = layer.resid_mid is None
    y = layer.resid_post if parallel else layer.resid_mid
    u = torch.einsum("jhv,hvd->hjd", layer.v, layer.W_O)  # [H, T, D]
    heads = torch.zeros(H, T, T, dtype=torch.float64)
    for t in range(T):
        parts = layer.pattern[:, t, : t + 1, None] * u[:, : t + 1]
        heads[:, t, : t + 1] = proximity(parts, y[t])
    residual = proximity(layer.resid_pre, y)
    ffn = proximity(layer.ffn, layer.resid_post)
    total = heads.sum((0, 2)) + residual + (ffn if parallel else 0)
    assert (total > 0).all()
    if parallel:
        return LayerImportance(residual / total, ffn / total, None, heads / total[:, None])
    passed = proximity(layer.resid_mid, layer.resid_post)
    both = passed + ffn
    assert (both > 0).all()
    return LayerImportance(residual / total, ffn / both, passed / both, heads / total[:, None])


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

    reached = {graph.position}
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
            for j in range(t + 1):
                of_heads = layer.heads[:, t, j]
                if graph.granularity == "head":
                    kept = of_heads > threshold
                    weight = float(of_heads[kept].sum())
                    nearest = float(of_heads[(of_heads - threshold).abs().argmin()])
                    weight = weight if kept.any() else 0.0
                else:
                    weight = nearest = float(of_heads.sum())
                key = (i, EdgeKind.ATTENTION, t, j)
                if follows(key, weight, nearest):
                    below.add(j)
                    assert abs(got_heads[i, t, j] - weight) < tolerance
        reached = below
    if ties == 0:
        assert checked == set(got)
