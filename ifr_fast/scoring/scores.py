"""LayerScores: the importances of one layer's parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..graph.tables import LayerTable
from ..kernels.contract import EdgeList
from ..kernels.rows import on_device


class TokenEdges(NamedTuple):
    """Sparse token edges, in order of target, source; positions in the text."""

    target: Tensor  # [N] int64
    source: Tensor  # [N] int64
    weight: Tensor  # [N] float32, importance summed over heads


class HeadEdges(NamedTuple):
    """Sparse per-head edges, in order of target, source, head; positions in the text."""

    head: Tensor  # [M] int64
    target: Tensor  # [M] int64
    source: Tensor  # [M] int64
    weight: Tensor  # [M] float32, importance


@dataclass(frozen=True, eq=False)
class LayerScores:
    """Importances of the parts of one layer's nodes at R rows.

    For each row `residual + head_total.sum(-1)` (`+ ffn` in parallel blocks) is 1, and so is
    `ffn + ffn_residual` in sequential ones, within rounding (paper section 2.2).
    """

    layer: int
    rows: Tensor  # [R] int64, on the CPU
    keep: float
    residual: Tensor  # [R] importance of resid_pre in resid_mid (parallel: in resid_post)
    ffn: Tensor  # [R] importance of the FFN in resid_post
    ffn_residual: Tensor | None  # [R] that of resid_mid in resid_post; None in parallel blocks
    head_total: Tensor  # [R, H] importance of each head, summed over all keys
    unattributed: Tensor  # [R] bool: all proximities of `mid` (parallel: `post`) are 0
    ffn_unattributed: Tensor | None  # [R] bool: those of `post` are 0; None in parallel blocks
    edges: EdgeList  # the kernel's list, perhaps padded with weights of 0
    closure: Tensor  # [R] errors of the sums of parts, at most 1 if they close (scoring/closure.py)
    value_layer: int | None = None  # whose resid_pre the edges' sources are; None: this layer's

    def table(self, device: torch.device) -> LayerTable:
        """The table that a graph grows from, on its device."""

        def move(x: Tensor | None) -> Any:
            return None if x is None else x.to(device)

        return LayerTable(
            on_device(self.rows, device),
            move(self.residual),
            move(self.ffn),
            move(self.ffn_residual),
            EdgeList(*map(move, self.edges)),
            move(self.unattributed),
            move(self.ffn_unattributed),
            self.value_layer,
        )

    @cached_property
    def token_edges(self) -> TokenEdges:
        """Token edges with weight above `keep`."""
        edges = self.edges
        target = on_device(self.rows, edges.row.device)[edges.row]
        kept = (edges.weight > self.keep).nonzero().squeeze(1)
        order = kept[_lexicographic(target[kept], edges.source[kept])]
        return TokenEdges(target[order], edges.source[order], edges.weight[order].float())

    @cached_property
    def head_edges(self) -> HeadEdges:
        """Single heads' edges with weight above `keep`; all lie within `token_edges`."""
        edges = self.edges
        target = on_device(self.rows, edges.row.device)[edges.row]
        order = _lexicographic(target, edges.source)
        index, head = (edges.head_weight[order] > self.keep).nonzero(as_tuple=True)
        index = order[index]
        weight = edges.head_weight[index, head].float()
        return HeadEdges(head, target[index], edges.source[index], weight)


def _lexicographic(first: Tensor, second: Tensor) -> Tensor:
    """The indices that sort pairs of positions."""
    return ((first << 32) | second).argsort()


def joined(blocks: list[LayerScores], rows: Tensor) -> LayerScores:
    """The scores of consecutive blocks of `rows` as one."""
    start, shifted = 0, []
    for block in blocks:
        shifted.append(block.edges.row + start)
        start += len(block.rows)

    def cat(parts: Iterable[Tensor | None]) -> Any:
        found = [x for x in parts if x is not None]
        return torch.cat(found) if found else None

    return LayerScores(
        layer=blocks[0].layer,
        rows=rows,
        keep=blocks[0].keep,
        residual=cat(b.residual for b in blocks),
        ffn=cat(b.ffn for b in blocks),
        ffn_residual=cat(b.ffn_residual for b in blocks),
        head_total=cat(b.head_total for b in blocks),
        unattributed=cat(b.unattributed for b in blocks),
        ffn_unattributed=cat(b.ffn_unattributed for b in blocks),
        edges=EdgeList(
            torch.cat(shifted),
            cat(b.edges.source for b in blocks),
            cat(b.edges.weight for b in blocks),
            cat(b.edges.head_weight for b in blocks),
        ),
        closure=torch.cat([b.closure for b in blocks]),
        value_layer=blocks[0].value_layer,
    )
