"""The parts of a layer's rows that no kernel forms: the stream's, the FFN's, and the constant.

The formulas are those of held.py. Each part is computed from the recorded stream and the maps that
the opening probe found. None is what is left of a sum, but for the FFN's part, which is the rest of
`resid_post`. So the closure check (scoring/closure.py) sees an error of any other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .block import Block
from .held import HeldNorm, fit_rows, wide


class Passage(NamedTuple):
    """The linear map by which rows are passed on: norms that are held, and weights."""

    steps: tuple[tuple[Tensor | HeldNorm, Tensor | None], ...] = ()  # a norm with its factors [R]

    def __call__(self, x: Tensor) -> Tensor:
        """Of any vectors x [R, ..., D] of the rows, in float32 or wider, or x itself."""
        for of, factor in self.steps:
            if isinstance(of, HeldNorm):
                assert factor is not None
                x = of.linear(x) * factor.view(-1, *(1 for _ in x.shape[1:]))
            else:
                x = wide(x) * of
        return x


class MidParts(NamedTuple):
    """The parts of `resid_mid`, or of `resid_post` in parallel blocks, beside the heads'."""

    residual: Tensor  # [R, D] the part of resid_pre
    row_scale: Tensor | None  # [R] factors of the heads' parts
    bias: Tensor  # [D] or [R, D]; belongs to no part


class PostParts(NamedTuple):
    """The two parts of `resid_post` in a sequential block."""

    residual: Tensor  # [R, D] the part of resid_mid
    y: Tensor  # [R, D] resid_post, before the layer multiplied it by a constant (`Block.unscaled`)
    given_ffn: Tensor | None = None  # [R, D] the FFN's part; None: y - residual
    error: Tensor | None = None  # [R] of what is passed on, in units of what rounding explains
    passage: Passage = Passage()  # makes `residual` of resid_mid

    @property
    def ffn(self) -> Tensor:
        """[R, D] the FFN's part, in float32 or wider."""
        return wide(self.y) - wide(self.residual) if self.given_ffn is None else self.given_ffn


def mid_parts(
    block: Block,
    resid_pre: Tensor,
    resid_mid: Tensor,
    z: Tensor | None,
    value_gate: Tensor | None,
) -> MidParts:
    """The parts of some rows, in float32 or wider but for a plain layer's stream.

    resid_pre, resid_mid [R, D]; z [R, H, V]: the attention output, where `Block.fits_rows`;
    value_gate [R, H, V] or None.
    """
    of = block.residual
    residual = resid_pre if of is None else of.passed(resid_pre)
    if of is not None and of.mid_norm is not None:
        norm = of.mid_norm
        passed, constant = norm.linear(residual), norm.linear(block.bias)
        whole = passed + constant + _moved(block, z, value_gate, passed)
        factor = fit_rows(whole, wide(resid_mid) - norm.bias)
        column = factor[:, None]
        return MidParts(column * passed, factor, norm.bias + column * constant)
    scale = None
    if block.row_scaled:
        added = wide(resid_mid) - wide(residual) - wide(block.bias)
        scale = fit_rows(_moved(block, z, value_gate, added), added)
    return MidParts(residual, scale, block.bias)


def _moved(block: Block, z: Tensor | None, value_gate: Tensor | None, like: Tensor) -> Tensor:
    """The sum [R, D] of the heads' parts before a norm scales it, in float32 or wider."""
    assert z is not None
    gated = wide(z) if value_gate is None else wide(z) * value_gate
    moved = torch.zeros_like(like)
    for of_head, W_O in zip(gated.unbind(1), block.W_O, strict=True):
        moved.addmm_(of_head, wide(W_O))
    return moved


def post_parts(
    block: Block,
    resid_mid: Tensor,
    resid_post: Tensor,
    normed: Tensor | None,
    error: Tensor | None = None,
) -> PostParts:
    """The parts of some rows [R, D] of a sequential block.

    normed: [R, D] what the norm of the layer's output read there, if there is one. error: 0-d, of
    what the layer passes on (replay.py, `passing_error`).
    """
    found = _post_parts(block, resid_mid, resid_post, normed)
    if error is None:
        return found
    errors = error.expand(len(resid_mid))
    return found._replace(error=errors if found.error is None else found.error.maximum(errors))


def _post_parts(
    block: Block, resid_mid: Tensor, resid_post: Tensor, normed: Tensor | None
) -> PostParts:
    of = block.residual
    if of is None or (of.mid_weight is None and of.post_norm is None):
        return PostParts(resid_mid, block.unscaled(resid_post))
    passed = wide(resid_mid) if of.mid_weight is None else wide(resid_mid) * of.mid_weight
    steps = () if of.mid_weight is None else ((of.mid_weight, None),)
    if of.post_norm is None:
        return PostParts(passed, resid_post, passage=Passage(steps))
    assert normed is not None
    norm = of.post_norm
    factor = norm.factors(normed, resid_post)
    column = factor[:, None]
    residual = column * norm.linear(passed)
    rest = wide(resid_post) - norm.bias - residual
    error = _errors(norm, normed, resid_post, column)
    return PostParts(residual, resid_post, rest, error, Passage((*steps, (norm, factor))))


def passage_to_mid(block: Block, resid_pre: Tensor, row_scale: Tensor | None) -> Passage:
    """The map by which a layer passes rows on to resid_mid, that of `MidParts.residual`.

    resid_pre: [R, D]; row_scale: `MidParts.row_scale` of these rows.
    """
    of, steps = block.residual, list[tuple[Tensor | HeldNorm, Tensor | None]]()
    if of is None:
        return Passage()
    if of.pre_norm is not None:
        factor = of.pre_norm.factors(resid_pre, of.pre_norm.site(resid_pre[None])[0])
        steps.append((of.pre_norm, factor))
    if of.pre_weight is not None:
        steps.append((of.pre_weight, None))
    if of.mid_norm is not None:
        steps.append((of.mid_norm, row_scale))
    return Passage(tuple(steps))


def _errors(norm: HeldNorm, normed: Tensor, out: Tensor, factor: Tensor) -> Tensor:
    """Errors [R] of a held norm's rows, in units of what rounding explains."""
    eps, size = torch.finfo(out.dtype).eps, torch.linalg.vector_norm
    added = wide(out) - norm.bias
    granted = (
        8 * eps * (size(wide(out), dim=-1) + size(factor * wide(normed) * norm.weight, dim=-1))
    )
    granted += max(8 * eps, 1e-3) * size(added, dim=-1)
    gap = size(factor * norm.linear(normed) - added, dim=-1)
    return gap / granted.clamp(min=1e-30)
