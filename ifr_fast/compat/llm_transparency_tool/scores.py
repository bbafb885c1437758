"""What the published tool takes from one [pos, key_pos, head, D] tensor a layer, by the kernels.

Parity (docs/design.md, section 3.5), for a node y with parts p and y' = y − EPSILON:

    ‖y‖₁ − ‖y' − p‖₁ = (‖y‖₁ − ‖y'‖₁) + (‖y'‖₁ − ‖y' − p‖₁)

The second bracket is what kernels score, at y'; the first is an offset of the row. The kernels
add it, and clip at FLOOR, where they would clip at 0: pairs below the floor are counted without
being formed. A key that the row does not see is a part too, of zeros: each head's scores
max(offset, FLOOR).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.contract import LayerInputs, visible
from ...scoring import load_kernel
from .contributions import EPSILON, FLOOR, offset


class AttentionContributions(NamedTuple):
    """Contributions of T rows' parts: pairs of row and key, sparse, and one number for those that
    the row does not see.
    """

    target: Tensor  # [N] int64
    source: Tensor  # [N] int64
    heads: Tensor  # [N, H]
    residual: Tensor  # [T]
    ffn: Tensor | None  # [T] in parallel blocks, whose parts have one denominator
    unseen: Tensor  # [T] of each head at each key not seen; 0 but in parity
    window: int | None  # keys that a row sees, itself included
    linear: Tensor  # [T] `AttentionScores.linear`

    def _seen(self) -> Tensor:
        T = len(self.residual)
        return visible(torch.arange(T, device=self.residual.device), T, self.window)

    def dense(self) -> Tensor:
        """[T, T, H], of a result that kept every pair."""
        unseen = torch.where(self._seen(), 0, self.unseen[:, None]).to(self.heads.dtype)
        found = unseen[..., None].repeat(1, 1, self.heads.shape[1])
        return found.index_put_((self.target, self.source), self.heads)

    def token_edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """Target, source and weight [M] of all pairs whose sum over heads is not 0."""
        weight = self.heads.sum(-1)
        undefined = self.residual.isnan()
        if not bool(undefined.any() | self.unseen.any()):
            some = weight.nonzero().squeeze(1)
            return self.target[some], self.source[some], weight[some]
        H = self.heads.shape[1]
        found = torch.where(self._seen(), 0, H * self.unseen[:, None]).to(weight.dtype)
        found.index_put_((self.target, self.source), weight)
        found[undefined] = torch.nan
        target, source = found.nonzero(as_tuple=True)
        return target, source, found[target, source]

    def renormalized(self, threshold: float, parity: bool) -> AttentionContributions:
        """Contributions above the threshold, each head's by itself, over their sum in the row.

        Where none is above it, 0; in parity 0 / 0.
        """
        H = self.heads.shape[1]
        heads, residual, unseen = (
            x * (x > threshold) for x in (self.heads, self.residual, self.unseen)
        )
        total = residual.index_add(0, self.target, heads.sum(-1))
        total = total + H * n_unseen(len(residual), self.window).to(total.device) * unseen
        ffn = self.ffn
        if ffn is not None:
            ffn = ffn * (ffn > threshold)
            total = total + ffn
        if not parity:
            total = total + (total == 0)
        return self._replace(
            heads=heads / total[self.target, None],
            residual=residual / total,
            ffn=None if ffn is None else ffn / total,
            unseen=unseen / total,
        )


def n_unseen(n_tokens: int, window: int | None) -> Tensor:
    """Keys that each row of a text does not see: [T] int64."""
    seen = torch.arange(1, n_tokens + 1)
    return n_tokens - (seen if window is None else seen.clamp(max=window))


def in_parity(inputs: LayerInputs) -> LayerInputs:
    """The inputs of the tool's arithmetic."""
    y = inputs.y.to(torch.promote_types(inputs.y.dtype, torch.float32))
    return inputs._replace(y=y - EPSILON, offset=offset(y).to(y.dtype), floor=FLOOR)


def score_attention(inputs: LayerInputs, keep: float, impl: str) -> AttentionContributions:
    """Contributions of all rows' parts, in parity where the inputs are; pairs whose sum over heads
    is above `keep`.
    """
    scores = load_kernel(impl).score_attention(inputs, keep)
    edges = scores.edges
    kept = (edges.weight > keep).nonzero().squeeze(1)
    contributions = AttentionContributions(
        edges.row[kept],
        edges.source[kept],
        edges.head_weight[kept],
        scores.residual,
        scores.ffn,
        torch.zeros_like(scores.residual),
        inputs.window,
        scores.linear,
    )
    if inputs.offset is None:
        return contributions
    T, H = scores.head_total.shape
    unseen = inputs.offset.to(scores.total.dtype).clamp(min=inputs.floor)
    total = scores.total + H * n_unseen(T, inputs.window).to(unseen.device) * unseen
    share = scores.total / total
    return contributions._replace(
        heads=contributions.heads * share[contributions.target, None],
        residual=scores.residual * share,
        unseen=unseen / total,
    )
