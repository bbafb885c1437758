"""Signs, value-space g, column norms, and the breakpoints at which proximity stops being linear.

**Identity.** Let s_i = +1 where y_i >= 0, else -1. For every part p, coordinate by coordinate,

    |y_i| - |y_i - p_i| = s_i p_i - 2 max(s_i p_i - |y_i|, 0).

Proof. With x = s_i p_i and m = |y_i| >= 0 we have y_i = s_i m, so |y_i - p_i| = |m - x|.
If x <= m the left side is m - (m - x) = x, and the correction is 0. If x > m it is
m - (x - m) = 2m - x = x - 2(x - m). (y_i = 0 is the case m = 0.)  Summed over i:

    |y|_1 - |y - p|_1 = lin(p) - correction(p),   lin(p) = s . p,
    correction(p) = 2 sum_i max(s_i p_i - |y_i|, 0) >= 0.

So lin is an upper bound, and lin <= 0 means proximity 0, exactly. For p = w (v @ W_O[h]),
lin(p) = w (v . g) with g = W_O[h] @ s: a product in value space, D never touched.

**Breakpoints.** Let rho_i = |W_O[h][:, i]|_2 and a = |w| |v|_2. By Cauchy-Schwarz |p_i| <= a rho_i,
so s_i p_i > |y_i| needs a > |y_i| / rho_i, the *breakpoint* of coordinate i (infinite where
rho_i = 0, as then p_i = 0). Summing the correction over the coordinates whose breakpoint is
below a is therefore exact, and where a is below the smallest breakpoint, lin itself is.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Comparisons round a up by this factor. So rounding in a, rho or the quotient can only add a
# coordinate to the sum, where its correction is 0, and never lose one.
ROUND_UP = 1 + 2**-10


def signs(y: Tensor) -> Tensor:
    """s [R, D]: +1 where y >= 0, else -1, in the dtype of `y`."""
    return torch.ones_like(y).copysign_(y + 0.0)  # + 0.0 turns -0.0 into 0.0


def value_space_signs(W_O: Tensor, s: Tensor) -> Tensor:
    """g = W_O[h] @ s: [H, V, D] x [R, D] -> [H, R, V], so that lin = w (v . g)."""
    return torch.bmm(s.expand(len(W_O), -1, -1), W_O.transpose(1, 2))


def column_norms(W_O: Tensor) -> Tensor:
    """rho [H, D] = |W_O[h][:, i]|_2."""
    return torch.linalg.vector_norm(W_O, dim=1)


def breakpoints(y: Tensor, rho: Tensor) -> Tensor:
    """|y_i| / rho_i: [R, D], [H, D] -> [H, R, D]; infinite where rho_i = 0."""
    quotient = y.abs() / rho[:, None]
    return quotient.masked_fill_((rho == 0)[:, None], float("inf"))
