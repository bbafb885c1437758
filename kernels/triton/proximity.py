"""(d) Proximities of the parts that are no head's: the residual stream and the FFN's output.

    proximity(part, y) = max(sum_i |y_i| - |y_i - part_i| + offset, floor)

subtracted coordinate by coordinate: a few huge coordinates of y would swallow the rest of a
difference of two norms. All parts in one sweep over D.

Shapes: parts and y [R, D], results [R].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import share, shifted
from .launch import launch
from .records import Block, FFNRows

BLOCK_D = 1024


@triton.jit
def parts_kernel(
    p_resid_pre, p_ffn, p_y, p_offset, p_residual, p_of_ffn, floor,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """residual[r] = proximity(resid_pre[r], y[r]); in parallel blocks of_ffn[r] likewise, of ffn.
    Program (row).

    resid_pre, ffn, y [R, D] in the model's dtype; offset [R]; results [R] float32.
    """
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    b_residual, b_ffn = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    for i_d in range(0, D, BD):
        o_rd = i_r * D + i_d + o_d
        m_d = o_d < D - i_d
        b_y = tl.load(p_y + o_rd, mask=m_d, other=0.0).to(tl.float32)
        b_pre = tl.load(p_resid_pre + o_rd, mask=m_d, other=0.0).to(tl.float32)
        b_residual += tl.abs(b_y) - tl.abs(b_y - b_pre)
        if p_ffn is not None:
            b_out = tl.load(p_ffn + o_rd, mask=m_d, other=0.0).to(tl.float32)
            b_ffn += tl.abs(b_y) - tl.abs(b_y - b_out)
    tl.store(p_residual + i_r, shifted(tl.sum(b_residual), p_offset, i_r, floor))
    if p_of_ffn is not None:
        tl.store(p_of_ffn + i_r, shifted(tl.sum(b_ffn), p_offset, i_r, floor))


@triton.jit
def ffn_kernel(p_mid, p_post, p_residual, p_ffn, p_unattributed, D: tl.constexpr, BD: tl.constexpr):
    """residual[r] = proximity(mid, post) / total; ffn[r] = proximity(post - mid, post) / total, its
    numerator being max(|post|_1 - |mid|_1, 0). Program (row).

    mid, post [R, D] in the model's dtype; residual, ffn [R] float32; unattributed [R] bool.
    """
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    b_residual, b_ffn = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    for i_d in range(0, D, BD):
        o_rd = i_r * D + i_d + o_d
        m_d = o_d < D - i_d
        b_mid = tl.load(p_mid + o_rd, mask=m_d, other=0.0).to(tl.float32)
        b_post = tl.load(p_post + o_rd, mask=m_d, other=0.0).to(tl.float32)
        b_residual += tl.abs(b_post) - tl.abs(b_post - b_mid)
        b_ffn += tl.abs(b_post) - tl.abs(b_mid)
    residual = tl.maximum(tl.sum(b_residual), 0.0)
    ffn = tl.maximum(tl.sum(b_ffn), 0.0)
    total = residual + ffn
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    tl.store(p_residual + i_r, tl.where(nothing, 0.5, share(residual, total)))
    tl.store(p_ffn + i_r, tl.where(nothing, 0.5, share(ffn, total)))
    tl.store(p_unattributed + i_r, nothing)


def parts(x: Block) -> None:
    """Proximities of the residual stream and, where it is a part, the FFN's output."""
    launch(parts_kernel, (x.rows.R,), x, BD=BLOCK_D, num_warps=8)


def ffn(x: FFNRows) -> None:
    """Importances of the parts of resid_post."""
    launch(ffn_kernel, (x.R,), (x,), BD=BLOCK_D, num_warps=8)
