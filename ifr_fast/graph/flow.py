"""The weight of all paths through the layers of a graph, down from predictions or up from tokens.

A node's weight is the sum, over all paths, of the product of their edges' weights (docs/design.md,
section 2). A layer maps the weights of its `post` nodes to those of its `mid` nodes and of its
`resid_pre`, which is the `post` of the layer below. Attention's sources are the `resid_pre` of the
same layer, or of a lower one whose keys and values it shares. The flows down and up are the same
linear maps, transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..kernels.contract import EdgeList
from .tables import Granularity, LayerTable


def exceeds(weight: Any, threshold: Any) -> Any:
    """Flags of the weights that a threshold keeps: those above it, strictly."""
    return weight > threshold


def thresholded(table: LayerTable, threshold: float, granularity: Granularity) -> LayerTable:
    """The table with 0 in place of every weight that the threshold does not keep.

    "token" compares an edge's weight summed over heads and keeps the heads of a kept edge; "head"
    compares each head's weight, and an edge's weight is the sum of the heads kept. Tensors may be
    numpy arrays: only operations that both have are used.
    """

    def kept(x: Any) -> Any:
        return x * exceeds(x, threshold)

    row, source, weight, head_weight = table.edges
    if granularity == "head":
        head_weight = kept(head_weight)
        weight = head_weight.sum(-1).clip(max=1)
    weight = kept(weight)
    head_weight = head_weight * (weight > 0)[:, None]
    return table._replace(
        residual=kept(table.residual),
        ffn=kept(table.ffn),
        ffn_residual=None if table.ffn_residual is None else kept(table.ffn_residual),
        edges=EdgeList(row, source, weight, head_weight),
    )


@dataclass(frozen=True, eq=False)
class LayerFlow:
    """One layer's weights above the threshold, between N nodes; 0 where there is no edge."""

    ffn: Tensor  # [N] of the FFN edge into post
    to_mid: Tensor  # [N] from post to mid at the same position; 1 in a parallel block
    to_pre: Tensor  # [N] from mid to resid_pre at the same position, attention apart
    target: Tensor  # [E] int64
    source: Tensor  # [E] int64
    weight: Tensor  # [E] attention edges, summed over heads
    head_sum: Tensor  # [N, H] weights of a target's heads, summed over sources
    head_count: Tensor  # [N, H] number of a head's edges that exceed the threshold by themselves
    value_layer: int | None = None  # whose resid_pre attention's sources are; None: this layer's

    @staticmethod
    def of(
        table: LayerTable,
        threshold: float,
        granularity: Granularity,
        dtype: torch.dtype = torch.float32,
    ) -> LayerFlow:
        """The flow of a table whose rows are all N nodes, in order; its weights in `dtype`."""
        kept = thresholded(table, threshold, granularity)
        ffn, residual = kept.ffn.to(dtype), kept.residual.to(dtype)
        row, source, weight, head_weight = kept.edges
        single = exceeds(head_weight, threshold).to(dtype)
        weight, head_weight = weight.to(dtype), head_weight.to(dtype)
        none = head_weight.new_zeros(len(ffn), head_weight.shape[1])
        if kept.ffn_residual is None:
            to_mid, to_pre = torch.ones_like(ffn), ffn + residual
        else:
            to_mid, to_pre = ffn + kept.ffn_residual.to(dtype), residual
        return LayerFlow(
            ffn=ffn,
            to_mid=to_mid,
            to_pre=to_pre,
            target=row,
            source=source,
            weight=weight,
            head_sum=none.index_add(0, row, head_weight),
            head_count=none.index_add(0, row, single),
            value_layer=table.value_layer,
        )

    def connected(self) -> LayerFlow:
        """A copy with weight 1 on every edge, to find the nodes that a path reaches."""
        to_mid, to_pre, weight = (
            (x > 0).to(x.dtype) for x in (self.to_mid, self.to_pre, self.weight)
        )
        return replace(self, to_mid=to_mid, to_pre=to_pre, weight=weight)

    def from_post(self, flow: Tensor) -> Tensor:
        """Down from post to mid: [N] or [N, P]."""
        return _scaled(flow, self.to_mid)

    def from_mid(self, flow: Tensor) -> Tensor:
        """Down from mid to resid_pre at the same position: [N] or [N, P]."""
        return _scaled(flow, self.to_pre)

    def to_sources(self, flow: Tensor, pre: Tensor) -> Tensor:
        """Down from mid along attention edges, added to what `pre` holds: [N] or [N, P]."""
        if flow.ndim == 1:
            carried = flow[self.target] * self.weight.to(flow.dtype)
            return pre.index_add(0, self.source, carried)
        return torch.addmm(pre, self._matrix.to(flow.dtype), flow)

    def into_mid(self, flow: Tensor, sources: Tensor) -> Tensor:
        """Up from resid_pre [N] to mid; sources [N]: the weights of attention's sources."""
        carried = sources[self.source] * self.weight.to(flow.dtype)
        return _scaled(flow, self.to_pre).index_add_(0, self.target, carried)

    def into_post(self, flow: Tensor) -> Tensor:
        """Up from mid [N] to post."""
        return _scaled(flow, self.to_mid)

    @cached_property
    def _matrix(self) -> Tensor:
        """[N, N] sparse: attention edges, from targets (columns) to sources (rows)."""
        indices = torch.stack([self.source, self.target])
        n = len(self.to_mid)
        return torch.sparse_coo_tensor(indices, self.weight, (n, n), check_invariants=False)


