"""Rows of a layer's inputs: some of them cut out, and their attention weights, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import LayerInputs


def on_device(rows: Tensor, device: torch.device) -> Tensor:
    """Positions [R], int64, from the CPU. The host does not wait for the device: a stretch is made
    there, other positions are copied from pinned memory.
    """
    if device.type != "cuda" or len(rows) == 0 or rows.device.type != "cpu":
        return rows.to(device, torch.int64)
    if bool((rows.diff() == 1).all()):
        return torch.arange(int(rows[0]), int(rows[0]) + len(rows), device=device)
    return rows.to(torch.int64).pin_memory().to(device, non_blocking=True)


def block_of(inputs: LayerInputs, chosen: slice | Tensor) -> LayerInputs:
    """Some of the rows of the inputs (by index, ascending), and the keys that they may see."""
    rows = inputs.rows[chosen]
    n_keys = int(rows[-1]) + 1
    if isinstance(chosen, Tensor):
        chosen = chosen.to(inputs.y.device)

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[chosen]

    return inputs._replace(
        rows=rows,
        resid_pre=inputs.resid_pre[chosen],
        y=inputs.y[chosen],
        q=inputs.q[chosen],
        k=inputs.k[:n_keys],
        v=inputs.v[:n_keys],
        row_scale=cut(inputs.row_scale),
        value_gate=cut(inputs.value_gate),
        log_sum_exp=cut(inputs.log_sum_exp),
        ffn=cut(inputs.ffn),
        offset=cut(inputs.offset),
    )


def by_kv_head(x: Tensor, n_kv_heads: int) -> Tensor:
    """[H, R, N] -> [H_kv, H / H_kv * R, N]: rows that share a KV head, stacked; K/V stay as is."""
    H, R, N = x.shape
    return x.reshape(n_kv_heads, H // n_kv_heads * R, N)


def attention_pattern(inputs: LayerInputs, mask: Tensor) -> Tensor:
    """Attention weights alpha [H, R, S]; mask: bool [R, S], the keys that each row may read."""
    if inputs.pattern is not None:
        return inputs.pattern.weights(inputs.rows, mask.shape[1]).to(inputs.v.dtype)
    H_kv = inputs.k.shape[1]
    R, H, _ = inputs.q.shape
    q = by_kv_head(inputs.q.transpose(0, 1) * inputs.scale, H_kv)
    scores = torch.matmul(q, inputs.k.permute(1, 2, 0)).view(H, R, -1)
    if inputs.softcap is not None:
        scores = scores.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
    if inputs.alibi_slopes is not None:
        rows = inputs.rows.to(scores.device)
        distance = torch.arange(scores.shape[-1], device=scores.device) - rows[:, None]
        scores = scores.addcmul_(inputs.alibi_slopes[:, None, None], distance.to(scores.dtype))
    scores = scores.masked_fill_(~mask, float("-inf"))
    if inputs.log_sum_exp is not None:
        return scores.sub_(inputs.log_sum_exp.T[..., None]).exp_()
    if inputs.sinks is None:
        return scores.softmax(-1)
    top = scores.amax(-1, keepdim=True).maximum(inputs.sinks[:, None, None])
    weight = scores.sub_(top).exp_()
    return weight.div_(weight.sum(-1, keepdim=True) + (inputs.sinks[:, None, None] - top).exp())
