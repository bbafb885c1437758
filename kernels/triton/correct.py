"""(c) The correction pass: of each listed pair, p = w (gate * v) @ W_O[h] with w = row_scale alpha,

    proximity = max(lin + offset - 2 sum_i max(s_i p_i - |y_i|, 0), floor)

Light pairs, a line a program: all coordinates that can flip are among the line's candidates, whose
columns of W_O are read once; u = v W_O is formed there alone. Heavy pairs visit all D coordinates:
u is formed in chunks of D, for a block of rows of one head a program, as products of a tile of
pairs and all of W_O[h], and folded into the sum while still in registers. lin is formed anew from v
and g.

The linear pass has left alpha in each pair's place, that of its key, and its proximity goes there:
nothing depends on the order of lists.

Shapes: v [S, H_kv, V], g [R, H, HALVES, V], w [H, D, V] (W_O transposed), y [R, D], candidates
[R, H, N], pairs [R, H, 32 W] (the lists), proximity [R, H, 32 W]; W words of 32 keys. Tiles: BP
pairs, BD coordinates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles
from .common import CANDIDATES, G_SCALE, HEAVY, LIGHT, WORD, dot, shifted
from .launch import blocks, launch, tile
from .records import Block


@triton.jit
def over(b_u, b_w, b_y):
    """Sum over the second axis of max(s p - |y|, 0), p = w u; [BP, BC], [BP], [BP or 1, BC].
    Coordinates where u and y are 0 add nothing.
    """
    b_beyond = b_u * b_w[:, None] - b_y
    return tl.sum(tl.maximum(tl.where(b_y >= 0, b_beyond, -b_beyond), 0.0), 1)


@triton.jit
def project(b_v, b_w, acc):
    """acc + v [BP, BV] @ w [BC, BV] transposed; a float32 v (gate * v) in halves of w's dtype."""
    if b_v.dtype == b_w.dtype:
        return dot(b_v, tl.trans(b_w), acc)
    else:
        b_high = b_v.to(b_w.dtype)
        b_low = (b_v - b_high.to(tl.float32)).to(b_w.dtype)
        return dot(b_low, tl.trans(b_w), dot(b_high, tl.trans(b_w), acc))


@triton.jit
def line_g(p_g, o_v, m_v, V: tl.constexpr, HALVES: tl.constexpr):
    """g of a line, float32 [BV]."""
    b_g = tl.load(p_g + o_v, mask=m_v, other=0.0).to(tl.float32)
    if HALVES == 2:
        b_g += tl.load(p_g + V + o_v, mask=m_v, other=0.0).to(tl.float32)
    return b_g