def _scaled(flow: Tensor, weight: Tensor) -> Tensor:
    return flow * weight.to(flow.dtype).view(-1, *(1 for _ in flow.shape[1:]))


def flow_down(
    layers: Sequence[LayerFlow], flow: Tensor, *, saturated: bool = False
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Weights of all paths from the last layer's posts down, `flow` [N] or [N, P] at the top.

    Yields, for each layer from the top, its number and the weights at its posts, its mids and its
    resid_pre. saturated: weights are cut at 1, for layers that are `connected`.
    """
    waiting: dict[int, Tensor] = {}  # weights of the resid_pre of lower layers, by their numbers
    for number in reversed(range(len(layers))):
        layer = layers[number]
        mid = layer.from_post(flow)
        pre = layer.from_mid(mid)
        if layer.value_layer is None:
            pre = layer.to_sources(mid, pre)
        else:
            lower = waiting.get(layer.value_layer, torch.zeros_like(pre))
            waiting[layer.value_layer] = layer.to_sources(mid, lower)
        if number in waiting:
            pre = pre + waiting.pop(number)
        if saturated:
            pre = pre.clamp_(max=1)
        yield number, flow, mid, pre
        flow = pre


def flow_up(
    layers: Sequence[LayerFlow], flow: Tensor, *, saturated: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights of all paths from embeddings up, `flow` [N] at the bottom.

    Yields, for each layer from the bottom, the weights at its mids and at its posts. In a parallel
    block the two are the same. saturated: as in `flow_down`.
    """
    entered = []  # the weights of each layer's resid_pre
    for layer in layers:
        entered.append(flow)
        sources = flow if layer.value_layer is None else entered[layer.value_layer]
        mid = layer.into_mid(flow, sources)
        if saturated:
            mid = mid.clamp_(max=1)
        flow = layer.into_post(mid)
        yield mid, flow


def component_importances(
    layers: Sequence[LayerFlow], n_texts: int, max_elements: int
) -> tuple[Tensor, Tensor]:
    """Importances of heads [B, T, L, H] and FFN blocks [B, T, L] for the predictions of B texts.

    layers: of N = B * T nodes; node b * T + t is position t of text b. A head's importance is the
    sum of its weights times the flow into their targets. max_elements: of the flow [N, P] that is
    held at once, for P predictions of each text.
    """
    B, L = n_texts, len(layers)
    (N, H), like = layers[0].head_sum.shape, layers[0].head_sum
    T = N // B
    head, ffn = like.new_empty(B, T, L, H), like.new_empty(B, T, L)
    size = max(1, max_elements // N)
    for begin in range(0, T, size):
        P = min(T, begin + size) - begin
        at = slice(begin, begin + P)
        flow = like.new_zeros(B, T, P)
        flow[:, at] = torch.eye(P, dtype=like.dtype, device=like.device)
        for number, post, mid, _ in flow_down(layers, flow.view(N, P)):
            layer = layers[number]
            ffn[:, at, number] = (layer.ffn.view(B, 1, T) @ post.view(B, T, P))[:, 0]
            of_heads = layer.head_sum.view(B, T, H).transpose(1, 2) @ mid.view(B, T, P)
            head[:, at, number] = of_heads.transpose(1, 2)
    return head, ffn


def head_frequencies(layers: Sequence[LayerFlow], max_elements: int) -> Tensor:
    """[L, H]: share of the predictions of one text of N positions whose graph a head is in.

    A head is in a graph where one of its edges into a node of the graph exceeds the threshold by
    itself. max_elements: as in `component_importances`.
    """
    connected = [layer.connected() for layer in layers]
    N, H = layers[0].head_count.shape
    found = layers[0].head_count.new_zeros(len(layers), H)
    size = max(1, max_elements // N)
    for begin in range(0, N, size):
        P = min(N, begin + size) - begin
        reached = found.new_zeros(N, P)
        reached[torch.arange(begin, begin + P), torch.arange(P)] = 1
        for number, _, mid, _ in flow_down(connected, reached, saturated=True):
            found[number] += ((mid.T @ layers[number].head_count) > 0).sum(0)
    return found / N
