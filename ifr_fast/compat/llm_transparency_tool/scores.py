"""The published tool's contributions, computed by kernels without its [pos, key_pos, head, D].

Parity (docs/design.md, section 3.5), for a node y with parts p and y' = y − EPSILON:

    ‖y‖₁ − ‖y' − p‖₁ = (‖y‖₁ − ‖y'‖₁) + (‖y'‖₁ − ‖y' − p‖₁)

Kernels score the second bracket, at y'; the first bracket is an offset of the row. The kernels
add it, and clip at FLOOR instead of 0. They count pairs below the floor without forming them. A key
that the row does not see is a part of zeros: each head scores max(offset, FLOOR) for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.contract import AttentionScores, LayerInputs
from ...scoring.closure import cat_on
from ...scoring.given_rows import given_rows
from ...scoring.implementations import Kernel, kernel_of
from .contributions import EPSILON, FLOOR, offset

_FFN_ROWS = 512  # rows scored at once


class ScoredLayer(NamedTuple):
    """A kernel's scores of all rows of a layer."""

    scores: AttentionScores
    offset: Tensor | None  # [T], in parity only
    window: int | None  # number of keys that a row sees, including itself


class AttentionContributions(NamedTuple):
    """Contributions of the parts of R rows, the rows of L layers one after another.

    Pairs of row and key are sparse. All keys that a row does not see share one number.
    """

    row: Tensor  # [N] int64, layer * n_keys + position
    source: Tensor  # [N] int64
    heads: Tensor  # [N, H]
    residual: Tensor  # [R]
    ffn: Tensor  # [R] in parallel blocks, whose parts have one denominator; otherwise 0
    unseen: Tensor  # [R] of each head at each key that is not seen; 0 without parity
    n_seen: Tensor  # [R] int64, number of keys that a row sees, itself the last
    n_keys: int

    def _seen(self) -> Tensor:
        """[R, n_keys] bool: whether a row sees a key."""
        keys = torch.arange(self.n_keys, device=self.residual.device)
        last = keys.repeat(len(self.residual) // self.n_keys)[:, None]
        return (keys <= last) & (keys > last - self.n_seen[:, None])

    def dense(self) -> Tensor:
        """[R, n_keys, H]; requires a result that kept every pair."""
        unseen = torch.where(self._seen(), 0, self.unseen[:, None]).to(self.heads.dtype)
        found = unseen[..., None].repeat(1, 1, self.heads.shape[1])
        return found.index_put_((self.row, self.source), self.heads)

    def token_edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row, source and weight [M] of all pairs whose sum over heads is not 0."""
        weight = self.heads.sum(-1)
        undefined = self.residual.isnan()
        if not bool(undefined.any() | self.unseen.any()):
            some = weight.nonzero().squeeze(1)
            return self.row[some], self.source[some], weight[some]
        H = self.heads.shape[1]
        found = torch.where(self._seen(), 0, H * self.unseen[:, None]).to(weight.dtype)
        found.index_put_((self.row, self.source), weight)
        found[undefined] = torch.nan
        row, source = found.nonzero(as_tuple=True)
        return row, source, found[row, source]

    def renormalized(self, threshold: float, parity: bool) -> AttentionContributions:
        """Contributions above the threshold, each head by itself, divided by their sum in the row.

        If none of a row is above it, they are 0, or in parity 0 / 0.
        """
        H = self.heads.shape[1]
        heads, residual, ffn, unseen = (
            x * (x > threshold) for x in (self.heads, self.residual, self.ffn, self.unseen)
        )
        total = (residual + ffn).index_add(0, self.row, heads.sum(-1))
        total = total + H * (self.n_keys - self.n_seen) * unseen
        if not parity:
            total = total + (total == 0)
        return self._replace(
            heads=heads / total[self.row, None],
            residual=residual / total,
            ffn=ffn / total,
            unseen=unseen / total,
        )


def in_parity(inputs: LayerInputs) -> LayerInputs:
    """The inputs for the tool's arithmetic."""
    y = inputs.y.to(torch.promote_types(inputs.y.dtype, torch.float32))
    return inputs._replace(y=y - EPSILON, offset=offset(y).to(y.dtype), floor=FLOOR)


def score_attention(inputs: LayerInputs, keep: float, kernel: Kernel) -> ScoredLayer:
    """Scores all rows of a layer, in parity if the inputs are (`in_parity`).

    Pairs are kept if their sum over heads is above `keep`.
    """
    scores = kernel_of(kernel, inputs).score_attention(inputs, keep)
    return ScoredLayer(scores, inputs.offset, inputs.window)


def score_ffn(
    resid_mid: Tensor, resid_post: Tensor, parity: bool, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """Contributions [R] of the FFN's output and of resid_mid to resid_post, each [R, D]."""
    if not parity:
        plain = kernel.score_ffn(resid_mid, resid_post)
        return plain.ffn, plain.residual
    # Kernels take an offset and a floor only for a node with attention, here of no weight.
    found = []
    for mid, post in zip(resid_mid.split(_FFN_ROWS), resid_post.split(_FFN_ROWS), strict=True):
        R, D = post.shape
        nothing, W_O = post.new_zeros(R, 1, 1, 1), post.new_zeros(1, 1, D)
        node = in_parity(given_rows(nothing, W_O, mid, post, post - mid))
        scores = kernel.score_attention(node, 1.0)
        assert scores.ffn is not None
        total = scores.ffn + scores.residual
        found.append((scores.ffn / total, scores.residual / total))
    ffn, residual = (torch.cat(parts) for parts in zip(*found, strict=True))
    return ffn, residual


def contributions(layers: Sequence[ScoredLayer]) -> AttentionContributions:
    """Contributions in several layers, all scored in parity or none."""
    scores = [layer.scores for layer in layers]
    T, H = scores[0].head_total.shape
    device = scores[0].residual.device
    row = cat_on(device, [x.edges.row + i * T for i, x in enumerate(scores)])
    source, weight, heads = (
        cat_on(device, [x.edges[column] for x in scores]) for column in (1, 2, 3)
    )
    kept = (weight > 0).nonzero().squeeze(1)  # other entries are padding
    row, source, heads = row[kept], source[kept], heads[kept]
    residual = cat_on(device, [x.residual for x in scores])
    ffn = cat_on(device, [torch.zeros_like(x.residual) if x.ffn is None else x.ffn for x in scores])
    seen = torch.arange(1, T + 1)
    n_seen = cat_on(device, [seen.clamp(max=layer.window or T) for layer in layers])
    unseen = torch.zeros_like(residual)
    offsets = [layer.offset for layer in layers if layer.offset is not None]
    if offsets:
        of_seen = cat_on(device, [x.total for x in scores])
        unseen = cat_on(device, offsets).to(of_seen.dtype).clamp(min=FLOOR)
        total = of_seen + H * (T - n_seen) * unseen
        share = of_seen / total
        heads, residual, unseen = heads * share[row, None], residual * share, unseen / total
    return AttentionContributions(row, source, heads, residual, ffn, unseen, n_seen, T)