@triton.jit(do_not_specialize=["R", "n_words", "stride_vs", "stride_vh"])
def light_kernel(
    p_v, p_g, p_gate, p_w, p_y, p_row_scale, p_lines, p_counts, p_candidates, p_pairs, p_proximity,
    p_offset, R, n_words, stride_vs, stride_vh, stride_wh, stride_wd, floor,
    H: tl.constexpr, GROUP: tl.constexpr, V: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    UNIT_V: tl.constexpr, HALVES: tl.constexpr, BP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """proximity[r, h, j] of the light pairs, over the line's candidates. Program (row, head).

    v [S, H_kv, V], gate [R, H, V], w [H, D, V], y [R, D] in the model's dtype; g [R, H, HALVES, V];
    lines [4, R, H], proximity [R, H, 32 W] float32; counts [3, R, H], candidates [R, H, N], pairs
    [R, H, 32 W] int32.
    """
    i_r, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_line, plane = i_r * H + i_h, R.to(tl.int64) * H
    n_pairs = tl.load(p_counts + LIGHT * plane + i_line)
    if n_pairs == 0:
        return
    n_candidates = tl.load(p_counts + CANDIDATES * plane + i_line)
    g_scale = tl.load(p_lines + G_SCALE * plane + i_line)
    row_scale = tl.load(p_row_scale + i_r).to(tl.float32) if p_row_scale is not None else 1.0

    o_v, o_c, o_p = tl.arange(0, BV), tl.arange(0, N), tl.arange(0, BP)
    m_v, m_c = o_v < V, o_c < n_candidates
    b_d = tl.load(p_candidates + i_line * N + o_c, mask=m_c, other=0)
    b_y = tl.load(p_y + i_r * D + b_d, mask=m_c, other=0.0).to(tl.float32)  # [N]
    o_w = i_h * stride_wh + b_d.to(tl.int64)[:, None] * stride_wd + o_v[None, :]
    b_w = tl.load(p_w + o_w, mask=m_c[:, None] & m_v[None, :], other=0.0)  # [N, BV]
    b_g = line_g(p_g + i_line * (HALVES * V), o_v, m_v, V, HALVES)
    if p_gate is not None:
        b_gate = tl.load(p_gate + i_line * V + o_v, mask=m_v, other=0.0).to(tl.float32)
    p_v += (i_h // GROUP) * (stride_vh * UNIT_V) + o_v[None, :]
    p_pairs += i_line * n_words * WORD
    p_proximity += i_line * n_words * WORD

    for i_p in range(0, n_pairs, BP):
        m_p = i_p + o_p < n_pairs
        b_s = tl.load(p_pairs + i_p + o_p, mask=m_p, other=0)
        b_alpha = tl.load(p_proximity + b_s, mask=m_p, other=0.0)
        s64 = b_s.to(tl.int64)[:, None]
        m_pv = m_p[:, None] & m_v[None, :]
        b_v = tl.load(p_v + s64 * (stride_vs * UNIT_V), mask=m_pv, other=0.0)  # [BP, BV]
        b_lin = b_alpha * g_scale * tl.sum(b_v.to(tl.float32) * b_g[None, :], 1)
        if p_gate is not None:
            b_v = b_v.to(tl.float32) * b_gate[None, :]
        b_u = project(b_v, b_w, tl.zeros([BP, N], tl.float32))
        b_over = over(b_u, b_alpha * row_scale, b_y[None, :])
        b_proximity = shifted(b_lin - 2 * b_over, p_offset, i_r, floor)
        tl.store(p_proximity + b_s, b_proximity, mask=m_p)


@triton.jit(do_not_specialize=["R", "n_words", "stride_vs", "stride_vh"])
def heavy_kernel(
    p_v, p_g, p_gate, p_w, p_y, p_row_scale, p_lines, p_counts, p_pairs, p_proximity,
    p_offset, R, n_words, stride_vs, stride_vh, stride_wh, stride_wd, floor,
    H: tl.constexpr, GROUP: tl.constexpr, V: tl.constexpr, D: tl.constexpr,
    UNIT_V: tl.constexpr, HALVES: tl.constexpr,
    BT: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """proximity[r, h, j] of the heavy pairs, over all D coordinates. Program (block of BT rows,
    head, share): every n-th tile of their pairs laid end to end.

    Shapes and dtypes as in light_kernel.
    """
    i_h, plane = tl.program_id(1).to(tl.int64), R.to(tl.int64) * H
    o_r = tl.program_id(0) * BT + tl.arange(0, BT)
    o_line = o_r.to(tl.int64) * H + i_h
    b_n = tl.load(p_counts + HEAVY * plane + o_line, mask=o_r < R, other=0)
    b_end = tl.cumsum(b_n, 0)  # [BT]
    o_v, o_d, o_p = tl.arange(0, BV), tl.arange(0, BD), tl.arange(0, BP)
    m_v = o_v < V
    p_v += (i_h // GROUP) * (stride_vh * UNIT_V) + o_v[None, :]
    p_w += i_h * stride_wh + o_d.to(tl.int64)[:, None] * stride_wd + o_v[None, :]

    for i_p in range(tl.program_id(2) * BP, tl.sum(b_n), tl.num_programs(2) * BP):
        b_p = i_p + o_p
        m_p = b_p < tl.sum(b_n)
        m_before = b_end[None, :] <= b_p[:, None]  # [BP, BT]
        b_nth = b_p - tl.sum(tl.where(m_before, b_n[None, :], 0), 1)
        b_r = tl.program_id(0) * BT + tl.sum(m_before.to(tl.int32), 1)
        r64 = tl.where(m_p, b_r, 0).to(tl.int64)
        b_line = r64 * H + i_h
        o_list = (b_line + 1) * (n_words * WORD) - 1 - b_nth
        b_s = tl.load(p_pairs + o_list, mask=m_p, other=0)
        p_place = p_proximity + b_line * (n_words * WORD) + b_s
        b_alpha = tl.load(p_place, mask=m_p, other=0.0)
        m_pv = m_p[:, None] & m_v[None, :]
        o_vals = b_s.to(tl.int64)[:, None] * (stride_vs * UNIT_V)
        b_v = tl.load(p_v + o_vals, mask=m_pv, other=0.0)  # [BP, BV]
        b_g = line_g(p_g + b_line[:, None] * (HALVES * V), o_v[None, :], m_pv, V, HALVES)
        b_g_scale = tl.load(p_lines + G_SCALE * plane + b_line)
        b_lin = b_alpha * b_g_scale * tl.sum(b_v.to(tl.float32) * b_g, 1)
        if p_row_scale is not None:
            b_alpha *= tl.load(p_row_scale + r64).to(tl.float32)
        if p_gate is not None:
            b_gate = tl.load(p_gate + b_line[:, None] * V + o_v[None, :], mask=m_pv, other=0.0)
            b_v = b_v.to(tl.float32) * b_gate.to(tl.float32)
        b_over = tl.zeros([BP], tl.float32)
        p_y_rows = p_y + r64[:, None] * D + o_d[None, :]
        for i_d in range(0, D, BD):
            m_d = o_d < D - i_d
            b_w = tl.load(p_w + i_d * stride_wd, mask=m_d[:, None] & m_v[None, :], other=0.0)
            m_y = m_p[:, None] if D % BD == 0 else m_p[:, None] & m_d[None, :]
            b_y = tl.load(p_y_rows + i_d, mask=m_y, other=0.0)
            b_u = project(b_v, b_w, tl.zeros([BP, BD], tl.float32))
            b_over += over(b_u, b_alpha, b_y.to(tl.float32))
        b_proximity = shifted(b_lin - 2 * b_over, p_offset, r64, floor)
        tl.store(p_place, b_proximity, mask=m_p)


def light(x: Block) -> None:
    """Proximities of the light pairs."""
    grid = (x.rows.R, x.layer.H)
    launch(light_kernel, grid, x, BV=tile(x.layer.V), **tiles.LIGHT._asdict())


def heavy(x: Block) -> None:
    """Proximities of the heavy pairs."""
    of = tiles.heavy(x.rows.few, x.layer.wide)
    grid = (blocks(x.rows.R, of.BT), x.layer.H, tiles.SHARES)
    launch(heavy_kernel, grid, x, BV=tile(x.layer.V), **of._asdict())
