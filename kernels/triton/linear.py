"""(b) The linear pass: scores, lin = alpha (v . g), and which pairs need more than that.

For every pair of a tile of rows and keys, head by head, two products

    score = q . k,   alpha = 2^(score - log_sum_exp),   lin = alpha g_scale (v . g)

lin is an upper bound of the proximity and, where a = alpha |gate * v| is below the line's first
breakpoint, the proximity itself. Then it is summed here: over heads for the token edges, over
keys for the heads' totals. The other pairs with lin > 0 are marked, a bit each, as light or heavy
(prepare.py), and left to the correction pass. Marks can be as many as there are pairs: no list
can overflow.

A program goes through all heads of its tile, so that sums over heads stay in registers, and reads
a tile of K and V once for all heads that share it. Tiles that no row of theirs sees are skipped
and written by nobody: who reads a row stays within the keys that it sees.

The log-sum-exp, where the forward pass gave none, is taken by programs that share out a line's
keys, and combined in their order.

Shapes: q [R, H, K], k [S, H_kv, K], v [S, H_kv, V], g [R, H, HALVES, V], lines [4, R, H],
v_norm [H_kv, S], token [R, 32 W], partial [S / BS, R, H], marks [2, R, H, W]; W words of 32 keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    FIRST_BREAKPOINT,
    G_SCALE,
    LIGHT_LIMIT,
    LOG2_E,
    LOG_SUM_EXP,
    ROUND_UP,
    WORD,
    dot,
    first_key,
    log2_scores,
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
    o_q = o_r.to(tl.int64)[:, None] * (stride_qr * UNIT_K) + i_h * (stride_qh * UNIT_K) + o_k[None, :]
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
        "stride_vs", "stride_vh", "stride_gate_r", "stride_gate_h",
    ]
)  # fmt: skip
def linear_kernel(
    p_q, p_k, p_v, p_g, p_gate, p_v_norm, p_rows, p_slopes, p_lines, p_token, p_partial, p_marks,
    R, S, n_words, stride_qr, stride_qh, stride_ks, stride_kh, stride_vs, stride_vh,
    stride_gate_r, stride_gate_h, scale, softcap, window,
    H: tl.constexpr, H_kv: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    UNIT_K: tl.constexpr, UNIT_V: tl.constexpr, HALVES: tl.constexpr, GATED: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = H // H_kv
    i_r, i_s = tl.program_id(0), tl.program_id(1)
    o_r, o_s = i_r * BT + tl.arange(0, BT), i_s * BS + tl.arange(0, BS)
    o_k, o_v, o_word = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BS // WORD)
    m_r, m_s, m_k, m_v = o_r < R, o_s < S, o_k < K, o_v < V
    b_t = tl.load(p_rows + o_r, mask=m_r, other=-1).to(tl.int32)
    t_first = tl.load(p_rows + i_r * BT).to(tl.int32)
    if (i_s * BS > tl.max(b_t)) | (i_s * BS + BS <= first_key(t_first, window, WINDOW)):
        return

    plane = R.to(tl.int64) * H
    o_line = o_r.to(tl.int64) * H  # of head 0
    r64, s64 = o_r.to(tl.int64)[:, None], o_s.to(tl.int64)[:, None]
    m_q, m_g = m_r[:, None] & m_k[None, :], m_r[:, None] & m_v[None, :]
    m_ks, m_vs = m_s[:, None] & m_k[None, :], m_s[:, None] & m_v[None, :]
    m_words = m_r[:, None] & (i_s * (BS // WORD) + o_word < n_words)[None, :]
    p_q += r64 * (stride_qr * UNIT_K) + o_k[None, :]
    p_k += s64 * (stride_ks * UNIT_K) + o_k[None, :]
    p_v += s64 * (stride_vs * UNIT_V) + o_v[None, :]
    p_g += o_line[:, None] * (HALVES * V) + o_v[None, :]
    if GATED:
        p_gate += r64 * (stride_gate_r * UNIT_V) + o_v[None, :]
    p_marks += o_line[:, None] * n_words + i_s * (BS // WORD) + o_word[None, :]
    b_distance = b_t[:, None] - o_s[None, :]

    b_token = tl.zeros([BT, BS], tl.float32)
    for i_kv in range(H_kv):
        b_k = tl.load(p_k + i_kv * (stride_kh * UNIT_K).to(tl.int64), mask=m_ks, other=0.0)
        b_v = tl.load(p_v + i_kv * (stride_vh * UNIT_V).to(tl.int64), mask=m_vs, other=0.0)
        if GATED:  # rounded up by more than the rounding of two factors
            b_v_squares = (b_v.to(tl.float32) * b_v.to(tl.float32) * (1 + 2**-7)).to(tl.bfloat16)
        else:
            b_norm = tl.load(p_v_norm + i_kv * S.to(tl.int64) + o_s, mask=m_s, other=0.0)
        for i_group in range(GROUP):
            i_h = i_kv * GROUP + i_group
            b_q = tl.load(p_q + i_h * (stride_qh * UNIT_K), mask=m_q, other=0.0)  # [BT, BK]
            b_qk = dot(b_q, tl.trans(b_k), tl.zeros([BT, BS], tl.float32))
            b_lin = tl.zeros([BT, BS], tl.float32)
            for i_half in tl.static_range(HALVES):
                b_g = tl.load(p_g + (i_h * HALVES + i_half) * V, mask=m_g, other=0.0)  # [BT, BV]
                b_lin = dot(b_g, tl.trans(b_v), b_lin)
            p_line = p_lines + o_line + i_h
            b_lse = tl.load(p_line + LOG_SUM_EXP * plane, mask=m_r, other=0.0)
            b_g_scale = tl.load(p_line + G_SCALE * plane, mask=m_r, other=0.0)
            b_first = tl.load(p_line + FIRST_BREAKPOINT * plane, mask=m_r, other=float("inf"))
            b_limit = tl.load(p_line + LIGHT_LIMIT * plane, mask=m_r, other=float("inf"))

            slope = tl.load(p_slopes + i_h).to(tl.float32) if ALIBI else 0.0
            b_score = log2_scores(b_qk, b_distance, scale, softcap, slope, window,
                                  SOFTCAP, ALIBI, WINDOW)  # fmt: skip
            b_alpha = tl.exp2(b_score - b_lse[:, None])
            b_lin *= b_alpha * b_g_scale[:, None]
            if GATED:
                b_gate = tl.load(p_gate + i_h * (stride_gate_h * UNIT_V), mask=m_g, other=0.0)
                b_gate = b_gate.to(tl.float32)
                b_gate_squares = (b_gate * b_gate * (1 + 2**-7)).to(tl.bfloat16)
                b_squares = dot(b_gate_squares, tl.trans(b_v_squares),
                                tl.zeros([BT, BS], tl.float32))  # fmt: skip
                b_a = b_alpha * tl.sqrt(b_squares) * ROUND_UP
            else:
                b_a = b_alpha * b_norm[None, :] * ROUND_UP
            m_light = (b_lin > 0) & (b_a > b_first[:, None]) & (b_a <= b_limit[:, None])
            m_heavy = (b_lin > 0) & (b_a > b_first[:, None]) & (b_a > b_limit[:, None])
            b_linear = tl.where(m_light | m_heavy, 0.0, tl.maximum(b_lin, 0.0))
            b_token += b_linear
            tl.store(
                p_partial + i_s.to(tl.int64) * plane + o_line + i_h, tl.sum(b_linear, 1), mask=m_r
            )
            p_mark = p_marks + i_h.to(tl.int64) * n_words
            tl.store(p_mark, pack(m_light, BT, BS), mask=m_words)
            tl.store(p_mark + plane * n_words, pack(m_heavy, BT, BS), mask=m_words)
    o_token = r64 * (n_words * WORD) + o_s[None, :]
    tl.store(p_token + o_token, b_token, mask=m_r[:, None] & (o_s < n_words * WORD)[None, :])


def log_sum_exp(x: Names) -> None:
    """Plane LOG_SUM_EXP of lines, of q and k."""
    BT, BS, R, H = 16 if x["few"] else 64, 64, x["R"], x["H"]
    n_blocks = blocks(x["S"], BS)
    n_splits = min(n_blocks, blocks(PROGRAMS, blocks(R, BT) * H))
    n_blocks = blocks(n_blocks, n_splits)
    top, total = (x["p_lines"].new_empty(n_splits, R, H) for _ in range(2))
    x = x | {"p_top": top, "p_sum": total, "n_blocks": n_blocks, "n_splits": n_splits}
    grid = (blocks(R, BT), H, n_splits)
    launch(log_sum_exp_kernel, grid, x, BT=BT, BS=BS, BK=tile(x["K"]))
    BL = 128
    launch(combine_kernel, (blocks(R * H, BL),), x, BL=BL)


def linear(x: Names) -> None:
    """token, partial and marks."""
    BT = 16 if x["few"] else 64
    grid = (blocks(x["R"], BT), blocks(x["S"], x["BS"]))
    launch(linear_kernel, grid, x, BT=BT, BK=tile(x["K"]), BV=tile(x["V"]))
