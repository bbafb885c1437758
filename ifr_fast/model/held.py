"""Residual connections that are no plain addition, and norms of the whole stream that are held.

    resid_mid  = M(R(resid_pre) + attention + constant)
    resid_post = P(w' * resid_mid + FFN)

M and P are norms, or nothing. R(x) is x, w * x, or w * (N(x) - N(0)) with a norm N. In a plain
layer there are no norms and R(x) is x. Post-norm decoders have M and P, Doge has w and w', MiniMax
has M, N and w.

A norm is held at the statistics that it had at a row: N(s) = f L(s) + N(0) with a number f for the
row and one map L for all rows, L(s) = weight * s or weight * (s - mean(s)). L is the derivative of
N at 0, where norms are linear, and f is fitted to the row's own input and output. With norms held,
R, M and P are linear, so the parts of a sum remain parts behind them:

    resid_mid  = f L(R(resid_pre)) + f L(attention) + f L(constant) + M(0).

The first term is the part of `resid_pre`; the last two belong to no part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


def fit_rows(moved: Tensor, added: Tensor) -> Tensor:
    """The factor [R] for each row that brings `moved` [R, D] nearest to `added` [R, D]."""
    return (moved * added).sum(-1) / moved.square().sum(-1).clamp(min=torch.finfo(moved.dtype).tiny)


def fit_heads(moved: Tensor, added: Tensor) -> Tensor:
    """The factor [R, H] for each row and head that brings `moved` [R, H, V] nearest to `added`."""
    return fit_rows(moved, added)


def wide(x: Tensor) -> Tensor:
    """x in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class HeldNorm(NamedTuple):
    """A norm whose statistics are held: out = f * linear(x) + bias, f a number for each row."""

    site: nn.Module
    weight: Tensor  # [D] in float32 or wider
    centered: bool  # whether a row's mean is taken off first
    bias: Tensor  # [D] in float32 or wider

    def linear(self, x: Tensor) -> Tensor:
        """L(x) of any x [..., D], in float32 or wider."""
        x = wide(x)
        if self.centered:
            x = x - x.mean(-1, keepdim=True)
        return x * self.weight

    def factors(self, x: Tensor, out: Tensor) -> Tensor:
        """f [R] of the rows x [R, D] from which the norm made `out` [R, D]."""
        return fit_rows(self.linear(x), wide(out) - self.bias)


class Residual(NamedTuple):
    """How a layer passes its stream on, where that is not by plain additions."""

    pre_norm: HeldNorm | None = None  # N
    pre_weight: Tensor | None = None  # w [D]; None: 1
    mid_norm: HeldNorm | None = None  # M
    mid_weight: Tensor | None = None  # w' [D]; None: 1
    post_norm: HeldNorm | None = None  # P

    def passed(self, resid_pre: Tensor) -> Tensor:
        """R(resid_pre) [R, D], in float32 or wider. The norm N is run."""
        x = wide(resid_pre)
        if self.pre_norm is not None:
            x = wide(self.pre_norm.site(resid_pre[None])[0]) - self.pre_norm.bias
        return x if self.pre_weight is None else x * self.pre_weight

    def facts(self) -> list[object]:
        """Everything that it holds, to be compared."""
        found: list[object] = []
        for x in (self.pre_norm, self.mid_norm, self.post_norm):
            if x is not None:
                found += [id(x.site), x.weight.tolist(), x.centered, x.bias.tolist()]
            found.append(x is None)
        return found + [
            None if w is None else w.tolist() for w in (self.pre_weight, self.mid_weight)
        ]
