"""Importances of two given parts of `resid_post`, which need not add up to it: a norm behind them
has a bias that belongs to no part. Plain torch on any device, for all implementations.

    proximity(part, y) = max(sum_i (|y_i| - |y_i - part_i|), 0)

subtracted coordinate by coordinate: a few huge coordinates of y would swallow the rest of a
difference of two norms.

Shapes: parts and y [R, D], results [R] in float32, or float64 where any of them is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import FFNScores

BLOCK_ELEMENTS = 1 << 22  # of [R, D] that are formed at once


def score_given_ffn(residual: Tensor, ffn: Tensor, y: Tensor) -> FFNScores:
    """Importances of the parts `residual` and `ffn` of y."""
    step = max(1, BLOCK_ELEMENTS // max(1, y.shape[1]))
    split = (x.split(step) for x in (residual, ffn, y))
    blocks = [_score(*rows) for rows in zip(*split, strict=True)]
    return FFNScores(*map(torch.cat, zip(*blocks, strict=True)))


def _score(residual: Tensor, ffn: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(residual.dtype, ffn.dtype), y.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    y = y.to(dtype)
    size = y.abs()
    of_residual, of_ffn = (
        (size - (y - part.to(dtype)).abs()).sum(-1).clamp(min=0) for part in (residual, ffn)
    )
    total = of_residual + of_ffn
    unattributed = total == 0
    half = torch.full_like(total, 0.5)
    total = torch.where(unattributed, 1, total)
    return (
        torch.where(unattributed, half, of_residual / total),
        torch.where(unattributed, half, of_ffn / total),
        unattributed,
    )
