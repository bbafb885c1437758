"""Importances of some rows in float64, by the oracle, head by head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ifr_fast.kernels import reference
from ifr_fast.kernels.contract import AttentionScores, LayerInputs


class Dense(NamedTuple):
    """Importances of R rows."""

    residual: Tensor  # [R]
    head_total: Tensor  # [R, H]
    of_pairs: Tensor  # [R, H, S]


def exact(inputs: LayerInputs) -> Dense:
    """The oracle's, of inputs without an FFN. All keys of one head and row are formed at once."""
    H, group = inputs.q.shape[1], inputs.q.shape[1] // inputs.k.shape[1]
    x = inputs._replace(log_sum_exp=None).to(torch.float64)
    of_heads, residual = [], x.y.new_zeros(len(x.y))
    for h in range(H):
        kv = slice(h // group, h // group + 1)
        one = x._replace(
            q=x.q[:, h : h + 1],
            k=x.k[:, kv],
            v=x.v[:, kv],
            W_O=x.W_O[h : h + 1],
            sinks=None if x.sinks is None else x.sinks[h : h + 1],
        )
        scores = reference.score_attention(one, 0.0)
        total = torch.where(scores.unattributed, 0.0, scores.total)
        residual = scores.residual * total
        dense = x.y.new_zeros(len(x.y), len(x.k))
        edges = scores.edges
        dense[edges.row, edges.source] = edges.head_weight[:, 0] * total[edges.row]
        of_heads.append(dense)
    of_pairs = torch.stack(of_heads, 1)
    total = residual + of_pairs.sum((1, 2))
    return Dense(
        residual / total, of_pairs.sum(-1) / total[:, None], of_pairs / total[:, None, None]
    )


def dense(scores: AttentionScores, chosen: Tensor, n_keys: int) -> Dense:
    """Some rows, by index, of scores; edges with weight 0 are padding."""
    at = chosen.to(scores.residual.device)
    place = torch.full((len(scores.residual),), -1, device=at.device)
    place[at] = torch.arange(len(at), device=at.device)
    edges = scores.edges
    used = (place[edges.row] >= 0) & (edges.weight > 0)
    row, source = place[edges.row[used]], edges.source[used]
    of_pairs = scores.head_total.new_zeros(len(at), scores.head_total.shape[1], n_keys)
    of_pairs[row, :, source] = edges.head_weight[used]
    return Dense(scores.residual[at], scores.head_total[at], of_pairs)


def worst(got: Dense, expected: Dense) -> dict[str, float]:
    """The largest error of each kind; NaN where a value is none."""
    of_tokens = (got.of_pairs.double().sum(1) - expected.of_pairs.sum(1)).abs().max()
    found = {
        name: float((a.double() - b.double()).abs().max())
        for name, a, b in zip(Dense._fields, got, expected, strict=True)
    }
    return found | {"of_tokens": float(of_tokens)}
