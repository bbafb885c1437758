"""(a) What is known of weights, keys and lines before any pair is looked at (../breakpoints.py).

    rho[h, i]  = |W_O[h][:, i]|_2
    g[t, h]    = gate[t, h] * (W_O[h] @ s_t),   s_t = sign(y_t)
    bp[t, h, i] = |y[t, i]| / (|row_scale[t]| rho[h, i])

row_scale is divided out of the breakpoints, so that a = alpha |gate * v| is compared with them.
The sign vector is +-1, exact in half precision, so g is a product on matrix units, summed in
float32. For half-precision models it is then split in two halves, g = g_scale (hi + lo), which
hold 16 bits of it or more.

A line's *candidates* are its coordinates with bp below LIGHT_LIMIT, at most N of them; the limit
is searched for by counting. All coordinates that can flip for a pair with a <= LIGHT_LIMIT are
among them: such a pair is light.

Shapes: W_T [H, D, V] (W_O transposed, V contiguous), rho and rho_inv [H, D] (0 where rho is),
v_norm [H_kv, S], g [R, H, 1 or 2, V], lines [4, R, H], counts [3, R, H], candidates [R, H, N].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import CANDIDATES, FIRST_BREAKPOINT, G_SCALE, LIGHT_LIMIT, dot
from .launch import Names, blocks, launch, tile

GUESSES = tl.constexpr(2)  # at a line's limit, of a head that follows another


@triton.jit
def column_norms_kernel(
    p_w, p_rho, p_rho_inv, stride_wh, stride_wd,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    o_v = tl.arange(0, BV)
    m_w = (o_d < D)[:, None] & (o_v < V)[None, :]
    o_w = o_d.to(tl.int64)[:, None] * stride_wd + o_v[None, :]
    b_w = tl.load(p_w + i_h * stride_wh + o_w, mask=m_w, other=0.0).to(tl.float32)  # [BD, BV]
    b_squares = tl.sum(b_w * b_w, 1)
    m_some = b_squares > 0
    b_rho_inv = tl.where(m_some, tl.rsqrt(tl.where(m_some, b_squares, 1.0)), 0.0)
    tl.store(p_rho + i_h * D + o_d, tl.sqrt_rn(b_squares), mask=o_d < D)
    tl.store(p_rho_inv + i_h * D + o_d, b_rho_inv, mask=o_d < D)


@triton.jit(do_not_specialize=["S", "stride_vs", "stride_vh"])
def value_norms_kernel(
    p_v, p_v_norm, S, stride_vs, stride_vh,
    V: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, UNIT_V: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)
    o_s = tl.program_id(0) * BS + tl.arange(0, BS)
    o_v = tl.arange(0, BV)
    m_v = (o_s < S)[:, None] & (o_v < V)[None, :]
    o_vals = o_s.to(tl.int64)[:, None] * (stride_vs * UNIT_V) + o_v[None, :]
    b_v = tl.load(p_v + i_h * stride_vh * UNIT_V + o_vals, mask=m_v, other=0.0).to(tl.float32)
    b_norm = tl.sqrt_rn(tl.sum(b_v * b_v, 1))  # [BS]
    tl.store(p_v_norm + i_h * S + o_s, b_norm, mask=o_s < S)


@triton.jit(do_not_specialize=["R", "stride_gate_r", "stride_gate_h"])
def value_space_signs_kernel(
    p_w, p_y, p_gate, p_row_scale, p_g, p_lines,
    R, stride_wh, stride_wd, stride_gate_r, stride_gate_h,
    H: tl.constexpr, V: tl.constexpr, D: tl.constexpr, UNIT_V: tl.constexpr,
    GATED: tl.constexpr, SCALED: tl.constexpr, HALVES: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)
    o_r = tl.program_id(0) * BT + tl.arange(0, BT)
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BV)
    m_r, m_v = o_r < R, o_v < V
    o_line = o_r.to(tl.int64) * H + i_h
    p_y += o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    p_w += i_h * stride_wh + o_d.to(tl.int64)[:, None] * stride_wd + o_v[None, :]
    b_g = tl.zeros([BT, BV], tl.float32)
    for i_d in range(0, D, BD):
        m_d = o_d < D - i_d
        b_y = tl.load(p_y + i_d, mask=m_r[:, None] & m_d[None, :], other=0.0)  # [BT, BD]
        b_w = tl.load(p_w + i_d * stride_wd, mask=m_d[:, None] & m_v[None, :], other=0.0)
        b_s = tl.where(b_y.to(tl.float32) >= 0, 1.0, -1.0).to(b_w.dtype)
        b_g = dot(b_s, b_w, b_g)

    m_g = m_r[:, None] & m_v[None, :]
    if GATED:
        o_gate = o_r.to(tl.int64)[:, None] * (stride_gate_r * UNIT_V) + o_v[None, :]
        b_gate = tl.load(p_gate + i_h * stride_gate_h * UNIT_V + o_gate, mask=m_g, other=0.0)
        b_g *= b_gate.to(tl.float32)
    b_scale = tl.full([BT], 1.0, tl.float32)
    o_g = o_line[:, None] * (HALVES * V) + o_v[None, :]
    if HALVES == 2:
        b_top = tl.max(tl.abs(b_g), 1)
        b_scale = tl.where(b_top > 0, b_top, 1.0)
        b_g /= b_scale[:, None]
        b_high = b_g.to(p_g.dtype.element_ty)
        tl.store(p_g + o_g + V, (b_g - b_high.to(tl.float32)).to(b_high.dtype), mask=m_g)
        tl.store(p_g + o_g, b_high, mask=m_g)
    else:
        tl.store(p_g + o_g, b_g, mask=m_g)
    if SCALED:
        b_scale *= tl.load(p_row_scale + o_r, mask=m_r, other=0.0).to(tl.float32)
    tl.store(p_lines + G_SCALE * R.to(tl.int64) * H + o_line, b_scale, mask=m_r)


@triton.jit
def points(b_y, p_rho_inv, o_d, m_d):
    """Breakpoints [BT, BD] of a head, and their mean [BT] times D; infinite ones aside."""
    b_rho_inv = tl.load(p_rho_inv + o_d, mask=m_d, other=0.0)
    b_point = tl.where(b_rho_inv[None, :] > 0, b_y * b_rho_inv[None, :], float("inf"))
    return b_point, tl.sum(tl.where(b_point < float("inf"), b_point, 0.0), 1)


@triton.jit
def search(b_point, b_try, N: tl.constexpr, STEPS: tl.constexpr):
    """The highest of the limits tried that at most N breakpoints are below, 0 where none is; and
    the next to try, below which 3 / 4 N should be.
    """
    b_limit = tl.zeros_like(b_try)
    for _ in tl.static_range(STEPS):
        b_n = tl.sum((b_point < b_try[:, None]).to(tl.int32), 1)
        b_limit = tl.where(b_n <= N, tl.maximum(b_limit, b_try), b_limit)
        b_ratio = 0.75 * N / (b_n.to(tl.float32) + 0.5)
        b_try *= tl.minimum(tl.maximum(b_ratio, 0.125), 8.0)
    return b_limit, b_try


@triton.jit(do_not_specialize=["R", "n_heads"])
def breakpoints_kernel(
    p_y, p_rho_inv, p_row_scale, p_lines, p_counts, p_candidates, R, n_heads,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, SCALED: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`n_heads` heads of BT rows; all D coordinates of a line at once."""
    o_r = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_r, m_d = o_r < R, o_d < D
    m_y = m_r[:, None] & m_d[None, :]
    b_y = tl.abs(tl.load(p_y + o_r[:, None] * D + o_d[None, :], mask=m_y, other=0.0).to(tl.float32))
    if SCALED:
        b_row_scale = tl.load(p_row_scale + o_r, mask=m_r, other=1.0).to(tl.float32)
        m_zero = b_row_scale == 0
        b_y /= tl.where(m_zero, 1.0, tl.abs(b_row_scale))[:, None]
        b_y = tl.where(m_zero[:, None], float("inf"), b_y)
    plane = R.to(tl.int64) * H
    i_first = tl.program_id(1) * n_heads
    if D > N:
        # Breakpoints have a density near 0. A guess at where N / 2 of them end, in units of their
        # sum; what comes of it is the next head's.
        b_point, b_sum = points(b_y, p_rho_inv + i_first * D, o_d, m_d)
        _, b_guess = search(b_point, b_sum * (N / (2.0 * D * D)), N, GUESSES)
        b_guess /= tl.where(b_sum > 0, b_sum, 1.0)
    for i_h in range(i_first, tl.minimum(i_first + n_heads, H)):
        b_point, b_sum = points(b_y, p_rho_inv + i_h * D, o_d, m_d)
        b_first = tl.min(b_point, 1)  # [BT]
        if D <= N:
            b_limit = tl.full([BT], float("inf"), tl.float32)
        else:
            b_limit, b_guess = search(b_point, b_guess * b_sum, N, GUESSES)
            b_guess /= tl.where(b_sum > 0, b_sum, 1.0)
        m_candidate = b_point < b_limit[:, None]
        b_place = tl.cumsum(m_candidate.to(tl.int32), 1) - 1
        b_n = tl.max(b_place, 1) + 1
        o_line = o_r * H + i_h
        o_candidate = o_line[:, None] * N + b_place
        b_d = tl.broadcast_to(o_d[None, :], [BT, BD])
        tl.store(p_candidates + o_candidate, b_d, mask=m_candidate & m_r[:, None])
        tl.store(p_counts + CANDIDATES * plane + o_line, b_n, mask=m_r)
        tl.store(p_lines + FIRST_BREAKPOINT * plane + o_line, b_first, mask=m_r)
        tl.store(p_lines + LIGHT_LIMIT * plane + o_line, b_limit, mask=m_r)


