"""The rows and tables that graphs are made of."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, StrEnum
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..kernels.contract import EdgeList

Granularity = Literal["token", "head"]


class EdgeKind(IntEnum):
    """The operation that carried the information."""

    ATTENTION = 0
    RESIDUAL_MID = 1
    FFN = 2
    RESIDUAL_POST = 3


class NodeKind(StrEnum):
    """The place of a node in its layer."""

    EMBED = "embed"
    MID = "mid"
    FFN = "ffn"
    POST = "post"


class EdgeTable(NamedTuple):
    """Edges, by layer, kind, target, source."""

    layer: Tensor  # [E] int64
    kind: Tensor  # [E] int64, an EdgeKind
    target: Tensor  # [E] int64, token position
    source: Tensor  # [E] int64, token position
    weight: Tensor  # [E] float32, importance of the part in its target


class HeadEdgeTable(NamedTuple):
    """Each head's share of the attention edges, by layer, target, source, head."""

    layer: Tensor  # [M] int64
    head: Tensor  # [M] int64
    target: Tensor  # [M] int64
    source: Tensor  # [M] int64
    weight: Tensor  # [M] float32


class Node(NamedTuple):
    """One token representation."""

    layer: int
    kind: NodeKind
    position: int


class Prediction(NamedTuple):
    """A candidate for the next token."""

    token: str
    token_id: int
    probability: float


class Span(NamedTuple):
    """Positions whose predictions are explained together."""

    positions: list[int]  # two or more, ascending
    weights: list[float]  # one for each position; they sum to 1
    predictions: list[list[Prediction]]  # one list for each position, most probable first


class GraphHeader(NamedTuple):
    """The fields of a graph beside its tables."""

    tokens: list[str]
    token_ids: Tensor  # [T] int64
    position: int
    threshold: float
    granularity: Granularity
    n_heads: int
    parallel: list[bool]  # [L]
    predictions: list[Prediction]  # those of `position`
    span: Span | None = None
    value_layers: list[int] | None = None  # as in `GraphData`

    @staticmethod
    def of(
        starts: dict[int, float],
        predictions: list[list[Prediction]],
        *,
        tokens: list[str],
        token_ids: Tensor,
        threshold: float,
        granularity: Granularity,
        n_heads: int,
        parallel: list[bool],
        value_layers: list[int] | None = None,
    ) -> GraphHeader:
        """The header of the graph of one position or of several.

        starts: positions, ascending, and their weights; predictions: of each of them.
        """
        positions = list(starts)
        span = Span(positions, list(starts.values()), predictions) if len(positions) > 1 else None
        return GraphHeader(
            tokens,
            token_ids,
            positions[-1],
            threshold,
            granularity,
            n_heads,
            parallel,
            predictions[-1],
            span,
            value_layers,
        )

    @property
    def positions(self) -> list[int]:
        """The positions that are explained, ascending."""
        return [self.position] if self.span is None else self.span.positions


class Step(NamedTuple):
    """One edge of a path."""

    layer: int
    kind: EdgeKind
    target: int
    source: int
    weight: float


class WeightedPath(NamedTuple):
    """A path from the prediction down to a token's embedding."""

    weight: float  # product of its steps' weights
    steps: list[Step]  # top-down


class Hop(NamedTuple):
    """One change of position on a route."""

    layer: int
    target: int
    source: int
    weight: float  # weight of the attention edge
    heads: list[tuple[int, float]]  # (head, weight), strongest first


class Route(NamedTuple):
    """All paths that change position at the same edges, taken together."""

    weight: float  # sum of the paths' weights
    source: int  # the token it starts at
    hops: list[Hop]  # top-down


class LayerTable(NamedTuple):
    """One layer's scores as a graph takes them: R rows, all edges above a graph's threshold."""

    rows: Tensor  # [R] int64, on the graph's device
    residual: Tensor  # [R]
    ffn: Tensor  # [R]
    ffn_residual: Tensor | None  # [R]; None in a parallel block
    edges: EdgeList
    unattributed: Tensor  # [R] bool
    ffn_unattributed: Tensor | None  # [R] bool
    value_layer: int | None = None  # whose resid_pre attention's sources are; None: this layer's

    def at_most_one(self) -> LayerTable:
        """The table of a file, without what rounding adds to 1 in the weights of older versions."""
        row, source, weight, head_weight = self.edges
        edges = EdgeList(row, source, weight.clamp(max=1), head_weight.clamp(max=1))
        of_residual = None if self.ffn_residual is None else self.ffn_residual.clamp(max=1)
        residual, ffn = self.residual.clamp(max=1), self.ffn.clamp(max=1)
        return self._replace(residual=residual, ffn=ffn, ffn_residual=of_residual, edges=edges)


def value_layers(tables: Sequence[LayerTable]) -> list[int] | None:
    """The `GraphData.value_layers` of a model's layers, bottom first."""
    if all(table.value_layer is None for table in tables):
        return None
    return [i if table.value_layer is None else table.value_layer for i, table in enumerate(tables)]


class NodeImportance(NamedTuple):
    """Weight of all paths between each node and a graph's predictions, or a token."""

    embed: Tensor  # [T] float32
    mid: Tensor  # [L, T] float32; in a parallel block what `post` has
    post: Tensor  # [L, T] float32


def plain_tensor(x: Tensor) -> Tensor:
    """A tensor that autograd takes: a copy where x was made in inference mode."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()
