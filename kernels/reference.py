"""The oracle: every part is formed and every distance taken, as in docs/design.md, section 3.

Slow and large by intent ([S, H, D] for each row). All fast kernels are tested against its float64;
other dtypes are computed as they come.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .contract import AttentionScores, EdgeList, FFNScores, LayerInputs, visible

TAKES_PATTERNS = True  # LayerInputs.pattern


def proximity(part: Tensor, y: Tensor, offset: Tensor | float = 0, floor: float = 0) -> Tensor:
    """max(|y|_1 - |y - part|_1 + offset, floor) over the last dimension (paper section 2.2).

    part: [..., D], y: broadcastable to it. Returns [...]. Subtracted coordinate by coordinate: a
    few huge coordinates of y would swallow the rest of a difference of two norms.
    """
    return ((y.abs() - (y - part).abs()).sum(-1) + offset).clamp(min=floor)


def attention_pattern(inputs: LayerInputs) -> Tensor:
    """Attention weights alpha [R, H, S] of the rows, zero where a key is not visible."""
    if inputs.pattern is not None:
        weights = inputs.pattern.weights(inputs.rows, len(inputs.v)).transpose(0, 1)
        return weights.to(inputs.v.dtype)
    group = inputs.q.shape[1] // inputs.k.shape[1]
    k = inputs.k.repeat_interleave(group, dim=1)  # [S, H, K]
    scores = torch.einsum("rhk,shk->rhs", inputs.q, k) * inputs.scale
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    rows = inputs.rows.to(scores.device)
    keys = torch.arange(k.shape[0], device=scores.device)
    if inputs.alibi_slopes is not None:
        distance = (keys - rows[:, None]).to(scores.dtype)  # [R, S]
        scores = scores + inputs.alibi_slopes[:, None] * distance[:, None]
    mask = visible(rows, k.shape[0], inputs.window)[:, None]  # [R, 1, S]
    scores = scores.masked_fill(~mask, float("-inf"))
    if inputs.sinks is not None:
        sinks = inputs.sinks.to(scores.dtype)[:, None].expand(len(rows), -1, 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    return scores.softmax(-1)


def score_attention(inputs: LayerInputs, keep: float) -> AttentionScores:
    """Importances of all parts of the rows' nodes (contract.py); edges with weight > `keep`."""
    R, H, _ = inputs.q.shape
    group = H // inputs.v.shape[1]
    alpha = attention_pattern(inputs)
    v = inputs.v.repeat_interleave(group, dim=1)  # [S, H, V]
    mask = visible(inputs.rows.to(v.device), v.shape[0], inputs.window)  # [R, S]

    residual = v.new_empty(R)
    ffn = None if inputs.ffn is None else v.new_empty(R)
    importance = v.new_empty(R, H, v.shape[0])
    unattributed = torch.empty(R, dtype=torch.bool, device=v.device)
    linear, sums = v.new_empty(R), v.new_empty(R)
    for i in range(R):
        y, offset = inputs.y[i], 0.0 if inputs.offset is None else inputs.offset[i]
        score = partial(proximity, y=y, offset=offset, floor=inputs.floor)
        weighted = alpha[i].T[..., None] * v  # [S, H, V]
        if inputs.value_gate is not None:
            weighted = weighted * inputs.value_gate[i]
        parts = torch.einsum("shv,hvd->shd", weighted, inputs.W_O)
        if inputs.row_scale is not None:
            parts = parts * inputs.row_scale[i]
        of_pairs = score(parts).T * mask[i]  # [H, S]
        linear[i] = torch.where(y >= 0, 1, -1).to(y.dtype) @ parts.sum((0, 1))
        of_residual = score(inputs.resid_pre[i])
        of_ffn = y.new_zeros(()) if inputs.ffn is None else score(inputs.ffn[i])
        total = of_pairs.sum() + of_residual + of_ffn
        unattributed[i] = total == 0
        if total == 0:
            n_parts = 1 + H * mask[i].sum() + (inputs.ffn is not None)
            of_pairs = mask[i].to(v.dtype).expand(H, -1)
            of_residual = of_ffn = y.new_ones(())
            total = n_parts.to(v.dtype)
        sums[i] = total
        importance[i] = of_pairs / total
        residual[i] = of_residual / total
        if ffn is not None:
            ffn[i] = of_ffn / total

    token_weight = importance.sum(1).clamp(max=1)  # [R, S]
    row, source = (token_weight > keep).nonzero(as_tuple=True)
    edges = EdgeList(row, source, token_weight[row, source], importance[row, :, source])
    head_total = importance.sum(-1).clamp(max=1)
    return AttentionScores(residual, ffn, head_total, edges, unattributed, linear, sums)


def score_ffn(resid_mid: Tensor, resid_post: Tensor) -> FFNScores:
    """Importances of `resid_mid` [R, D], and of what the FFN adds to it, in `resid_post` [R, D]."""
    residual = proximity(resid_mid, resid_post)
    ffn = proximity(resid_post - resid_mid, resid_post)
    total = residual + ffn
    unattributed = total == 0
    half = torch.full_like(total, 0.5)
    return FFNScores(
        torch.where(unattributed, half, residual / total),
        torch.where(unattributed, half, ffn / total),
        unattributed,
    )
