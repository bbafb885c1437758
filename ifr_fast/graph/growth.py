"""A graph is grown from the top down, a layer's step each, from the nodes reached above it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .flow import thresholded
from .tables import EdgeKind, Granularity, LayerTable


class EdgesOfKind(NamedTuple):
    """Edges of one kind into some of a layer's nodes, as many as the kernel listed."""

    kind: EdgeKind
    target: Tensor  # [N]
    source: Tensor  # [N]
    weight: Tensor  # [N]
    kept: Tensor  # [N] bool


class Grown(NamedTuple):
    """One layer of a graph, with flags that say which of its edges and nodes it has."""

    layer: int
    steps: list[EdgesOfKind]  # attention last
    head_weight: Tensor  # [E, H] of the attention edges
    head_kept: Tensor  # [E, H] bool
    unattributed: list[tuple[bool, Tensor, Tensor]]  # whether `mid` (else `post`), [R], bool [R]


class Frontier:
    """The posts of a layer that a graph has reached, from the last layer down."""

    def __init__(self, reached: Tensor) -> None:
        self.reached = reached  # [T] bool
        # The resid_pre of lower layers that attention above has read, by their numbers.
        self._waiting: dict[int, Tensor] = {}

    @property
    def is_done(self) -> bool:
        """True if no layer below is reached; a device synchronization."""
        return not self._waiting and not bool(self.reached.any())

    def descend(
        self, layer: int, table: LayerTable, threshold: float, granularity: Granularity
    ) -> Grown:
        """One step down: the edges into the posts of a layer that are reached. From then on the
        posts of the layer below are.

        The device is not synchronized: sizes depend on shapes alone.
        """
        grown = edges_into(layer, table, self.reached[table.rows], threshold, granularity)
        *own, attention = grown.steps
        none = torch.zeros(len(self.reached), dtype=torch.int32, device=table.rows.device)
        read = none.index_add(0, attention.source, attention.kept.int()) > 0
        passes = own[-1].kept
        if table.ffn_residual is None:
            passes = passes | own[0].kept
        self.reached = none.index_add(0, table.rows, passes.int()) > 0
        at = layer if table.value_layer is None else table.value_layer
        self._waiting[at] = read | self._waiting.get(at, torch.zeros_like(read))
        self.skip(layer)
        return grown

    def skip(self, layer: int) -> None:
        """One step down from a layer of which nothing is reached, but perhaps its resid_pre."""
        if layer in self._waiting:
            self.reached = self.reached | self._waiting.pop(layer)


def edges_into(
    layer: int, table: LayerTable, post: Tensor, threshold: float, granularity: Granularity
) -> Grown:
    """The edges into those posts of a table that are reached, by `post` [R] bool.

    The tensors of the table may all be numpy arrays: only operations that both have are used.
    """
    kept = thresholded(table, threshold, granularity)
    rows, (row, source, edge_weight, head_weight) = kept.rows, kept.edges
    ffn_kept = post & (kept.ffn > 0)
    steps = [EdgesOfKind(EdgeKind.FFN, rows, rows, kept.ffn, ffn_kept)]
    if kept.ffn_residual is None:
        mid, mid_kind = post, EdgeKind.RESIDUAL_POST
        unattributed = [(False, rows, post & kept.unattributed)]
    else:
        residual_kept = post & (kept.ffn_residual > 0)
        steps.append(
            EdgesOfKind(EdgeKind.RESIDUAL_POST, rows, rows, kept.ffn_residual, residual_kept)
        )
        mid, mid_kind = ffn_kept | residual_kept, EdgeKind.RESIDUAL_MID
        assert kept.ffn_unattributed is not None
        unattributed = [
            (False, rows, post & kept.ffn_unattributed),
            (True, rows, mid & kept.unattributed),
        ]
    passes = mid & (kept.residual > 0)
    steps.append(EdgesOfKind(mid_kind, rows, rows, kept.residual, passes))
    attention_kept = (edge_weight > 0) & mid[row]
    steps.append(EdgesOfKind(EdgeKind.ATTENTION, rows[row], source, edge_weight, attention_kept))
    head_kept = (head_weight > 0) & attention_kept[:, None]
    return Grown(layer, steps, head_weight, head_kept, unattributed)


def packed_columns(grown: list[Grown]) -> list[Tensor]:
    """Edges, head edges and unattributed nodes, [columns, N] each, on the graph's device; the last
    column of each is the flags. Sizes depend on shapes alone.
    """
    H = grown[0].head_weight.shape[1]
    steps = [(g.layer, step) for g in grown for step in g.steps]
    attention = [(g.layer, g.steps[-1]) for g in grown]
    nodes = [(g.layer, *node) for g in grown for node in g.unattributed]

    def each(values: Iterable[int], of: list[Tensor]) -> Tensor:
        """A column that holds one value for all rows of each of some tables."""
        sizes = torch.tensor([len(x) for x in of])
        n = sum(map(len, of))
        column = torch.tensor(list(values)).repeat_interleave(sizes, output_size=n)
        return column.to(of[0].device)

    kept = [step.kept for _, step in steps]
    attention_kept = [step.kept for _, step in attention]
    node_kept = [flag for *_, flag in nodes]
    return [
        _pack(
            each((layer for layer, _ in steps), kept),
            each((step.kind for _, step in steps), kept),
            torch.cat([step.target for _, step in steps]),
            torch.cat([step.source for _, step in steps]),
            torch.cat([step.weight.float() for _, step in steps]),
            torch.cat(kept),
        ),
        _pack(
            each((layer for layer, _ in attention), attention_kept).repeat_interleave(H),
            torch.arange(H, device=kept[0].device).repeat(sum(map(len, attention_kept))),
            torch.cat([step.target for _, step in attention]).repeat_interleave(H),
            torch.cat([step.source for _, step in attention]).repeat_interleave(H),
            torch.cat([g.head_weight for g in grown]).float().flatten(),
            torch.cat([g.head_kept for g in grown]).flatten(),
        ),
        _pack(
            each((layer for layer, *_ in nodes), node_kept),
            each((mid for _, mid, *_ in nodes), node_kept),
            torch.cat([rows for _, _, rows, _ in nodes]),
            torch.cat(node_kept),
        ),
    ]


def _pack(*columns: Tensor) -> Tensor:
    """Columns as rows of one float64 matrix, exact for positions and float32 weights."""
    return torch.stack([column.double() for column in columns])


def sorted_columns(table: Tensor, keys: tuple[int, ...]) -> list[Tensor]:
    """The columns [5, N] of a table, four of whole numbers and one of weights, by some of the
    former, the first of `keys` first.
    """
    columns = table.numpy()
    whole = columns[:4].astype(np.int64)
    # Layers, kinds or heads, and two positions of at most 2^24 fit into 63 bits.
    packed = np.zeros(whole.shape[1], dtype=np.int64)
    for column in whole[list(keys)]:
        packed = packed * (column.max(initial=0) + 1) + column
    order = packed.argsort()
    weights = columns[4, order].astype(np.float32)
    # take: a copy whose rows are contiguous, which an index does not promise.
    return [torch.from_numpy(column) for column in (*whole.take(order, axis=1), weights)]
