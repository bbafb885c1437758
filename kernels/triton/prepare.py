"""(a) Numbers of weights, keys and lines, before any pair is looked at (../breakpoints.py).

    rho[h, i]  = |W_O[h][:, i]|_2
    g[t, h]    = gate[t, h] * (W_O[h] @ s_t),   s_t = sign(y_t)
    bp[t, h, i] = |y[t, i]| / (|row_scale[t]| rho[h, i])

row_scale is divided out of the breakpoints, so that a = alpha |gate * v| is compared with them.
The sign vector is +-1, exact in half precision, so g is a product on matrix units, summed in
float32. A bfloat16 model's g is then kept in one float16, g = g_scale g16, whose rounding of 2^-11
is an eighth of the model's own. Its values become float16 too, scaled by a power of two a KV head:
exact unless they are 2^-32 below the head's largest. A float16 model's g is split in two halves.
So is a bfloat16 model's g if rows are too few to pay for another copy of the values, or if a
value_gate scales it: rows of small proximities and large parts would show the rounding.

Breakpoints are computed only at coordinates where they can be small. With rho_rms[h] the root mean
square of rho[h],

    bp[t, h, i] >= near[t, i] / rho_rms[h],  near[t, i] = |y[t, i]| / max_h (rho[h, i] / rho_rms[h])

(row_scale aside). So the M nearest coordinates of a row are found once for all heads; all others
have near >= near_end[t]. Each head then looks at those M alone.

A line's *candidates* are its coordinates with bp below LIGHT_LIMIT, at most N of them. The limit
is found by counting, and is at most near_end / rho_rms. All coordinates that can flip for a
pair with a <= LIGHT_LIMIT are among them: such a pair is light. FIRST_BREAKPOINT is the smallest
breakpoint, or near_end / rho_rms where no breakpoint is known to be below that.

Shapes: w [H, D, V] (W_O transposed, V contiguous), rho_inv [H, D] and its transpose rho_inv_t
(0 where rho is 0), rho_rms [H], spread_inv [D] (of the maximum over heads), v_norm [H_kv, S], v16
[S, H_kv, V], v_scale [H_kv], g [R, H, 1 or 2, V], lines [4, R, H], counts [3, R, H], nearest
[R, M], near [R, M] (|y / row_scale| of those), near_end [R], candidates [R, H, N].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    CANDIDATES,
    FIRST_BREAKPOINT,
    G_SCALE,
    LIGHT_LIMIT,
    LOG2_E,
    LOG_SUM_EXP,
    dot,
)
from .launch import blocks, launch, tile
from .records import Block, Layer

GUESSES = tl.constexpr(3)  # tries at a line's limit
NEAR_GUESSES = tl.constexpr(4)  # tries at a row's limit


@triton.jit
def column_norms_kernel(
    p_w, p_rho_inv, p_rho_inv_t, p_rho_rms, stride_wh, stride_wd,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """rho_inv[h, i] = 1 / |W_O[h][:, i]|_2 (0 where the norm is 0), its transpose, and rho_rms[h].
    Program (head).

    w [H, D, V] in the model's dtype; rho_inv [H, D], rho_inv_t [D, H], rho_rms [H] float32.
    """
    i_h = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BV)
    b_sum = tl.zeros([BD], tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_w = (o_d < D)[:, None] & (o_v < V)[None, :]
        o_w = o_d.to(tl.int64)[:, None] * stride_wd + o_v[None, :]
        b_w = tl.load(p_w + i_h * stride_wh + o_w, mask=m_w, other=0.0).to(tl.float32)  # [BD, BV]
        b_squares = tl.sum(b_w * b_w, 1)
        m_some = b_squares > 0
        b_rho_inv = tl.where(m_some, tl.rsqrt(tl.where(m_some, b_squares, 1.0)), 0.0)
        tl.store(p_rho_inv + i_h * D + o_d, b_rho_inv, mask=o_d < D)
        tl.store(p_rho_inv_t + o_d * H + i_h, b_rho_inv, mask=o_d < D)
        b_sum += b_squares
    tl.store(p_rho_rms + i_h, tl.sqrt(tl.sum(b_sum) / D))


@triton.jit
def spread_kernel(
    p_rho_inv_t, p_rho_rms, p_spread_inv,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """spread_inv[i] = min over h of rho_rms[h] / rho[h, i]. Program (BD coordinates).

    rho_inv_t [D, H], rho_rms [H], spread_inv [D] float32.
    """
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    o_h = tl.arange(0, BH)
    m_dh = (o_d < D)[:, None] & (o_h < H)[None, :]
    b_rms = tl.load(p_rho_rms + o_h, mask=o_h < H, other=0.0)[None, :]
    b_rho_inv = tl.load(p_rho_inv_t + o_d[:, None] * H + o_h[None, :], mask=m_dh, other=0.0)
    b_spread_inv = tl.where(b_rho_inv > 0, b_rho_inv * b_rms, float("inf"))
    tl.store(p_spread_inv + o_d, tl.min(b_spread_inv, 1), mask=o_d < D)


@triton.jit(do_not_specialize=["S", "stride_vs", "stride_vh"])
def value_norms_kernel(
    p_v, p_v_norm, p_v_size, S, stride_vs, stride_vh,
    V: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, UNIT_V: tl.constexpr,
):  # fmt: skip
    """v_norm[h, j] = |v[j, h]|_2; v_size[h, j] = its largest coordinate, where float16 values are
    wanted. Program (BS keys, KV head).

    v [S, H_kv, V] in the model's dtype; v_norm and v_size [H_kv, S] float32.
    """
    i_h = tl.program_id(1).to(tl.int64)
    o_s = tl.program_id(0) * BS + tl.arange(0, BS)
    o_v = tl.arange(0, BV)
    m_v = (o_s < S)[:, None] & (o_v < V)[None, :]
    o_vals = o_s.to(tl.int64)[:, None] * (stride_vs * UNIT_V) + o_v[None, :]
    b_v = tl.load(p_v + i_h * stride_vh * UNIT_V + o_vals, mask=m_v, other=0.0).to(tl.float32)
    b_norm = tl.sqrt_rn(tl.sum(b_v * b_v, 1))  # [BS]
    tl.store(p_v_norm + i_h * S + o_s, b_norm, mask=o_s < S)
    if p_v_size is not None:
        tl.store(p_v_size + i_h * S + o_s, tl.max(tl.abs(b_v), 1), mask=o_s < S)


@triton.jit(do_not_specialize=["S", "stride_vs", "stride_vh"])
def half_values_kernel(
    p_v, p_v_top, p_v16, p_v_scale, S, stride_vs, stride_vh,
    H_kv: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, UNIT_V: tl.constexpr,
):  # fmt: skip
    """v16 = v / v_scale as float16; v_scale[h] is 2^-14 times the power of two below the largest
    coordinate. Program (BS keys, KV head).

    v [S, H_kv, V] bfloat16; v_top and v_scale [H_kv] float32; v16 [S, H_kv, V] float16.
    """
    i_h = tl.program_id(1).to(tl.int64)
    o_s = (tl.program_id(0) * BS + tl.arange(0, BS)).to(tl.int64)
    o_v = tl.arange(0, BV)
    m_v = (o_s < S)[:, None] & (o_v < V)[None, :]
    top = tl.load(p_v_top + i_h)
    power = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.maximum(power, 2.0**-100)
    o_vals = o_s[:, None] * (stride_vs * UNIT_V) + o_v[None, :]
    b_v = tl.load(p_v + i_h * stride_vh * UNIT_V + o_vals, mask=m_v, other=0.0).to(tl.float32)
    b_half = (b_v * (2.0**14 / power)).to(tl.float16)
    tl.store(p_v16 + o_s[:, None] * (H_kv * V) + i_h * V + o_v[None, :], b_half, mask=m_v)
    tl.store(p_v_scale + i_h, power * 2.0**-14)


@triton.jit(do_not_specialize=["R"])
def value_space_signs_kernel(
    p_w, p_y, p_gate, p_row_scale, p_g, p_lines, R, stride_wh, stride_wd,
    H: tl.constexpr, V: tl.constexpr, D: tl.constexpr, HALVES: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """g[r, h] = gate[r, h] * (W_O[h] @ s[r]) / scale, in HALVES numbers; lines[G_SCALE] = scale *
    row_scale. Program (BT rows, head).

    w [H, D, V], y [R, D], gate [R, H, V] in the model's dtype; row_scale [R]; g [R, H, HALVES, V]
    float32, float16 or bfloat16; lines [4, R, H] float32.
    """
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
    if p_gate is not None:
        b_gate = tl.load(p_gate + o_line[:, None] * V + o_v[None, :], mask=m_g, other=0.0)
        b_g *= b_gate.to(tl.float32)
    b_scale = tl.full([BT], 1.0, tl.float32)
    o_g = o_line[:, None] * (HALVES * V) + o_v[None, :]
    if p_g.dtype.element_ty == tl.float32:
        tl.store(p_g + o_g, b_g, mask=m_g)
    else:
        b_top = tl.max(tl.abs(b_g), 1)
        b_scale = tl.where(b_top > 0, b_top * 2.0**-15, 1.0)
        b_g /= b_scale[:, None]
        b_high = b_g.to(p_g.dtype.element_ty)
        tl.store(p_g + o_g, b_high, mask=m_g)
        if HALVES == 2:
            tl.store(p_g + o_g + V, (b_g - b_high.to(tl.float32)).to(b_high.dtype), mask=m_g)
    if p_row_scale is not None:
        b_scale *= tl.load(p_row_scale + o_r, mask=m_r, other=0.0).to(tl.float32)
    tl.store(p_lines + G_SCALE * R.to(tl.int64) * H + o_line, b_scale, mask=m_r)


@triton.jit
def search(b_point, b_try, N: tl.constexpr, STEPS: tl.constexpr, AXIS: tl.constexpr):
    """The highest of the limits tried that has at most N points along the axis below it, or 0. Each
    try is where 3 / 4 N points should be by the one before.
    """
    b_limit = tl.zeros_like(b_try)
    for _ in tl.static_range(STEPS):
        b_n = tl.sum((b_point < tl.expand_dims(b_try, AXIS)).to(tl.int32), AXIS)
        b_limit = tl.where(b_n <= N, tl.maximum(b_limit, b_try), b_limit)
        b_ratio = 0.75 * N / (b_n.to(tl.float32) + 0.5)
        b_try *= tl.minimum(tl.maximum(b_ratio, 0.125), 8.0)
    return b_limit


@triton.jit(do_not_specialize=["R"])
def nearest_kernel(
    p_y, p_spread_inv, p_row_scale, p_nearest, p_near, p_near_end, R,
    D: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """nearest[r] = the coordinates with near below near_end[r], ascending, at most M; near[r] =
    their |y / row_scale|. Places that are left have D and infinity. Program (BT rows), all D.

    y [R, D] in the model's dtype; spread_inv [D], row_scale [R]; nearest [R, M] int32; near [R, M]
    and near_end [R] float32.
    """
    o_r = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    o_d, o_m = tl.arange(0, BD), tl.arange(0, M)
    m_r, m_d = o_r < R, o_d < D
    m_y = m_r[:, None] & m_d[None, :]
    b_y = tl.abs(tl.load(p_y + o_r[:, None] * D + o_d[None, :], mask=m_y, other=0.0).to(tl.float32))
    if p_row_scale is not None:
        b_row_scale = tl.load(p_row_scale + o_r, mask=m_r, other=1.0).to(tl.float32)
        m_zero = b_row_scale == 0
        b_y /= tl.where(m_zero, 1.0, tl.abs(b_row_scale))[:, None]
        b_y = tl.where(m_zero[:, None], float("inf"), b_y)
    if D <= M:
        m_near = m_y
        b_end = tl.full([BT], float("inf"), tl.float32)
    else:
        # A coordinate that no head writes to is infinite or NaN: below no limit.
        b_point = b_y * tl.load(p_spread_inv + o_d, mask=m_d, other=float("inf"))[None, :]
        b_sum = tl.sum(tl.where(b_point < float("inf"), b_point, 0.0), 1)
        b_end = search(b_point, b_sum * (M / (2.0 * D * D)), M, NEAR_GUESSES, 1)
        m_near = b_point < b_end[:, None]
    b_place = tl.cumsum(m_near.to(tl.int32), 1) - 1
    b_n = tl.max(b_place, 1) + 1
    o_near = o_r[:, None] * M + b_place
    m_near &= m_r[:, None]
    tl.store(p_nearest + o_near, tl.broadcast_to(o_d[None, :], [BT, BD]), mask=m_near)
    tl.store(p_near + o_near, b_y, mask=m_near)
    m_left = (o_m[None, :] >= b_n[:, None]) & m_r[:, None]
    o_left = o_r[:, None] * M + o_m[None, :]
    tl.store(p_nearest + o_left, tl.full([BT, M], D, tl.int32), mask=m_left)
    tl.store(p_near + o_left, tl.full([BT, M], float("inf"), tl.float32), mask=m_left)
    tl.store(p_near_end + o_r, b_end, mask=m_r)


@triton.jit(do_not_specialize=["R"])
def breakpoints_kernel(
    p_nearest, p_near, p_near_end, p_rho_inv_t, p_rho_rms, p_log_sum_exp, p_lines, p_counts,
    p_candidates, R,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """candidates[r, h] = the coordinates with bp[r, h] below lines[LIGHT_LIMIT], counts of them;
    lines[FIRST_BREAKPOINT]; lines[LOG_SUM_EXP] where the forward pass gave it, to base 2. Program
    (row, BH heads).

    nearest [R, M] and candidates [R, H, N] int32; near [R, M], near_end [R], rho_inv_t [D, H],
    rho_rms [H], lines [4, R, H] float32; counts [3, R, H] int32; log_sum_exp [R, H].
    """
    i_r, plane = tl.program_id(0).to(tl.int64), R.to(tl.int64) * H
    o_h, o_m = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, M)
    m_h = o_h < H
    b_d = tl.load(p_nearest + i_r * M + o_m)
    b_y = tl.load(p_near + i_r * M + o_m)
    m_rho = (b_d < D)[:, None] & m_h[None, :]
    b_rho_inv = tl.load(p_rho_inv_t + b_d[:, None] * H + o_h[None, :], mask=m_rho, other=1.0)
    b_point = tl.where(b_rho_inv > 0, b_y[:, None] * b_rho_inv, float("inf"))  # [M, BH]
    b_end = tl.full([BH], float("inf"), tl.float32)
    if D > M:
        # The factor rounds the bound down by more than its terms are rounded.
        b_rms = tl.load(p_rho_rms + o_h, mask=m_h, other=0.0)
        b_end = tl.load(p_near_end + i_r) * (1 - 2.0**-18) / tl.where(b_rms > 0, b_rms, 1.0)
        b_end = tl.where(b_rms > 0, b_end, float("inf"))
    b_first = tl.minimum(tl.min(b_point, 0), b_end)
    if D <= N:
        b_limit = b_end
    else:
        # Breakpoints have a density near 0: their mean gives a guess at where 3 / 4 N of them end.
        m_some = b_point < float("inf")
        b_n_some = tl.sum(m_some.to(tl.float32), 0) + 0.5
        b_sum = tl.sum(tl.where(m_some, b_point, 0.0), 0)
        b_try = b_sum * (1.5 * N) / (b_n_some * b_n_some)
        b_limit = tl.minimum(search(b_point, b_try, N, GUESSES, 0), b_end)
    m_candidate = (b_point < b_limit[None, :]) & m_h[None, :]
    b_place = tl.cumsum(m_candidate.to(tl.int32), 0) - 1
    o_line = i_r * H + o_h
    o_candidate = o_line[None, :] * N + b_place
    tl.store(p_candidates + o_candidate, tl.broadcast_to(b_d[:, None], [M, BH]), mask=m_candidate)
    tl.store(p_counts + CANDIDATES * plane + o_line, tl.max(b_place, 0) + 1, mask=m_h)
    tl.store(p_lines + FIRST_BREAKPOINT * plane + o_line, b_first, mask=m_h)
    tl.store(p_lines + LIGHT_LIMIT * plane + o_line, b_limit, mask=m_h)
    if p_log_sum_exp is not None:
        b_log_sum_exp = tl.load(p_log_sum_exp + o_line, mask=m_h, other=0.0).to(tl.float32)
        tl.store(p_lines + LOG_SUM_EXP * plane + o_line, b_log_sum_exp * LOG2_E, mask=m_h)


def weights(x: Layer) -> None:
    """rho_inv, rho_rms and spread_inv, of w."""
    launch(column_norms_kernel, (x.H,), (x,), BD=64, BV=tile(x.V), num_warps=16)
    BD = 32
    BH = triton.next_power_of_2(x.H)
    launch(spread_kernel, (blocks(x.D, BD),), (x,), BD=BD, BH=BH, num_warps=4)


def values(x: Layer) -> None:
    """v_norm and, of a bfloat16 model, v16, of v."""
    BS = 32
    grid = (blocks(x.S, BS), x.H_kv)
    tiles = {"BS": BS, "BV": tile(x.V), "num_warps": 4}
    launch(value_norms_kernel, grid, (x,), **tiles)
    if x.v_size is not None and x.v_top is not None:
        torch.amax(x.v_size, 1, out=x.v_top)
        launch(half_values_kernel, grid, (x,), **tiles)


def lines(x: Block) -> None:
    """Signs in value space and their scale, breakpoints and candidates, of y."""
    R, H, D = x.rows.R, x.layer.H, x.layer.D
    BT, num_warps = (16, 8) if x.rows.few else (128, 16)
    tiles = {"BT": BT, "BD": 64, "BV": tile(x.layer.V), "num_warps": num_warps, "num_stages": 2}
    launch(value_space_signs_kernel, (blocks(R, BT), H), x, **tiles)
    BD = tile(D)
    BT = max(1, 1024 // BD)
    tiles = {"BT": BT, "BD": BD, "num_warps": min(16, max(4, BD // 512))}
    launch(nearest_kernel, (blocks(R, BT),), x, **tiles)
    BH = min(16, triton.next_power_of_2(H))
    launch(breakpoints_kernel, (R, blocks(H, BH)), x, BH=BH, num_warps=16)
