"""Helpers that several kernels share: scores of pairs, products, bits.

A *line* is one (row, head) of a block of R rows; its numbers lie in planes [R, H]. Options that a
layer does not have are None, which Triton compiles for like a constant.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Planes of `lines`, float32 [4, R, H]
LOG_SUM_EXP = tl.constexpr(0)  # log-sum-exp of the line's scores, base 2
G_SCALE = tl.constexpr(1)  # the factor that the stored g lacks, row_scale included
FIRST_BREAKPOINT = tl.constexpr(2)  # the smallest breakpoint, divided by |row_scale|
LIGHT_LIMIT = tl.constexpr(3)  # a pair with an a up to this is light

# Planes of `counts`, int32 [3, R, H]
CANDIDATES = tl.constexpr(0)
LIGHT = tl.constexpr(1)  # pairs; also the plane of their masks
HEAVY = tl.constexpr(2)

LOG2_E = tl.constexpr(1.4426950408889634)
ROUND_UP = tl.constexpr(1 + 2**-10)  # ../breakpoints.py
WORD = tl.constexpr(32)  # keys in a word of a mask

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b at the precision of the operands, summed in float32."""
    if INTERPRETED:  # the interpreter's tl.dot takes bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def among(m, o, width: tl.constexpr, tile: tl.constexpr):
    """Mask of a tile [.., tile]: rows by m, and columns o below the width unless all are."""
    if width == tile:
        return m[:, None]
    else:
        return m[:, None] & (o < width)[None, :]


@triton.jit
def seen(b_distance, window):
    """Mask of the keys that a row sees, by their distance below it; window: int or None."""
    m_seen = b_distance >= 0
    if window is not None:
        m_seen &= b_distance < window
    return m_seen


@triton.jit
def shifted(b_bound, p_offset, o_r, floor):
    """Proximities max(bound + offset[row], floor); without offsets, max(bound, 0)."""
    if p_offset is not None:
        return tl.maximum(b_bound + tl.load(p_offset + o_r).to(tl.float32), floor)
    else:
        return tl.maximum(b_bound, 0.0)


@triton.jit
def share(part, total):
    """part / total, at most 1; NaN stays NaN."""
    ratio = part / total
    return tl.where(ratio > 1, 1.0, ratio)


@triton.jit
def all_log2_scores(b_qk, b_distance, scale, softcap, slope):
    """Base-2 scores of pairs from q . k, as if every key were visible.

    b_qk: float32; b_distance: int32, row less key, of the same shape; softcap, slope: or None.
    """
    if softcap is not None:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        b_tanh = 1 - 2 / (tl.exp2(b_qk * (scale * 2 * LOG2_E / softcap)) + 1)
        b_score = b_tanh * (softcap * LOG2_E)
    else:
        b_score = b_qk * (scale * LOG2_E)
    if slope is not None:
        b_score -= (slope * LOG2_E) * b_distance.to(tl.float32)
    return b_score


@triton.jit
def log2_scores(b_qk, b_distance, scale, softcap, slope, window):
    """Base-2 scores of pairs from q . k; -inf where the key is not visible."""
    b_score = all_log2_scores(b_qk, b_distance, scale, softcap, slope)
    return tl.where(seen(b_distance, window), b_score, -float("inf"))


@triton.jit
def first_key(t, window):
    """The first key that a row at position t sees."""
    if window is not None:
        return tl.maximum(t - window + 1, 0)
    else:
        return t * 0


@triton.jit
def popcount(x):
    """Number of bits set, int32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x += x >> 8
    return (x + (x >> 16)) & 0x3F
