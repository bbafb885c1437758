"""(c, first half) Marks to lists: the light pairs of a line at the front of its list, the heavy
ones from its end backwards. A list has room for every key of its line.

A thread holds a word of the mask and takes its bits out one by one, lowest first; a prefix sum of
the words' counts says where they go. Light keys thus ascend, and so do heavy ones, backwards.

Shapes: marks [2, R, H, W] words of 32 keys, pairs [R, H, 32 W] (the lists), counts [3, R, H].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LIGHT, WORD, first_key, popcount
from .launch import blocks, launch
from .records import Block


@triton.jit(do_not_specialize=["R", "n_words", "window"])
def lists_kernel(
    p_marks, p_rows, p_pairs, p_counts, R, n_words, window,
    H: tl.constexpr, BL: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """pairs[r, h, :n] = the keys of the light marks; pairs[r, h, -n:] = the keys of the heavy
    marks, from the end backwards; counts = n of each. Program (BL lines, light or heavy).

    marks [2, R, H, W], pairs [R, H, 32 W], counts [3, R, H] int32; rows [R] int64.
    """
    i_tier, plane = tl.program_id(1).to(tl.int64), R.to(tl.int64) * H
    o_line = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    m_line = o_line < plane
    b_t = tl.load(p_rows + o_line // H, mask=m_line, other=-1).to(tl.int32)
    b_first = first_key(b_t, window) // WORD
    b_last = tl.where(m_line, b_t // WORD, -1)
    p_marks += (i_tier * plane + o_line)[:, None] * n_words
    # Light pairs go up from the front, heavy ones down from the end.
    step = tl.where(i_tier == 0, 1, -1)
    o_front = o_line + tl.where(i_tier == 0, 0, 1)
    b_to = o_front * (n_words * WORD) - tl.where(i_tier == 0, 0, 1)  # [BL]
    b_count = tl.zeros([BL], tl.int32)
    for i_w in range(tl.min(tl.where(m_line, b_first, b_last)), tl.max(b_last) + 1, BW):
        b_w = (i_w + tl.arange(0, BW))[None, :]
        m_w = (b_w >= b_first[:, None]) & (b_w <= b_last[:, None])
        b_bits = tl.load(p_marks + b_w, mask=m_w, other=0)  # [BL, BW]
        b_n = popcount(b_bits)
        b_place = b_count[:, None] + tl.cumsum(b_n, 1) - b_n
        while tl.max((b_bits != 0).to(tl.int32)) > 0:
            b_lowest = b_bits & -b_bits
            # The place of the lowest bit is its exponent as a number.
            b_bit = (b_lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF
            b_key = b_w * WORD + b_bit - 127
            tl.store(p_pairs + b_to[:, None] + step * b_place, b_key, mask=b_bits != 0)
            b_place += 1
            b_bits ^= b_lowest
        b_count += tl.sum(b_n, 1)
    tl.store(p_counts + (LIGHT + i_tier) * plane + o_line, b_count, mask=m_line)


def lists(x: Block) -> None:
    """Lists and counts, of marks."""
    BL = 16
    launch(lists_kernel, (blocks(x.rows.R * x.layer.H, BL), 2), x, BL=BL, BW=32)
