"""(b) The linear pass: scores, lin = alpha (v . g), and which pairs need more than that.

For every pair of a tile of rows and keys, head by head, two products

    score = q . k,   alpha = 2^(score - log_sum_exp),   lin = alpha g_scale (v . g)

lin is an upper bound of the proximity and, where a = alpha |gate * v| is below the line's first
breakpoint, the proximity itself. Then it is summed here: over heads for the token edges, over
keys for the heads' totals. (Where rows are many, a = alpha reach: reach.py.) The other
pairs with lin > 0 are marked, a bit each, as light or heavy (prepare.py), and left to the
correction pass, which finds alpha where it is to leave the proximity. Marks can be as many as there
are pairs: no list can overflow.

A program goes through all heads of its tile, so that sums over heads stay in registers, and reads
a tile of K and V once for all heads that share it. Tiles that no row of theirs sees are skipped
and written by nobody: who reads a row stays within the keys that it sees. Keys are looked at for
whether a row sees them where some row of the tile does not see some key of it.

The log-sum-exp, where the forward pass gave none, is taken by programs that share out a line's
keys, and combined in their order.

Shapes: q [R, H, K], k [S, H_kv, K], v16 [S, H_kv, V] and v_scale [H_kv] (prepare.py; v itself
unless HALVED), g [R, H, HALVES, V], lines [4, R, H], reach [H, S] or, norms of values,
[H_kv, S], token [R, 32 W], partial [S / BS, R, H], partial_lin [S / BS, R, H], marks [2, R, H, W],
proximity [R, H, 32 W]; W words of 32 keys.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.runtime import driver

from .common import (
    FIRST_BREAKPOINT,
    G_SCALE,
    INTERPRETED,
    LIGHT_LIMIT,
    LOG2_E,
    LOG_SUM_EXP,
    ROUND_UP,
    WORD,
    all_log2_scores,
    among,
    dot,
    first_key,
    log2_scores,
    seen,
)
from .launch import Names, blocks, launch, tile

PROGRAMS = 512  # that keep a GPU busy
LOWEST = tl.constexpr(-1e30)  # of a maximum, finite so that -inf less it is -inf


@triton.jit(
    do_not_specialize=[
        "R", "S", "n_blocks", "stride_qr", "stride_qh", "stride_ks", "stride_kh", "window",
    ]
)  # fmt: skip
def log_sum_exp_kernel(
    p_q, p_k, p_rows, p_slopes, p_top, p_sum,
    R, S, n_blocks, stride_qr, stride_qh, stride_ks, stride_kh, scale, softcap, window,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, UNIT_K: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Of `n_blocks` blocks of keys a program: top [splits, R, H], sum of 2^(score - top)."""
    i_h, i_split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    o_r = tl.program_id(0) * BT + tl.arange(0, BT)
    o_s, o_k = tl.arange(0, BS), tl.arange(0, BK)
    m_r, m_k = o_r < R, o_k < K
    b_t = tl.load(p_rows + o_r, mask=m_r, other=-1).to(tl.int32)
    slope = tl.load(p_slopes + i_h).to(tl.float32) if ALIBI else 0.0
    o_q = (
        o_r.to(tl.int64)[:, None] * (stride_qr * UNIT_K) + i_h * (stride_qh * UNIT_K) + o_k[None, :]
    )
    b_q = tl.load(p_q + o_q, mask=m_r[:, None] & m_k[None, :], other=0.0)  # [BT, BK]
    p_k += (i_h // GROUP) * (stride_kh * UNIT_K) + o_k[None, :]

    t_first = tl.load(p_rows + tl.program_id(0) * BT).to(tl.int32)
    begin = tl.maximum(i_split * n_blocks, first_key(t_first, window, WINDOW) // BS)
    end = tl.minimum((i_split + 1) * n_blocks, tl.max(b_t) // BS + 1)
    b_top = tl.full([BT], LOWEST, tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    for i_s in range(begin, end):
        b_s = i_s * BS + o_s
        m_ks = (b_s < S)[:, None] & m_k[None, :]
        b_k = tl.load(p_k + b_s.to(tl.int64)[:, None] * (stride_ks * UNIT_K), mask=m_ks, other=0.0)
        b_qk = dot(b_q, tl.trans(b_k), tl.zeros([BT, BS], tl.float32))
        b_distance = b_t[:, None] - b_s[None, :]
        b_score = log2_scores(b_qk, b_distance, scale, softcap, slope, window,
                              SOFTCAP, ALIBI, WINDOW)  # fmt: skip
        b_new = tl.maximum(b_top, tl.max(b_score, 1))
        b_sum = b_sum * tl.exp2(b_top - b_new) + tl.sum(tl.exp2(b_score - b_new[:, None]), 1)
        b_top = b_new
    o_out = (i_split * R.to(tl.int64) + o_r) * H + i_h
    tl.store(p_top + o_out, b_top, mask=m_r)
    tl.store(p_sum + o_out, b_sum, mask=m_r)


@triton.jit(do_not_specialize=["R", "n_splits"])
def combine_kernel(
    p_top, p_sum, p_sinks, p_lines, R, n_splits,
    H: tl.constexpr, SINKS: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of BL lines from those of its splits, and the sinks."""
    n_lines = R.to(tl.int64) * H
    o_line = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    m_line = o_line < n_lines
    b_top = tl.full([BL], LOWEST, tl.float32)
    b_sum = tl.zeros([BL], tl.float32)
    if SINKS:
        b_top = tl.load(p_sinks + o_line % H, mask=m_line, other=0.0).to(tl.float32) * LOG2_E
        b_sum += 1.0
    for i_split in range(n_splits):
        o_part = i_split * n_lines + o_line
        b_other = tl.load(p_top + o_part, mask=m_line, other=LOWEST)
        b_other_sum = tl.load(p_sum + o_part, mask=m_line, other=1.0)
        b_new = tl.maximum(b_top, b_other)
        b_sum = b_sum * tl.exp2(b_top - b_new) + b_other_sum * tl.exp2(b_other - b_new)
        b_top = b_new
    tl.store(p_lines + LOG_SUM_EXP * n_lines + o_line, b_top + tl.log2(b_sum), mask=m_line)


@triton.jit
def pack(b_m, BT: tl.constexpr, BS: tl.constexpr):
    """Bits [BT, BS] as words, int32 [BT, BS / 32]."""
    b_bits = tl.reshape(b_m.to(tl.int32), [BT, BS // WORD, WORD])
    return tl.sum(b_bits << tl.arange(0, WORD)[None, None, :], 2)


@triton.jit(
    do_not_specialize=[
        "R", "S", "n_words", "window", "stride_qr", "stride_qh", "stride_ks", "stride_kh",
        "stride_us", "stride_uh", "stride_gate_r", "stride_gate_h",
    ]
)  # fmt: skip
def linear_kernel(
    p_q, p_k, p_v16, p_v_scale, p_g, p_gate, p_reach, p_rows, p_slopes, p_lines, p_token, p_partial,
    p_partial_lin, p_marks, p_proximity, p_offset,
    R, S, n_words, stride_qr, stride_qh, stride_ks, stride_kh, stride_us, stride_uh,
    stride_gate_r, stride_gate_h, scale, softcap, window, floor,
    H: tl.constexpr, H_kv: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    UNIT_K: tl.constexpr, UNIT_V: tl.constexpr, HALVES: tl.constexpr, HALVED: tl.constexpr,
    GATED: tl.constexpr, REACH: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    WINDOW: tl.constexpr, SHIFTED: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = H // H_kv
    i_r, i_s = tl.program_id(0), tl.program_id(1)
    o_r, o_s = i_r * BT + tl.arange(0, BT), i_s * BS + tl.arange(0, BS)
    o_k, o_v, o_word = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BS // WORD)
    m_r, m_s = o_r < R, o_s < S
    b_t = tl.load(p_rows + o_r, mask=m_r, other=-1).to(tl.int32)
    t_first = tl.load(p_rows + i_r * BT).to(tl.int32)
    t_last = tl.max(b_t)
    if (i_s * BS > t_last) | (i_s * BS + BS <= first_key(t_first, window, WINDOW)):
        return
    some_unseen = (i_s * BS + BS - 1 > t_first) | (first_key(t_last, window, WINDOW) > i_s * BS)

    plane = R.to(tl.int64) * H
    i_line = (i_r * BT).to(tl.int64) * H  # of the first row and head 0
    # Within a tile, offsets from its first element are small.
    o_t, o_j = tl.arange(0, BT), tl.arange(0, BS)
    m_q, m_g = among(m_r, o_k, K, BK), among(m_r, o_v, V, BV)
    m_ks, m_vs = among(m_s, o_k, K, BK), among(m_s, o_v, V, BV)
    m_words = m_r[:, None] & (i_s * (BS // WORD) + o_word < n_words)[None, :]
    stride_qr, stride_qh = stride_qr * UNIT_K, stride_qh * UNIT_K
    stride_ks, stride_kh = stride_ks * UNIT_K, (stride_kh * UNIT_K).to(tl.int64)
    stride_us, stride_uh = stride_us * UNIT_V, (stride_uh * UNIT_V).to(tl.int64)
    p_q += (i_r * BT).to(tl.int64) * stride_qr
    p_k += (i_s * BS).to(tl.int64) * stride_ks
    p_v16 += (i_s * BS).to(tl.int64) * stride_us
    p_g += i_line * (HALVES * V)
    p_lines += i_line
    p_partial += i_s.to(tl.int64) * plane + i_line
    p_partial_lin += i_s.to(tl.int64) * plane + i_line
    p_marks += i_line * n_words + i_s * (BS // WORD)
    p_proximity += i_line * n_words * WORD + i_s * BS
    o_q = o_t[:, None] * stride_qr + o_k[None, :]
    o_ks, o_vs = o_j[:, None] * stride_ks + o_k[None, :], o_j[:, None] * stride_us + o_v[None, :]
    o_g = o_t[:, None] * (H * HALVES * V) + o_v[None, :]
    o_mark = (o_t * H)[:, None] * n_words + o_word[None, :]
    if GATED:
        stride_gate_r, stride_gate_h = stride_gate_r * UNIT_V, stride_gate_h * UNIT_V
        p_gate += (i_r * BT).to(tl.int64) * stride_gate_r
        o_gate = o_t[:, None] * stride_gate_r + o_v[None, :]

    b_token = tl.zeros([BT, BS], tl.float32)
    for i_kv in range(H_kv):
        b_k = tl.load(p_k + i_kv * stride_kh + o_ks, mask=m_ks, other=0.0)  # [BS, BK]
        b_v = tl.load(p_v16 + i_kv * stride_uh + o_vs, mask=m_vs, other=0.0)  # [BS, BV]
        v_scale = tl.load(p_v_scale + i_kv) if HALVED else 1.0
        for i_group in range(GROUP):
            i_h = i_kv * GROUP + i_group
            b_q = tl.load(p_q + i_h * stride_qh.to(tl.int64) + o_q, mask=m_q, other=0.0)  # [BT, BK]
            b_qk = dot(b_q, tl.trans(b_k), tl.zeros([BT, BS], tl.float32))
            b_lin = tl.zeros([BT, BS], tl.float32)
            for i_half in tl.static_range(HALVES):
                b_g = tl.load(
                    p_g + (i_h * HALVES + i_half) * V + o_g, mask=m_g, other=0.0
                )  # [BT, BV]
                b_lin = dot(b_g, tl.trans(b_v), b_lin)
            p_line = p_lines + i_h + o_t * H
            b_lse = tl.load(p_line + LOG_SUM_EXP * plane, mask=m_r, other=0.0)
            b_g_scale = tl.load(p_line + G_SCALE * plane, mask=m_r, other=0.0)
            b_first = tl.load(p_line + FIRST_BREAKPOINT * plane, mask=m_r, other=float("inf"))
            b_limit = tl.load(p_line + LIGHT_LIMIT * plane, mask=m_r, other=float("inf"))

            # Loaded for each head again: what depends on it would otherwise stay in registers.
            b_t = tl.load(p_rows + o_r, mask=m_r, other=-1).to(tl.int32)
            slope = tl.load(p_slopes + i_h).to(tl.float32) if ALIBI else 0.0
            b_distance = b_t[:, None] - o_s[None, :] if ALIBI or SHIFTED else None
            b_score = all_log2_scores(b_qk, b_distance, scale, softcap, slope, SOFTCAP, ALIBI)
            if some_unseen:
                b_score = tl.where(
                    seen(b_t[:, None] - o_s[None, :], window, WINDOW), b_score, -float("inf")
                )
            b_alpha = tl.exp2(b_score - b_lse[:, None])
            b_lin *= b_alpha * (b_g_scale * v_scale)[:, None]
            tl.store(p_partial_lin + i_h + o_t * H, tl.sum(b_lin, 1), mask=m_r)
            if GATED:
                b_gate = tl.load(
                    p_gate + i_h * stride_gate_h.to(tl.int64) + o_gate, mask=m_g, other=0.0
                )
                b_gate = b_gate.to(tl.float32)
                # Rounded up by more than the rounding of two factors.
                b_gate_squares = (b_gate * b_gate * (1 + 2**-7)).to(tl.bfloat16)
                b_v_squares = b_v.to(tl.float32) * b_v.to(tl.float32) * (1 + 2**-7)
                b_v_squares = b_v_squares.to(tl.bfloat16)
                b_squares = dot(b_gate_squares, tl.trans(b_v_squares),
                                tl.zeros([BT, BS], tl.float32))  # fmt: skip
                b_a = b_alpha * tl.sqrt(b_squares) * (ROUND_UP * v_scale)
            else:
                i_bound = i_h if REACH else i_kv
                b_reach = tl.load(p_reach + i_bound * S.to(tl.int64) + o_s, mask=m_s, other=0.0)
                b_a = b_alpha * (b_reach * ROUND_UP)[None, :]
            if SHIFTED:
                m_seen = seen(b_distance, window, WINDOW)
                b_lin += tl.load(p_offset + o_r, mask=m_r, other=0.0).to(tl.float32)[:, None]
                m_listed = m_seen & (b_lin > floor) & (b_a > b_first[:, None])
            else:
                m_listed = (b_lin > 0) & (b_a > b_first[:, None])
            b_heavy = pack(m_listed & (b_a > b_limit[:, None]), BT, BS)
            p_place = p_proximity + (i_h + o_t * H).to(tl.int64)[:, None] * (n_words * WORD)
            tl.store(p_place + o_j[None, :], b_alpha, mask=m_listed)
            b_listed = pack(m_listed, BT, BS)
            p_mark = p_marks + i_h * n_words + o_mark
            tl.store(p_mark, b_listed ^ b_heavy, mask=m_words)
            tl.store(p_mark + plane * n_words, b_heavy, mask=m_words)
            if SHIFTED:
                b_linear = tl.where(m_seen & ~m_listed, tl.maximum(b_lin, floor), 0.0)
            else:
                b_linear = tl.where(m_listed, 0.0, tl.maximum(b_lin, 0.0))
            b_token += b_linear
            tl.store(p_partial + i_h + o_t * H, tl.sum(b_linear, 1), mask=m_r)
    o_token = o_r.to(tl.int64)[:, None] * (n_words * WORD) + o_s[None, :]
    tl.store(p_token + o_token, b_token, mask=m_r[:, None] & (o_s < n_words * WORD)[None, :])


def log_sum_exp(x: Names) -> None:
    """Plane LOG_SUM_EXP of lines, of q and k."""
    R, H = x["R"], x["H"]
    BS = 32 if x["WIDE"] else 64
    BT = 16 if x["few"] else BS
    n_blocks = blocks(x["n_keys"], BS)
    n_splits = min(n_blocks, blocks(PROGRAMS, blocks(R, BT) * H))
    top, total = (x["p_lines"].new_empty(n_splits, R, H) for _ in range(2))
    x = x | {"p_top": top, "p_sum": total, "n_splits": n_splits}
    x["n_blocks"] = blocks(n_blocks, n_splits)
    grid = (blocks(R, BT), H, n_splits)
    launch(log_sum_exp_kernel, grid, x, BT=BT, BS=BS, BK=tile(x["K"]), num_warps=4, num_stages=2)
    BL = 128
    launch(combine_kernel, (blocks(R * H, BL),), x, BL=BL, num_warps=4)


class Tiles(NamedTuple):
    """Of the linear pass: what registers and shared memory hold without spilling."""

    BT: int
    BS: int
    num_warps: int
    num_stages: int


FEW = Tiles(16, 64, 4, 2)
SMALL = Tiles(32, 64, 4, 2)
LARGE = {
    80: Tiles(32, 128, 8, 2),
    90: Tiles(64, 64, 8, 1),
    100: Tiles(64, 64, 8, 1),
    103: Tiles(64, 64, 8, 1),
    "gfx942": Tiles(64, 64, 8, 1),
    "gfx950": Tiles(64, 64, 8, 1),
}
FLOAT32 = Tiles(32, 32, 4, 1)


def tiles(x: Names) -> Tiles:
    """For what the kernel is compiled for, on the GPU at hand."""
    arch = None if INTERPRETED else driver.active.get_current_target().arch
    if x["few"]:
        return FEW
    if x["WIDE"]:
        return FLOAT32
    return LARGE.get(arch, SMALL)


def linear(x: Names) -> None:
    """token, partial, partial_lin and marks; alpha of what is marked."""
    BT, BS, num_warps, num_stages = tiles(x)
    grid = (blocks(x["R"], BT), blocks(x["n_keys"], BS))
    x["p_partial"] = x["p_lines"].new_empty(grid[1], x["R"], x["H"])
    x["p_partial_lin"] = x["p_lines"].new_empty(grid[1], x["R"], x["H"])
    x["BS"] = BS
    launch(
        linear_kernel,
        grid,
        x,
        BT=BT,
        BK=tile(x["K"]),
        BV=tile(x["V"]),
        num_warps=num_warps,
        num_stages=num_stages,
    )
