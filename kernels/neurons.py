"""Proximities of an FFN's neurons, by the identity of breakpoints.py.

Neuron i adds p_i = c_i W[i] to its row, c_i its activation. So lin(p_i) = c_i (W[i] . s), for all
neurons one product of W with s. And since |p_i[d]| <= |c_i| w[d] with w[d] = max_i |W[i, d]|,
coordinate d can flip only where |c_i| exceeds its breakpoint |y[d]| / w[d]. With the breakpoints
of a row in order, a neuron's coordinates to visit are a run at their head; those alone are summed.

Shapes: R rows, F neurons, D model width, C visited coordinates. Nothing of [R, F, D] exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .breakpoints import ROUND_UP, breakpoints, signs

VISIT_ELEMENTS = 1 << 20  # coordinates visited at once
PRODUCT_ROWS = 4096  # neurons whose W is converted to float32 at once


def neuron_proximities(c: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """max(|y|_1 - |y - c_i W[i]|_1, 0) of each neuron, exactly.

    c: [R, F] activations, a row's scale included; W: [F, D]; y: [R, D]; floating, any strides.
    Returns [R, F] in float32, or float64 where c or y is.
    """
    wide = torch.promote_types(torch.promote_types(c.dtype, y.dtype), torch.float32)
    c, y = c.to(wide), y.to(wide)
    s = signs(y)
    lin = torch.cat([rows.to(wide) @ s.T for rows in W.split(PRODUCT_ROWS)]).T * c  # [R, F]
    largest = W.abs().amax(0).to(wide)[None]  # [1, D]
    points, order = breakpoints(y, largest)[0].sort(-1)  # [R, D]
    reach = torch.where(lin > 0, c.abs() * ROUND_UP, 0).contiguous()
    length = torch.searchsorted(points, reach)  # [R, F] coordinates with a breakpoint below
    for r in range(len(y)):
        listed = length[r].nonzero().squeeze(1)
        for mine in _pieces(listed, length[r, listed]):
            lin[r, mine] -= _correction(c[r], W, y[r] * s[r], s[r], order[r], mine, length[r, mine])
    return lin.clamp_(min=0)


def _correction(
    c: Tensor, W: Tensor, size: Tensor, s: Tensor, order: Tensor, mine: Tensor, length: Tensor
) -> Tensor:
    """correction(p_i) of the neurons `mine` of a row whose |y| is `size` [D]. Each visits the first
    `length` coordinates of `order` [D].
    """
    neuron = mine.repeat_interleave(length)  # [C]
    begins = (length.cumsum(0) - length).repeat_interleave(length)
    d = order[torch.arange(len(neuron), device=order.device) - begins]
    over = (c[neuron] * W[neuron, d].to(c.dtype) * s[d] - size[d]).clamp_(min=0)
    return 2 * torch.segment_reduce(over, "sum", lengths=length)


def _pieces(listed: Tensor, length: Tensor) -> list[Tensor]:
    """The neurons in runs of about VISIT_ELEMENTS coordinates, or of one neuron."""
    if len(listed) == 0:
        return []
    piece = (length.cumsum(0) - length) // VISIT_ELEMENTS
    return list(listed.split(torch.unique_consecutive(piece, return_counts=True)[1].tolist()))
