"""(e) Sums, denominators, and the token edges above `keep`.

1. fold: listed pairs' proximities are added to what the linear pass summed, over heads for
   tokens, over keys for heads, in fixed order.
2. totals: denominators, and the sum of lin; where a denominator is 0, each of the n parts
   gets 1 / n.
3. edges: of each row the tokens whose weight exceeds `keep`, in as many slots as can be.
4. head_weights: of those, each head's importance: a listed pair's from its place, any other's is
   its lin (and offset, and floor), formed anew.

Shapes: token [R, 32 W], partial [S / BS, R, H], partial_lin [S / BS, R, H], marks [2, R, H, W],
proximity [R, H, 32 W], folded [S / BF, R, H], total, residual, ffn, linear, unattributed, n_edges
[R], head_total [R, H], source and weight [R, slots], head_weight [R, slots, H]; W words of 32
keys. Tiles: BF keys, BE slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import G_SCALE, LOG_SUM_EXP, WORD, first_key, log2_scores, share, shifted
from .launch import blocks, launch, tile
from .records import Block


@triton.jit(do_not_specialize=["R", "n_words", "window"])
def fold_kernel(
    p_token, p_partial, p_marks, p_proximity, p_rows, p_folded, R, n_words, window,
    H: tl.constexpr, BS: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """token[r, j] += sum over heads of listed proximities; folded[f, r, h] = their sum over the BF
    keys of tile f, and of partial. Program (row, tile f).

    token [R, 32 W], partial [S / BS, R, H], proximity [R, H, 32 W], folded [S / BF, R, H] float32;
    marks [2, R, H, W] int32; rows [R] int64.
    """
    i_r, i_f = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = tl.load(p_rows + i_r).to(tl.int32)
    first = first_key(t, window)
    if (i_f * BF > t) | (i_f * BF + BF <= first):
        return
    plane = R.to(tl.int64) * H
    o_word = i_f * (BF // WORD) + tl.arange(0, BF // WORD)
    o_bit = tl.arange(0, WORD)[None, :]
    o_s = o_word[:, None] * WORD + o_bit  # [BF / 32, 32]
    m_word = (o_word >= first // WORD) & (o_word <= t // WORD)
    m_s = (o_s >= first) & (o_s <= t)
    o_block = i_f * (BF // BS) + tl.arange(0, BF // BS)
    m_block = (o_block >= first // BS) & (o_block <= t // BS)
    p_token += i_r * n_words * WORD + o_s
    p_partial += o_block.to(tl.int64) * plane + i_r * H
    p_marks += i_r * H * n_words + o_word
    p_proximity += i_r * H * n_words * WORD + o_s
    b_token = tl.load(p_token, mask=m_s, other=0.0)
    for i_h in range(H):
        o_h = i_h * n_words.to(tl.int64)
        b_words = tl.load(p_marks + o_h, mask=m_word, other=0)
        b_words |= tl.load(p_marks + o_h + plane * n_words, mask=m_word, other=0)
        m_listed = m_s & (((b_words[:, None] >> o_bit) & 1) != 0)
        b_listed = tl.load(p_proximity + o_h * WORD, mask=m_listed, other=0.0)
        b_linear = tl.load(p_partial + i_h, mask=m_block, other=0.0)
        b_token += b_listed
        folded = tl.sum(tl.sum(b_listed, 1), 0) + tl.sum(b_linear)
        tl.store(p_folded + i_f * plane + i_r * H + i_h, folded)
    tl.store(p_token, b_token, mask=m_s)


@triton.jit(do_not_specialize=["R", "window"])
def totals_kernel(
    p_folded, p_partial_lin, p_rows, p_residual, p_of_ffn, p_total, p_head_total, p_unattributed,
    p_linear, R, window,
    H: tl.constexpr, BS: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """total[r] = residual + ffn + sum of folded; head_total[r, h] = sum of folded / total;
    linear[r] = sum of partial_lin. residual and of_ffn are divided by total in place. Program
    (row).

    All [R] or [R, H], float32; unattributed bool; folded [S / BF, R, H], partial_lin
    [S / BS, R, H].
    """
    i_r = tl.program_id(0).to(tl.int64)
    t = tl.load(p_rows + i_r).to(tl.int32)
    first = first_key(t, window)
    o_h = tl.arange(0, BH)
    m_h = o_h < H
    b_heads = tl.zeros([BH], tl.float32)
    for i_f in range(first // BF, t // BF + 1):
        o_folded = (i_f * R.to(tl.int64) + i_r) * H + o_h
        b_heads += tl.load(p_folded + o_folded, mask=m_h, other=0.0)
    b_linear = tl.zeros([BH], tl.float32)
    for i_s in range(first // BS, t // BS + 1):
        o_partial = (i_s * R.to(tl.int64) + i_r) * H + o_h
        b_linear += tl.load(p_partial_lin + o_partial, mask=m_h, other=0.0)
    tl.store(p_linear + i_r, tl.sum(b_linear))
    residual = tl.load(p_residual + i_r)
    total = residual + tl.sum(b_heads)
    n_keys = (t - first + 1).to(tl.float32)
    n_parts = 1 + H * n_keys
    if p_of_ffn is not None:
        ffn = tl.load(p_of_ffn + i_r)
        total += ffn
        n_parts += 1
    nothing = total == 0
    total = tl.where(nothing, n_parts, total)
    tl.store(p_residual + i_r, share(tl.where(nothing, 1.0, residual), total))
    if p_of_ffn is not None:
        tl.store(p_of_ffn + i_r, share(tl.where(nothing, 1.0, ffn), total))
    b_heads = share(tl.where(nothing, n_keys, b_heads), total)
    tl.store(p_head_total + i_r * H + o_h, b_heads, mask=m_h)
    tl.store(p_total + i_r, total)
    tl.store(p_unattributed + i_r, nothing)


@triton.jit(do_not_specialize=["n_words", "n_slots", "window"])
def edges_kernel(
    p_token, p_rows, p_total, p_unattributed, p_source, p_weight, p_n_edges,
    n_words, n_slots, window, keep,
    H: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """source and weight [R, slots] of the tokens with token / total > keep, ascending; n_edges [R]
    of them. Slots that no edge needs are left as they are. Program (row).

    token [R, 32 W] and weight float32, source int64, n_edges int32.
    """
    i_r = tl.program_id(0).to(tl.int64)
    t = tl.load(p_rows + i_r).to(tl.int32)
    first = first_key(t, window)
    total = tl.load(p_total + i_r)
    nothing = tl.load(p_unattributed + i_r) != 0
    count = 0
    for i_s in range(first // BF * BF, t + 1, BF):
        o_s = i_s + tl.arange(0, BF)
        m_s = (o_s >= first) & (o_s <= t)
        b_token = tl.load(p_token + i_r * n_words * WORD + o_s, mask=m_s, other=0.0)
        b_weight = share(tl.where(nothing, H, b_token), total)
        m_edge = m_s & (b_weight > keep)
        b_slot = count + tl.cumsum(m_edge.to(tl.int32), 0) - 1
        m_edge &= b_slot < n_slots
        tl.store(p_source + i_r * n_slots + b_slot, o_s.to(tl.int64), mask=m_edge)
        tl.store(p_weight + i_r * n_slots + b_slot, b_weight, mask=m_edge)
        count += tl.sum(m_edge.to(tl.int32))
    tl.store(p_n_edges + i_r, count)


@triton.jit(
    do_not_specialize=[
        "R", "n_words", "n_slots", "window", "stride_qr", "stride_qh", "stride_ks", "stride_kh",
        "stride_vs", "stride_vh",
    ]
)  # fmt: skip
def head_weights_kernel(
    p_q, p_k, p_v, p_g, p_rows, p_slopes, p_lines, p_marks, p_proximity,
    p_total, p_unattributed, p_source, p_n_edges, p_offset, p_head_weight,
    R, n_words, n_slots, stride_qr, stride_qh, stride_ks, stride_kh, stride_vs, stride_vh,
    scale, softcap, window, floor,
    H: tl.constexpr, H_kv: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    UNIT_K: tl.constexpr, UNIT_V: tl.constexpr, HALVES: tl.constexpr,
    BE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """head_weight[r, e, h] = proximity[r, h, j] / total[r] of each edge's key j: of a listed pair
    from its place, of any other max(lin + offset, floor), formed anew. Program (row, BE slots).

    q [R, H, K], k [S, H_kv, K], v [S, H_kv, V] in the model's dtype; g [R, H, HALVES, V]; lines
    [4, R, H], proximity [R, H, 32 W], head_weight [R, slots, H] float32.
    """
    GROUP: tl.constexpr = H // H_kv
    i_r, plane = tl.program_id(0).to(tl.int64), R.to(tl.int64) * H
    n_edges = tl.load(p_n_edges + i_r)
    if tl.program_id(1) * BE >= n_edges:
        return
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    m_e, m_k, m_v = o_e < n_edges, o_k < K, o_v < V
    m_ek, m_ev = m_e[:, None] & m_k[None, :], m_e[:, None] & m_v[None, :]
    t = tl.load(p_rows + i_r).to(tl.int32)
    total = tl.load(p_total + i_r)
    nothing = tl.load(p_unattributed + i_r) != 0
    b_s = tl.load(p_source + i_r * n_slots + o_e, mask=m_e, other=0)  # [BE] int64
    b_distance = t - b_s.to(tl.int32)
    p_k += b_s[:, None] * (stride_ks * UNIT_K) + o_k[None, :]
    p_v += b_s[:, None] * (stride_vs * UNIT_V) + o_v[None, :]
    for i_kv in range(H_kv):
        b_k = tl.load(p_k + i_kv * (stride_kh * UNIT_K).to(tl.int64), mask=m_ek, other=0.0)
        b_v = tl.load(p_v + i_kv * (stride_vh * UNIT_V).to(tl.int64), mask=m_ev, other=0.0)
        for i_group in range(GROUP):
            i_h = i_kv * GROUP + i_group
            i_line = i_r * H + i_h
            b_q = tl.load(p_q + i_r * (stride_qr * UNIT_K) + i_h * (stride_qh * UNIT_K) + o_k,
                          mask=m_k, other=0.0)  # fmt: skip
            p_line_g = p_g + i_line * (HALVES * V) + o_v
            b_g = tl.load(p_line_g, mask=m_v, other=0.0).to(tl.float32)
            if HALVES == 2:
                b_g += tl.load(p_line_g + V, mask=m_v, other=0.0).to(tl.float32)
            slope = tl.load(p_slopes + i_h).to(tl.float32) if p_slopes is not None else None
            b_qk = tl.sum(b_k.to(tl.float32) * b_q.to(tl.float32)[None, :], 1)
            b_score = log2_scores(b_qk, b_distance, scale, softcap, slope, window)
            b_alpha = tl.exp2(b_score - tl.load(p_lines + LOG_SUM_EXP * plane + i_line))
            b_lin = tl.sum(b_v.to(tl.float32) * b_g[None, :], 1)
            b_lin *= b_alpha * tl.load(p_lines + G_SCALE * plane + i_line)

            p_mark = p_marks + i_line * n_words + b_s // WORD
            b_words = tl.load(p_mark, mask=m_e, other=0)
            b_words |= tl.load(p_mark + plane * n_words, mask=m_e, other=0)
            m_listed = ((b_words >> (b_s % WORD).to(tl.int32)) & 1) != 0
            p_listed = p_proximity + i_line * n_words * WORD + b_s
            b_listed = tl.load(p_listed, mask=m_e & m_listed, other=0.0)
            b_linear = shifted(b_lin, p_offset, i_r, floor)
            b_proximity = tl.where(m_listed, b_listed, b_linear)
            b_proximity = tl.where(nothing, 1.0, b_proximity)
            o_out = (i_r * n_slots + o_e) * H + i_h
            tl.store(p_head_weight + o_out, share(b_proximity, total), mask=m_e)


def fold(x: Block) -> None:
    """Sums the token edges over heads, listed pairs included, and folds them."""
    launch(fold_kernel, (x.rows.R, blocks(x.layer.S, x.layer.BF)), x)


def totals(x: Block) -> None:
    """Computes the denominators, and divides everything but the edges by them."""
    launch(totals_kernel, (x.rows.R,), x, BH=triton.next_power_of_2(x.layer.H))


def edges(x: Block) -> None:
    """Source, weight and head_weight of the edges."""
    launch(edges_kernel, (x.rows.R,), x)
    BE = 16
    tiles = {"BE": BE, "BK": tile(x.layer.K), "BV": tile(x.layer.V)}
    launch(head_weights_kernel, (x.rows.R, blocks(x.rows.n_slots, BE)), x, **tiles)
