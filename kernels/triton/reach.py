"""(a) The reach of a value through a head: a bound on its parts that is tighter than its norm.

    u[h, j] = v[j] @ W_O[h],   cosine[h, j, i] = u[h, j, i] / (|v[j]| rho[h, i])
    reach[h, j] = |v[j]| max_i |cosine[h, j, i]|

A part p = alpha u has |p_i| <= alpha reach rho_i, and reach <= |v| by Cauchy-Schwarz: with
a = alpha reach in place of alpha |v|, every coordinate that can flip is still beyond its
breakpoint, and two or three times fewer others are (directions in V dimensions are nearly
orthogonal: of D cosines the largest is about sqrt(2 ln(D) / V)). It takes u for every head and key
once, which costs a text as much as the output projection: worth it where many rows a key are
scored. With a value_gate u depends on the row, and norms are taken.

Shapes: v [S, H_kv, V], w [H, D, V] (W_O transposed), rho_inv [H, D], reach [H, S].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot
from .launch import blocks, launch, tile
from .records import Layer


@triton.jit(do_not_specialize=["S", "stride_vs", "stride_vh"])
def reach_kernel(
    p_v, p_w, p_rho_inv, p_reach,
    S, stride_vs, stride_vh, stride_wh, stride_wd,
    GROUP: tl.constexpr, V: tl.constexpr, D: tl.constexpr, UNIT_V: tl.constexpr,
    BS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """reach[h, j] = max over i of |v[j] @ W_O[h][:, i]| / rho[h, i]. Program (BS keys, head).

    v [S, H_kv, V] and w [H, D, V] in the model's dtype; rho_inv [H, D], reach [H, S] float32.
    """
    i_h = tl.program_id(1).to(tl.int64)
    o_s = tl.program_id(0) * BS + tl.arange(0, BS)
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BV)
    m_s, m_v = o_s < S, o_v < V
    s64 = o_s.to(tl.int64)[:, None]
    p_v += (i_h // GROUP) * (stride_vh * UNIT_V)
    b_v = tl.load(p_v + s64 * (stride_vs * UNIT_V) + o_v[None, :],
                  mask=m_s[:, None] & m_v[None, :], other=0.0)  # [BS, BV]  # fmt: skip
    p_w += i_h * stride_wh + o_d.to(tl.int64)[:, None] * stride_wd + o_v[None, :]
    p_rho_inv += i_h * D + o_d
    b_top = tl.zeros([BS], tl.float32)
    for i_d in range(0, D, BD):
        m_d = o_d < D - i_d
        b_w = tl.load(p_w + i_d * stride_wd, mask=m_d[:, None] & m_v[None, :], other=0.0)
        b_rho_inv = tl.load(p_rho_inv + i_d, mask=m_d, other=0.0)
        b_u = dot(b_v, tl.trans(b_w), tl.zeros([BS, BD], tl.float32)) * b_rho_inv[None, :]
        b_top = tl.maximum(b_top, tl.max(tl.abs(b_u), 1))
    tl.store(p_reach + i_h * S + o_s, b_top, mask=m_s)


def reach(x: Layer) -> None:
    """Fills in the reach [H, S] of a layer's values."""
    BS = 32 if x.wide else 128
    tiles = {"BS": BS, "BD": 64, "BV": tile(x.V), "num_warps": 8, "num_stages": 2}
    launch(reach_kernel, (blocks(x.S, BS), x.H), (x,), **tiles)