def weights(x: Names) -> None:
    """Rho and rho_inv, of W_T."""
    BD = 32
    grid = (blocks(x["D"], BD), x["H"])
    launch(column_norms_kernel, grid, x, BD=BD, BV=tile(x["V"]), num_warps=4)


def values(x: Names) -> None:
    """v_norm, of v."""
    BS = 32
    grid = (blocks(x["S"], BS), x["H_kv"])
    launch(value_norms_kernel, grid, x, BS=BS, BV=tile(x["V"]), num_warps=4)


def lines(x: Names) -> None:
    """Signs in value space and their scale, breakpoints and candidates, of y."""
    BT, num_warps = (16, 8) if x["few"] else (128, 16)
    tiles = {"BT": BT, "BD": 64, "BV": tile(x["V"]), "num_warps": num_warps, "num_stages": 2}
    launch(value_space_signs_kernel, (blocks(x["R"], BT), x["H"]), x, **tiles)
    BD = tile(x["D"])
    BT = max(1, 1024 // BD)
    n_heads = 1 if x["few"] else 8
    tiles = {"BT": BT, "BD": BD, "n_heads": n_heads, "num_warps": min(16, max(4, BD // 512))}
    launch(breakpoints_kernel, (blocks(x["R"], BT), blocks(x["H"], n_heads)), x, **tiles)
