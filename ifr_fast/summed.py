"""A weighted sum of rows as one node, which any kernel scores as it does a row.

With weights w_t, the nodes y_t of a layer's rows t add up to

    sum_t w_t y_t = sum_t w_t resid_pre_t + sum over heads h and keys j of p[h, j]  (+ ...),
    p[h, j] = u[h, j] @ W_O[h],
    u[h, j] = sum_t w_t row_scale_t alpha[h, t, j] (value_gate[t, h] * v[j]),

so the parts are summed in value space, where they have V numbers instead of D. To a kernel, u are
the values of heads that have keys of their own and read all n of them alike: q k^T = 0, so
alpha = 1 / n, and row_scale = n. What is exact for a row (docs/design.md, section 3.1) is exact
for such a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.contract import LayerInputs, visible
from .scoring import Closure, closure


def summed_row(inputs: LayerInputs, weights: Tensor) -> LayerInputs:
    """The sum of the rows of `inputs`, by `weights` [R], as one row at the last one's position.

    In float32 or wider. [H, R, S] is formed in row blocks.
    """
    from .kernels import eager

    dtype = torch.promote_types(inputs.y.dtype, torch.float32)
    inputs, device = inputs.to(dtype), inputs.y.device
    weights = weights.to(device, dtype)
    of_rows = weights if inputs.row_scale is None else weights * inputs.row_scale
    H, V, _ = inputs.W_O.shape
    R, n_keys = len(inputs.rows), int(inputs.rows[-1]) + 1
    by_key = inputs.v.new_zeros(H, n_keys, 1 if inputs.value_gate is None else V)
    step = max(1, eager.BLOCK_ELEMENTS // (H * n_keys))
    for start in range(0, R, step):
        block = eager.block_of(inputs, slice(start, start + step))
        S = len(block.v)
        mask = visible(block.rows, S, block.window).to(device)
        pattern = eager.attention_pattern(block, mask)  # [H, r, S]
        moved = of_rows[start : start + step].expand(H, 1, -1).transpose(1, 2)  # [H, r, 1]
        if block.value_gate is not None:
            moved = moved * block.value_gate.transpose(0, 1)  # [H, r, V]
        by_key[:, :S] += pattern.transpose(1, 2) @ moved
    v = inputs.v[:n_keys].repeat_interleave(H // inputs.v.shape[1], dim=1)  # [n, H, V]
    u = v * by_key.transpose(0, 1)

    def total(x: Tensor) -> Tensor:
        return (weights @ x)[None]

    return LayerInputs(
        rows=inputs.rows[-1:],
        resid_pre=total(inputs.resid_pre),
        y=total(inputs.y),
        q=u.new_zeros(1, H, 1),
        k=u.new_zeros(n_keys, H, 1),
        v=u,
        W_O=inputs.W_O,
        scale=1.0,
        row_scale=u.new_full((1,), n_keys),
        ffn=None if inputs.ffn is None else total(inputs.ffn),
    )


def summed_closure(row: LayerInputs, bias: Tensor, weights: Tensor, dtype: torch.dtype) -> Closure:
    """Of a row that `summed_row` made by `weights` [R] in a block with `bias` [D], what
    `check_closure` takes: its parts must add up to it. dtype: the model's.

    The parts are added up here in full, whatever a kernel made of them.
    """
    from .kernels.breakpoints import signs

    moved = torch.einsum("hv,hvd->d", row.v.sum(0), row.W_O)
    linear = signs(row.y) @ moved
    found = closure(row, linear, bias.to(row.y.dtype) * weights.sum().to(row.y), torch.tensor([0]))
    return found._replace(eps=torch.full_like(found.eps, torch.finfo(dtype).eps))
