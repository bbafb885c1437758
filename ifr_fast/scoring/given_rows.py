"""Rows whose attention weights are supplied, not computed from q and k, and weighted sums of rows.

A part p[h, j] = alpha (gate * v[j]) @ W_O[h] = u[h, j] @ W_O[h] depends on weights and values
through u [S, H, V] alone. A kernel takes u as the values of heads whose keys all get the same
weight: q k^T = 0, so alpha = 1 / S, and row_scale = S. The u of several rows lie end to end,
[R * S, H, V], and a window of S keys restricts each row to its own u. So every kernel scores these
rows unchanged, and a method that is exact for a row (docs/design.md, section 3.1) is exact here.

A sum of rows by weights w_t is one row of this form: its parts are added up in value space, where
they have V numbers instead of D,

    sum_t w_t y_t = sum_t w_t resid_pre_t + sum over h and j of u[h, j] @ W_O[h]  (+ ...),
    u[h, j] = sum_t w_t row_scale_t alpha[h, t, j] (value_gate[t, h] * v[j]).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.contract import AttentionScores, EdgeList, LayerInputs, visible
from .closure import closure_of
from .implementations import Kernel, kernel_of


def given_rows(
    u: Tensor, W_O: Tensor, resid_pre: Tensor, y: Tensor, ffn: Tensor | None = None
) -> LayerInputs:
    """The rows with weighted values u [R, S, H, V]; W_O [H, V, D]; resid_pre, y, ffn [R, D].

    In a kernel's result, row r is numbered r, and its key j is numbered r * S + j.
    """
    R, S, H, V = u.shape
    return LayerInputs(
        rows=torch.arange(1, R + 1) * S - 1,
        resid_pre=resid_pre,
        y=y,
        q=u.new_zeros(R, H, 1),
        k=u.new_zeros(R * S, H, 1),
        v=u.reshape(R * S, H, V),
        W_O=W_O,
        scale=1.0,
        row_scale=u.new_full((R,), S),
        window=S,
        ffn=ffn,
    )


def score_given(
    kernel: Kernel, inputs: LayerInputs, positions: Tensor, keep: float
) -> AttentionScores:
    """Scores of `given_rows` at `positions` [R], ascending; edge sources are key positions.

    A row reads no later key: its u is 0 there.
    """
    R, H = len(positions), inputs.v.shape[1]
    S = len(inputs.v) // R
    scores = kernel_of(kernel, inputs).score_attention(inputs, keep)
    flat = scores.unattributed
    positions = positions.to(flat.device)
    row, source, weight, head_weight = scores.edges
    source = source % S
    real = (source <= positions[row]) & (weight > 0)
    row, source, weight, head_weight = (x[real] for x in (row, source, weight, head_weight))
    residual, ffn, head_total = scores.residual, scores.ffn, scores.head_total
    total = scores.total
    if bool(flat.any()):
        # The kernel gave each of n parts 1/n with S keys in n, but a row has fewer keys.
        n_keys = (positions + 1).to(residual.dtype)
        share = 1 / (1 + H * n_keys + (ffn is not None))
        total = total.where(~flat, 1 / share)
        residual = residual.where(~flat, share)
        ffn = None if ffn is None else ffn.where(~flat, share)
        head_total = head_total.where(~flat[:, None], (share * n_keys)[:, None])
        row, source, weight, head_weight = _without(flat, row, source, weight, head_weight)
        kept = flat & (H * share > keep)
        keys = torch.arange(S, device=flat.device)
        added, key = ((keys <= positions[:, None]) & kept[:, None]).nonzero(as_tuple=True)
        row, source = torch.cat([row, added]), torch.cat([source, key])
        weight = torch.cat([weight, H * share[added]])
        head_weight = torch.cat([head_weight, share[added, None].expand(-1, H)])
    edges = EdgeList(row, source, weight, head_weight)
    return AttentionScores(residual, ffn, head_total, edges, flat, scores.linear, total)


def _without(flat: Tensor, row: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    stays = ~flat[row]
    return tuple(x[stays] for x in (row, *columns))


def summed_row(inputs: LayerInputs, weights: Tensor) -> LayerInputs:
    """The sum of the rows of `inputs` by `weights` [R], as one row at the last position, in float32
    or wider. [H, R, S] is formed in row blocks.
    """
    from ..kernels.eager import BLOCK_ELEMENTS
    from ..kernels.rows import attention_pattern, block_of

    dtype = torch.promote_types(inputs.y.dtype, torch.float32)
    inputs, device = inputs.to(dtype), inputs.y.device
    weights = weights.to(device, dtype)
    of_rows = weights if inputs.row_scale is None else weights * inputs.row_scale
    H, V, _ = inputs.W_O.shape
    R, n_keys = len(inputs.rows), int(inputs.rows[-1]) + 1
    by_key = inputs.v.new_zeros(H, n_keys, 1 if inputs.value_gate is None else V)
    step = max(1, BLOCK_ELEMENTS // (H * n_keys))
    for start in range(0, R, step):
        block = block_of(inputs, slice(start, start + step))
        S = len(block.v)
        mask = visible(block.rows, S, block.window).to(device)
        pattern = attention_pattern(block, mask)  # [H, r, S]
        moved = of_rows[start : start + step].expand(H, 1, -1).transpose(1, 2)  # [H, r, 1]
        if block.value_gate is not None:
            moved = moved * block.value_gate.transpose(0, 1)  # [H, r, V]
        by_key[:, :S] += pattern.transpose(1, 2) @ moved
    v = inputs.v[:n_keys].repeat_interleave(H // inputs.v.shape[1], dim=1)  # [S, H, V]

    def total(x: Tensor) -> Tensor:
        return (weights @ x)[None]

    return given_rows(
        (v * by_key.transpose(0, 1))[None],
        inputs.W_O,
        total(inputs.resid_pre),
        total(inputs.y),
        None if inputs.ffn is None else total(inputs.ffn),
    )


def rows_closure(inputs: LayerInputs, bias: Tensor) -> Tensor:
    """[R] `closure_errors` of the rows of `inputs`, whose parts and `bias` ([D] or [R, D]) must add
    up to them. The parts are added up here, not by a kernel. [H, R, S] is formed in row blocks.
    """
    from ..kernels.breakpoints import signs
    from ..kernels.eager import BLOCK_ELEMENTS
    from ..kernels.rows import attention_pattern, block_of

    dtype = torch.promote_types(inputs.y.dtype, torch.float32)
    eps, inputs = torch.finfo(inputs.y.dtype).eps, inputs.to(dtype)
    H, n_keys = inputs.q.shape[1], int(inputs.rows[-1]) + 1
    step = max(1, BLOCK_ELEMENTS // (H * n_keys))
    errors = []
    for start in range(0, len(inputs.rows), step):
        block = block_of(inputs, slice(start, start + step))
        mask = visible(block.rows, len(block.v), block.window).to(block.y.device)
        v = block.v.repeat_interleave(H // block.v.shape[1], dim=1)  # [S, H, V]
        z = torch.einsum("hrs,shv->rhv", attention_pattern(block, mask), v)
        if block.value_gate is not None:
            z = z * block.value_gate
        moved = torch.einsum("rhv,hvd->rd", z, block.W_O)
        linear = (signs(block.y) * moved).sum(-1)
        if block.row_scale is not None:
            linear = linear * block.row_scale
        constant = bias if bias.ndim == 1 else bias[start : start + step]
        errors.append(closure_of(block, linear, constant.to(block.y), eps))
    return torch.cat(errors)
