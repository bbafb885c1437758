"""The fast exact algorithm on GPUs (docs/design.md, section 3.1): the driver of the kernels.

For a block of rows, a kernel or two a step:

(a) prepare.py: column norms of W_O and norms of values. For each line, that is (row, head), g =
    W_O s in value space, the smallest breakpoint, and the line's candidates: a short list of the
    coordinates that flip first. reach.py: a tighter bound than values' norms, if rows are many;
(b) linear.py: alpha from the log-sum-exp (computed here if the forward pass gave none), and lin as
    a second attention-shaped product. Pairs whose lin is exact are summed at once. The others are
    marked, a bit each: light if the candidates hold all coordinates that can flip, else heavy;
(c) lists.py, correct.py: marks become lists, and listed pairs are corrected: light pairs at their
    line's candidates, heavy ones at all coordinates, where u is formed on matrix units and never
    leaves the chip;
(d) proximity.py: the residual stream's and the FFN's proximities;
(e) compact.py: sums in fixed order, denominators, token edges above `keep`, their heads.

The host reads nothing back, and no size depends on computed values: a line's list has room for all
of its keys, and edges come in as many slots a row as can exceed `keep`. (Where these would take
more than room.EDGE_BYTES, each block's edges are packed, and the host waits for their number.)
Lists, 8 bytes a pair and its marks, live for a block of rows, and are touched only where pairs are
listed. No sum depends on the order in which programs run, or on the room for a block of rows:
results are the same bit for bit.

T and S are runtime values. Kernels are compiled for H, H_kv, K, V, D, the dtype, the optional
inputs given, and for rows that are many or few beside the keys; few rows (a frontier) take narrower
tiles and share out a line's keys. Inputs are float32, bfloat16 or float16; float32 products are
exact, not TF32; all sums are in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..contract import AttentionScores, EdgeList, FFNScores, LayerInputs, check_softmax
from . import compact, correct, linear, lists, prepare, proximity, reach, room
from .records import Block, FFNRows, Rows, block, dense, prepared, readable


def score_attention(inputs: LayerInputs, keep: float, *, bounded: bool = False) -> AttentionScores:
    """Importances of all parts of the rows' nodes (contract.py); edges with weight > `keep`.

    Edges come in 1/keep slots a row, padded. bounded: work takes room.WORK_BYTES, even where more
    is free. Raises ValueError where the kernels cannot read a
    tensor: for its dtype, or for its device.
    """
    check_softmax(inputs)
    with torch.cuda.device_of(inputs.q):  # Triton launches on the current device
        layer, rows = prepared(inputs, keep)
        prepare.weights(layer)
        prepare.values(layer)
        if layer.REACH:
            reach.reach(layer)
        packed = room.edge_bytes(rows.R, rows.n_slots, layer.H) > room.EDGE_BYTES
        if not packed:
            rows = rows.with_room_for_edges()
        found = []
        for chosen, n_keys in _row_blocks(inputs, rows.n_slots if packed else 0, bounded):
            some = rows.cut(chosen, n_keys)
            if packed:
                some = some.with_room_for_edges()
            _score_block(block(layer, some))
            if packed:
                found.append(_edges(some, chosen.start, packed=True))
        edges = [torch.cat(of) for of in zip(*found, strict=True)] if found else _edges(rows, 0)
        return AttentionScores(
            rows.residual,
            rows.of_ffn,
            rows.head_total,
            EdgeList(*edges),
            rows.unattributed,
            rows.linear,
            rows.total,
        )


def score_ffn(resid_mid: Tensor, resid_post: Tensor) -> FFNScores:
    """Importances of `resid_mid` [R, D], and of what the FFN adds to it, in `resid_post` [R, D]."""
    (R, D), device = resid_post.shape, resid_post.device
    scores = FFNScores(
        torch.empty(R, dtype=torch.float32, device=device),
        torch.empty(R, dtype=torch.float32, device=device),
        torch.empty(R, dtype=torch.bool, device=device),
    )
    mid = dense(readable("resid_mid", resid_mid, device))
    post = dense(readable("resid_post", resid_post, device))
    with torch.cuda.device_of(resid_post):
        proximity.ffn(FFNRows(R, D, mid, post, *scores))
    return scores


class Bounded:
    """The same functions, for a limited memory."""

    @staticmethod
    def score_attention(inputs: LayerInputs, keep: float) -> AttentionScores:
        """`score_attention`, whose work takes room.WORK_BYTES."""
        return score_attention(inputs, keep, bounded=True)

    score_ffn = staticmethod(score_ffn)


def _score_block(x: Block) -> None:
    """All steps for a block of rows, into its rows of the results."""
    prepare.lines(x)
    if x.rows.log_sum_exp is None:
        linear.log_sum_exp(x)
    linear.linear(x)
    lists.lists(x)
    correct.light(x)
    correct.heavy(x)
    proximity.parts(x)
    compact.fold(x)
    compact.totals(x)
    compact.edges(x)


def _edges(rows: Rows, first: int, *, packed: bool = False) -> EdgeList:
    """The rows' edges, whose first row has the index `first`; packed: without padding."""
    assert rows.source is not None
    assert rows.weight is not None
    assert rows.head_weight is not None
    if packed:
        row, slot = rows.weight.nonzero(as_tuple=True)
        used = (x[row, slot] for x in (rows.source, rows.weight, rows.head_weight))
        return EdgeList(row + first, *used)
    row = torch.arange(rows.R, device=rows.source.device)
    row = row.repeat_interleave(rows.n_slots, output_size=rows.R * rows.n_slots)
    of_pairs = rows.source.flatten(), rows.weight.flatten(), rows.head_weight.flatten(0, 1)
    return EdgeList(row, *of_pairs)


def _row_blocks(inputs: LayerInputs, n_slots: int, bounded: bool) -> Iterator[tuple[slice, int]]:
    """Slices of the rows that the room suffices for, and how many keys each sees. n_slots: edges
    of a row that a block has room for.
    """
    rows, H, device = inputs.rows, inputs.q.shape[1], inputs.q.device
    R = len(rows)
    if R == 0:
        return
    n_keys = int(rows[-1]) + 1
    n_bytes = room.WORK_BYTES
    if not bounded and room.block_rows(H, n_keys, n_bytes, n_slots) < R:
        n_bytes = room.block_bytes(device)
    size = room.block_rows(H, n_keys, n_bytes, n_slots)
    for start in range(0, R, size):
        stop = min(R, start + size)
        yield slice(start, stop), int(rows[stop - 1]) + 1
