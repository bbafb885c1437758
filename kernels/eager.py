"""The fast exact algorithm in plain torch, on any device (docs/design.md, section 3.1).

For a block of rows:

1. alpha = softmax(q k^T), lin = alpha * (g v^T), a = alpha * |v|: attention-shaped products;
2. pairs with lin > 0 and a above their (row, head)'s smallest breakpoint are listed;
3. each listed pair gets the correction over the coordinates whose breakpoint is below a,
   and over no others: breakpoints are sorted within each (row, head), a pair's coordinates are
   the first of its row's, and all these runs are laid end to end;
4. denominators, sums over heads, edges above `keep`.

Shapes: R rows, S keys, H heads, D model width, V value width; P listed pairs, C visited
coordinates. Largest intermediates: [H, R, S] and [H, R, D] a block, [P, V], [C]. Sums are in
float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .breakpoints import ROUND_UP, breakpoints, column_norms, signs, value_space_signs
from .contract import AttentionScores, EdgeList, FFNScores, LayerInputs, visible
from .precision import exact_products
from .rows import attention_pattern, block_of, by_kv_head

TAKES_PATTERNS = True  # LayerInputs.pattern
BLOCK_ROWS = 128  # in a row block, at most
BLOCK_ELEMENTS = 1 << 21  # of [H, R, S] and of [H, R, D] in a row block
VISIT_ELEMENTS = 1 << 20  # coordinates visited at once
SPARSE_PRODUCTS = ("cpu", "cuda")  # devices that have torch.sparse.sampled_addmm

# Torch warns once a process that sparse CSR is in beta. The warning is triggered and hidden here:
# filters belong to the process and cannot be changed while threads score.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], torch.empty(0), (1, 1))


@exact_products()
def score_attention(inputs: LayerInputs, keep: float) -> AttentionScores:
    """Importances of all parts of the rows' nodes (contract.py); edges with weight > `keep`.

    On a GPU the host reads the sizes of the lists. Edges there are padded to 1/keep slots a row, as
    many as there can be, since a row's importances sum to 1.
    """
    inputs = inputs.to(_compute_dtype(inputs.y))
    R, H, _ = inputs.q.shape
    rho = column_norms(inputs.W_O)
    v_norm = torch.linalg.vector_norm(inputs.v, dim=-1).T  # [H_kv, S]
    parts = []
    start = 0
    while start < R:
        n_keys = int(inputs.rows[min(start + BLOCK_ROWS, R) - 1]) + 1
        widest = H * max(n_keys, inputs.y.shape[1])
        stop = min(R, start + max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // widest)))
        parts.append(_score_block(block_of(inputs, slice(start, stop)), rho, v_norm, keep, start))
        start = stop
    residual, ffn, head_total, edges, unattributed, linear, total = zip(*parts, strict=True)
    return AttentionScores(
        torch.cat(residual),
        None if inputs.ffn is None else torch.cat(ffn),
        torch.cat(head_total),
        EdgeList(*(torch.cat(column) for column in zip(*edges, strict=True))),
        torch.cat(unattributed),
        torch.cat(linear),
        torch.cat(total),
    )


def score_ffn(resid_mid: Tensor, resid_post: Tensor) -> FFNScores:
    """Importances of `resid_mid` [R, D], and of what the FFN adds to it, in `resid_post` [R, D]."""
    dtype = _compute_dtype(resid_post)
    resid_mid, resid_post = resid_mid.to(dtype), resid_post.to(dtype)
    residual = _proximity(resid_mid, resid_post)
    ffn = _proximity(resid_post - resid_mid, resid_post)
    total = residual + ffn
    unattributed = total == 0
    total = total + unattributed  # 0 / 1 there, overwritten next
    return FFNScores(
        (residual / total).masked_fill_(unattributed, 0.5),
        (ffn / total).masked_fill_(unattributed, 0.5),
        unattributed,
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _proximity(part: Tensor, y: Tensor, offset: Tensor | float = 0.0, floor: float = 0.0) -> Tensor:
    """max(|y|_1 - |y - part|_1 + offset, floor), coordinate by coordinate: [R, D], [R, D] -> [R].

    offset: [R]
    """
    return (y.abs() - (y - part).abs()).sum(-1).add_(offset).clamp_(min=floor)


def _score_block(
    inputs: LayerInputs, rho: Tensor, v_norm: Tensor, keep: float, first_row: int
) -> AttentionScores:
    R, H, _ = inputs.q.shape
    S, H_kv, _ = inputs.v.shape
    mask = visible(inputs.rows, S, inputs.window).to(inputs.v.device)  # [R, S]
    s = signs(inputs.y)
    g = value_space_signs(inputs.W_O, s)  # [H, R, V]

    weight = attention_pattern(inputs, mask)  # [H, R, S]
    if inputs.row_scale is not None:
        weight.mul_(inputs.row_scale[:, None])
    if inputs.value_gate is None:
        a = weight.abs().view(H_kv, -1, S).mul_(v_norm[:, None, :S]).view(H, R, S)
    else:
        gate = inputs.value_gate.transpose(0, 1)  # [H, R, V]
        g = g * gate
        squares = torch.matmul(by_kv_head(gate.square(), H_kv), inputs.v.square().permute(1, 2, 0))
        a = squares.sqrt_().view(H, R, S).mul_(weight.abs())
    lin = torch.matmul(by_kv_head(g, H_kv), inputs.v.permute(1, 2, 0)).view(H, R, S).mul_(weight)
    linear = lin.sum((0, 2))
    offset = 0.0 if inputs.offset is None else inputs.offset
    if inputs.offset is not None:
        lin.add_(inputs.offset[:, None])

    y_points = breakpoints(inputs.y, rho)  # [H, R, D]
    a.mul_(ROUND_UP).masked_fill_(lin <= inputs.floor, 0)
    listed = (a > y_points.amin(-1, keepdim=True)).flatten().nonzero().squeeze(1)  # [P]
    if len(listed):
        correction = _corrections(inputs, listed, weight, a, y_points)
        lin.view(-1).index_add_(0, listed, correction, alpha=-1)

    of_pairs = lin.clamp_(min=inputs.floor)
    if inputs.floor > 0 or inputs.offset is not None:
        of_pairs.masked_fill_(~mask, 0)
    of_residual = _proximity(inputs.resid_pre, inputs.y, offset, inputs.floor)
    total = of_pairs.sum((0, 2)) + of_residual
    n_parts = 1 + H * mask.sum(-1)
    of_ffn = None
    if inputs.ffn is not None:
        of_ffn = _proximity(inputs.ffn, inputs.y, offset, inputs.floor)
        total = total + of_ffn
        n_parts = n_parts + 1
    unattributed = total == 0
    # If every proximity is 0, each of the n parts gets proximity 1 of a total of n.
    total = torch.where(unattributed, n_parts.to(total.dtype), total)
    importance = of_pairs.add_((unattributed[:, None] & mask).to(of_pairs.dtype))
    importance.div_(total[:, None])
    return AttentionScores(
        (of_residual + unattributed) / total,
        None if of_ffn is None else (of_ffn + unattributed) / total,
        importance.sum(-1).clamp_(max=1).T,
        _compact(importance, keep, first_row),
        unattributed,
        linear,
        total,
    )


def _corrections(
    inputs: LayerInputs,
    listed: Tensor,  # [P] int64, ascending places in [H, R, S]
    weight: Tensor,  # [H, R, S]
    a: Tensor,  # [H, R, S]
    y_points: Tensor,  # [H, R, D]
) -> Tensor:
    """correction(p) [P] of the listed pairs (breakpoints.py)."""
    (H, R, D), (S, H_kv, _) = y_points.shape, inputs.v.shape
    segment, j = listed // S, listed % S  # segment: (head, row)
    h, r = segment // R, segment % R
    a_max = a.amax(-1, keepdim=True)
    weight, a = (x.view(-1).index_select(0, listed) for x in (weight, a))  # [P]
    # Non-negative floats are ordered as their bits are, so (head, row) and breakpoint make one
    # integer key, and one sort and one search serve all ragged runs.
    candidate = (y_points < a_max).flatten().nonzero().squeeze(1)
    keys, order = _key(candidate // D, y_points.view(-1).index_select(0, candidate)).sort()
    candidate = candidate.index_select(0, order)
    column = (candidate // (R * D) * D + candidate % D).int()  # of W_O as [V, H * D]
    y = inputs.y.reshape(-1).index_select(0, candidate % (R * D))
    s = signs(y)
    starts = torch.searchsorted(keys, torch.arange(H * R, device=keys.device) << 32, out_int32=True)
    run_start = starts.index_select(0, segment)
    run_length = torch.searchsorted(keys, _key(segment, a), out_int32=True) - run_start  # [P]

    W_O = inputs.W_O.permute(0, 2, 1).reshape(H * D, -1)
    values = inputs.v.reshape(S * H_kv, -1).index_select(0, j * H_kv + h // (H // H_kv))  # [P, V]
    values.mul_(weight[:, None])
    if inputs.value_gate is not None:
        values.mul_(inputs.value_gate[r, h])
    correction = torch.empty_like(a)
    for mine in _pieces(run_length):
        length = run_length[mine]
        ends = length.cumsum(0, dtype=torch.int32)
        # Runs lie end to end: a visit's place in its run is its place less the run's start.
        shift = (run_start[mine] - ends + length).repeat_interleave(length)  # [C]
        visit = shift.add_(torch.arange(len(shift), dtype=torch.int32, device=shift.device))
        over = _sampled_product(
            values[mine],
            W_O.T,
            torch.cat([ends.new_zeros(1), ends]),
            column.index_select(0, visit),
            y.index_select(0, visit),
        )  # p_i - y_i
        over = over.mul_(s.index_select(0, visit)).clamp_(min=0)  # s_i p_i - |y_i|
        correction[mine] = torch.segment_reduce(over, "sum", lengths=length)
    return correction.mul_(2)


def _sampled_product(x: Tensor, W: Tensor, ends: Tensor, column: Tensor, y: Tensor) -> Tensor:
    """x @ W - y at chosen places only: [P, V], [V, N] -> [C], row by row.

    ends: [P + 1], 0 and the end of each row's places; column, y: [C].
    """
    if x.device.type not in SPARSE_PRODUCTS:
        row = torch.arange(len(x), device=x.device).repeat_interleave(ends.diff())
        return (x.index_select(0, row) * W.T.index_select(0, column)).sum(-1) - y
    places = torch.sparse_csr_tensor(ends, column, y, (len(x), W.shape[1]))
    return torch.sparse.sampled_addmm(places, x, W, beta=-1).values()


def _key(segment: Tensor, value: Tensor) -> Tensor:
    """One int64 that orders by (segment, value): for value >= 0, in float32."""
    bits = value.to(torch.float32).view(torch.int32)
    return (segment << 32) | bits.to(torch.int64)


def _pieces(run_length: Tensor) -> list[slice]:
    """Cuts the pairs into slices of at most VISIT_ELEMENTS coordinates (or one pair)."""
    total = run_length.cumsum(0)
    n = len(run_length)
    pieces, start, done = [], 0, 0
    while start < n:
        stop = int(torch.searchsorted(total, done + VISIT_ELEMENTS, right=True))
        stop = min(max(stop, start + 1), n)
        pieces.append(slice(start, stop))
        start, done = stop, int(total[stop - 1])
    return pieces


def _compact(importance: Tensor, keep: float, first_row: int) -> EdgeList:
    """Token edges with weight > keep of a block [H, R, S]."""
    token_weight = importance.sum(0).clamp_(max=1)  # [R, S]
    list_edges = _listed if importance.device.type == "cpu" else _padded
    row, source, weight = list_edges(token_weight, keep)
    return EdgeList(row + first_row, source, weight, importance[:, row, source].T)


def _listed(token_weight: Tensor, keep: float) -> tuple[Tensor, Tensor, Tensor]:
    """Row, source and weight of entries above `keep` in [R, S]; the host reads their number."""
    row, source = (token_weight > keep).nonzero(as_tuple=True)
    return row, source, token_weight[row, source]


def _padded(token_weight: Tensor, keep: float) -> tuple[Tensor, Tensor, Tensor]:
    """Row, source and weight of as many entries a row as can exceed `keep`; weight 0 otherwise."""
    R, S = token_weight.shape
    slots = S if keep * S < 1 else int(1 / keep)
    weight, source = token_weight.topk(slots)
    row = torch.arange(R, device=weight.device).repeat_interleave(slots, output_size=R * slots)
    return row, source.flatten(), torch.where(weight > keep, weight, 0).flatten()
