"""(b) The linear pass: scores, lin = alpha (v . g), and marks of the pairs that need a correction.

For every pair of a tile of rows and keys, head by head, two products

    score = q . k,   alpha = 2^(score - log_sum_exp),   lin = alpha g_scale (v . g)

lin is an upper bound of the proximity and, where a = alpha |gate * v| is below the line's first
breakpoint, the proximity itself. Then it is summed here: over heads for the token edges, over
keys for the heads' totals. (Where rows are many, a = alpha reach: reach.py.) The other
pairs with lin > 0 are marked, a bit each, as light or heavy (prepare.py), and left to the
correction pass, which finds alpha in the place of the proximity. There is room for as many marks as
pairs: no list can overflow.

A program goes through all heads of its tile, so that sums over heads stay in registers, and reads
a tile of K and V once for all heads that share it. Tiles with no key that a row of theirs sees are
skipped and stay unwritten: readers of a row stay within the keys that it sees. Only tiles in which
some row does not see some key compare positions.

Where the forward pass gave no log-sum-exp, programs that share out a line's keys take it; their
results are combined in order.

Shapes: q [R, H, K], k [S, H_kv, K], v16 [S, H_kv, V] and v_scale [H_kv] (prepare.py; v itself
where v_scale is None), g [R, H, HALVES, V], lines [4, R, H], reach [H, S] or, norms of values,
[H_kv, S], token [R, 32 W], partial [S / BS, R, H], partial_lin [S / BS, R, H], marks [2, R, H, W],
proximity [R, H, 32 W]; W words of 32 keys.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .common import (
    FIRST_BREAKPOINT,
    G_SCALE,
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
from .launch import blocks, launch, tile
from .records import Block

LOWEST = tl.constexpr(-1e30)  # below every maximum; finite, so that -inf - LOWEST is -inf


@triton.jit(
    do_not_specialize=[
        "R", "S", "n_blocks", "stride_qr", "stride_qh", "stride_ks", "stride_kh", "window",
    ]
)  # fmt: skip
def log_sum_exp_kernel(
    p_q, p_k, p_rows, p_slopes, p_tops, p_sums,
    R, S, n_blocks, stride_qr, stride_qh, stride_ks, stride_kh, scale, softcap, window,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, UNIT_K: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """tops[split, r, h] = the largest score of the split's keys, sums = sum of 2^(score - top) over
    them. Program (BT rows, head, split of n_blocks blocks of BS keys).

    q [R, H, K], k [S, H_kv, K] in the model's dtype; tops and sums [splits, R, H] float32.
    """
    i_h, i_split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    o_r = tl.program_id(0) * BT + tl.arange(0, BT)
    o_s, o_k = tl.arange(0, BS), tl.arange(0, BK)
    m_r, m_k = o_r < R, o_k < K
    b_t = tl.load(p_rows + o_r, mask=m_r, other=-1).to(tl.int32)
    slope = tl.load(p_slopes + i_h).to(tl.float32) if p_slopes is not None else None
    o_q = (
        o_r.to(tl.int64)[:, None] * (stride_qr * UNIT_K) + i_h * (stride_qh * UNIT_K) + o_k[None, :]
    )
    b_q = tl.load(p_q + o_q, mask=m_r[:, None] & m_k[None, :], other=0.0)  # [BT, BK]
    p_k += (i_h // GROUP) * (stride_kh * UNIT_K) + o_k[None, :]

    t_first = tl.load(p_rows + tl.program_id(0) * BT).to(tl.int32)
    begin = tl.maximum(i_split * n_blocks, first_key(t_first, window) // BS)
    end = tl.minimum((i_split + 1) * n_blocks, tl.max(b_t) // BS + 1)
    b_top = tl.full([BT], LOWEST, tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    for i_s in range(begin, end):
        b_s = i_s * BS + o_s
        m_ks = (b_s < S)[:, None] & m_k[None, :]
        b_k = tl.load(p_k + b_s.to(tl.int64)[:, None] * (stride_ks * UNIT_K), mask=m_ks, other=0.0)
        b_qk = dot(b_q, tl.trans(b_k), tl.zeros([BT, BS], tl.float32))
        b_distance = b_t[:, None] - b_s[None, :]
        b_score = log2_scores(b_qk, b_distance, scale, softcap, slope, window)
        b_new = tl.maximum(b_top, tl.max(b_score, 1))
        b_sum = b_sum * tl.exp2(b_top - b_new) + tl.sum(tl.exp2(b_score - b_new[:, None]), 1)
        b_top = b_new
    o_out = (i_split * R.to(tl.int64) + o_r) * H + i_h
    tl.store(p_tops + o_out, b_top, mask=m_r)
    tl.store(p_sums + o_out, b_sum, mask=m_r)


@triton.jit(do_not_specialize=["R", "n_splits"])
def combine_kernel(
    p_tops, p_sums, p_sinks, p_lines, R, n_splits,
    H: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """lines[LOG_SUM_EXP] = top + log2(sum) over a line's splits, and its head's sink. Program (BL
    lines).

    tops and sums [splits, R, H], lines [4, R, H] float32; sinks [H].
    """
    n_lines = R.to(tl.int64) * H
    o_line = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    m_line = o_line < n_lines
    b_top = tl.full([BL], LOWEST, tl.float32)
    b_sum = tl.zeros([BL], tl.float32)
    if p_sinks is not None:
        b_top = tl.load(p_sinks + o_line % H, mask=m_line, other=0.0).to(tl.float32) * LOG2_E
        b_sum += 1.0
    for i_split in range(n_splits):
        o_part = i_split * n_lines + o_line
        b_other = tl.load(p_tops + o_part, mask=m_line, other=LOWEST)
        b_other_sum = tl.load(p_sums + o_part, mask=m_line, other=1.0)
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
        "stride_us", "stride_uh",
    ]
)  # fmt: skip
def linear_kernel(
    p_q, p_k, p_v16, p_v_scale, p_g, p_gate, p_reach, p_rows, p_slopes, p_lines, p_token, p_partial,
    p_partial_lin, p_marks, p_proximity, p_offset,
    R, S, n_words, stride_qr, stride_qh, stride_ks, stride_kh, stride_us, stride_uh,
    scale, softcap, window, floor,
    H: tl.constexpr, H_kv: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    UNIT_K: tl.constexpr, UNIT_V: tl.constexpr, HALVES: tl.constexpr, REACH: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """For every pair (r, h, j) of a tile of rows and keys,

        alpha = 2^(score - lines[LOG_SUM_EXP]),   lin = alpha lines[G_SCALE] (v16 . g) v_scale,
        a = alpha reach  (or alpha |gate * v|),
        listed where lin > 0 and a > lines[FIRST_BREAKPOINT], heavy where a > lines[LIGHT_LIMIT].

    Writes marks of light and heavy pairs and, in proximity, their alpha; token[r, j] = sum over
    heads of max(lin, 0) of all other pairs; partial[tile, r, h] = sum over keys of the same;
    partial_lin = sum over keys of every lin. With an offset, lin + offset > floor takes the place
    of lin > 0, and max(lin + offset, floor) of max(lin, 0). Program (BT rows, BS keys), all heads.

    q [R, H, K], k [S, H_kv, K], gate [R, H, V] in the model's dtype; v16 [S, H_kv, V] likewise, or
    float16 with v_scale [H_kv]; g [R, H, HALVES, V] in v16's dtype; reach [H, S] (norms [H_kv, S]
    unless REACH), lines [4, R, H], token [R, 32 W], partial and partial_lin [S / BS, R, H],
    proximity [R, H, 32 W] float32; marks [2, R, H, W] int32; rows [R] int64; offset [R].
    """
    GROUP: tl.constexpr = H // H_kv
    i_r, i_s = tl.program_id(0), tl.program_id(1)
    o_r, o_s = i_r * BT + tl.arange(0, BT), i_s * BS + tl.arange(0, BS)
    o_k, o_v, o_word = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BS // WORD)
    m_r, m_s = o_r < R, o_s < S
    b_t = tl.load(p_rows + o_r, mask=m_r, other=-1).to(tl.int32)
    t_first = tl.load(p_rows + i_r * BT).to(tl.int32)
    t_last = tl.max(b_t)
    if (i_s * BS > t_last) | (i_s * BS + BS <= first_key(t_first, window)):
        return
    some_unseen = (i_s * BS + BS - 1 > t_first) | (first_key(t_last, window) > i_s * BS)

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
    if p_gate is not None:
        p_gate += i_line * V
        o_gate = o_t[:, None] * (H * V) + o_v[None, :]

    b_token = tl.zeros([BT, BS], tl.float32)
    for i_kv in range(H_kv):
        b_k = tl.load(p_k + i_kv * stride_kh + o_ks, mask=m_ks, other=0.0)  # [BS, BK]
        b_v = tl.load(p_v16 + i_kv * stride_uh + o_vs, mask=m_vs, other=0.0)  # [BS, BV]
        v_scale = tl.load(p_v_scale + i_kv) if p_v_scale is not None else 1.0
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

            # Loaded anew for each head, so that values derived from it do not stay in registers.
            b_t = tl.load(p_rows + o_r, mask=m_r, other=-1).to(tl.int32)
            slope = tl.load(p_slopes + i_h).to(tl.float32) if p_slopes is not None else None
            if p_slopes is not None or p_offset is not None:
                b_distance = b_t[:, None] - o_s[None, :]
            else:
                b_distance = None
            b_score = all_log2_scores(b_qk, b_distance, scale, softcap, slope)
            if some_unseen:
                b_score = tl.where(
                    seen(b_t[:, None] - o_s[None, :], window), b_score, -float("inf")
                )
            b_alpha = tl.exp2(b_score - b_lse[:, None])
            b_lin *= b_alpha * (b_g_scale * v_scale)[:, None]
            tl.store(p_partial_lin + i_h + o_t * H, tl.sum(b_lin, 1), mask=m_r)
            if p_gate is not None:
                b_gate = tl.load(p_gate + i_h * V + o_gate, mask=m_g, other=0.0).to(tl.float32)
                # The squares are rounded up by more than two factors are rounded.
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
            if p_offset is not None:
                m_seen = seen(b_distance, window)
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
            if p_offset is not None:
                b_linear = tl.where(m_seen & ~m_listed, tl.maximum(b_lin, floor), 0.0)
            else:
                b_linear = tl.where(m_listed, 0.0, tl.maximum(b_lin, 0.0))
            b_token += b_linear
            tl.store(p_partial + i_h + o_t * H, tl.sum(b_linear, 1), mask=m_r)
    o_token = o_r.to(tl.int64)[:, None] * (n_words * WORD) + o_s[None, :]
    tl.store(p_token + o_token, b_token, mask=m_r[:, None] & (o_s < n_words * WORD)[None, :])


class Splits(NamedTuple):
    """Log-sum-exps of a line's keys, shared out among programs."""

    tops: Tensor  # [splits, R, H]
    sums: Tensor  # [splits, R, H]
    n_splits: int
    n_blocks: int  # blocks of keys of a split


def log_sum_exp(x: Block) -> None:
    """Plane LOG_SUM_EXP of lines, of q and k."""
    R, H = x.rows.R, x.layer.H
    BS = 32 if x.layer.wide else 64
    BT = 16 if x.rows.few else BS
    n_blocks = blocks(x.rows.n_keys, BS)
    n_splits = min(n_blocks, blocks(tiles.PROGRAMS, blocks(R, BT) * H))
    tops, sums = (x.work.lines.new_empty(n_splits, R, H) for _ in range(2))
    records = (*x, Splits(tops, sums, n_splits, blocks(n_blocks, n_splits)))
    options = {"BT": BT, "BS": BS, "BK": tile(x.layer.K), "num_warps": 4, "num_stages": 2}
    launch(log_sum_exp_kernel, (blocks(R, BT), H, n_splits), records, **options)
    BL = 128
    launch(combine_kernel, (blocks(R * H, BL),), records, BL=BL, num_warps=4)


def linear(x: Block) -> None:
    """token, partial, partial_lin and marks; alpha of the marked pairs."""
    of = tiles.linear(x.rows.few, x.layer.wide)
    grid = (blocks(x.rows.R, of.BT), blocks(x.rows.n_keys, of.BS))
    options = {"BK": tile(x.layer.K), "BV": tile(x.layer.V), **of._asdict()}
    launch(linear_kernel, grid, x, **options)
