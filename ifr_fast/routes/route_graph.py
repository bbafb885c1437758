"""RouteGraph: the information flow routes of one prediction, and all that can be done with them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex

import torch
from torch import Tensor

from ..arguments import check_fraction, check_path, index_within
from ..errors import FormatError
from ..graph.checks import check_graph
from ..graph.data import GraphData
from ..graph.growth import Frontier, Grown, packed_columns, sorted_columns
from ..graph.paths import top_paths, top_routes
from ..graph.reach import Reach, reach_in_graph, reached_in_graph
from ..graph.tables import (
    EdgeKind,
    EdgeTable,
    GraphHeader,
    HeadEdgeTable,
    Node,
    NodeKind,
    Prediction,
    Route,
    Span,
    WeightedPath,
)
from ..storage.tensors import Format, load_tensors, save_tensors

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd
    import pyarrow as pa
    from matplotlib.figure import Figure

    from ..export.tables import TableName
    from .comparison import GraphDifference


def assemble(grown: list[Grown], header: GraphHeader) -> RouteGraph:
    """The RouteGraph of all layers' edges, on the CPU, in canonical order; one device
    synchronization.
    """
    tables = packed_columns(grown)
    flat = torch.cat([table.flatten() for table in tables]).cpu()
    with torch.inference_mode(False):
        edges, heads, flagged = (
            columns.view(table.shape)[:-1, columns.view(table.shape)[-1] > 0]
            for columns, table in zip(flat.split([t.numel() for t in tables]), tables, strict=True)
        )
    kinds = (NodeKind.POST, NodeKind.MID)
    nodes_flagged = [
        Node(int(layer), kinds[int(mid)], int(position))
        for layer, mid, position in flagged.T.tolist()
    ]
    return in_order(edges, heads, nodes_flagged, header)


def in_order(
    edges: Tensor, heads: Tensor, unattributed: list[Node], header: GraphHeader
) -> RouteGraph:
    """The RouteGraph of edges and heads' edges in any order, as [5, E] and [5, M] float64 on the
    CPU: the columns of their tables.
    """
    with torch.inference_mode(False):
        # By layer, then kind, target, source; by layer, then target, source, head.
        return RouteGraph(
            tokens=header.tokens,
            token_ids=header.token_ids,
            position=header.position,
            threshold=header.threshold,
            granularity=header.granularity,
            n_layers=len(header.parallel),
            n_heads=header.n_heads,
            predictions=header.predictions,
            edges=EdgeTable._make(sorted_columns(edges, (0, 1, 2, 3))),
            head_edges=HeadEdgeTable._make(sorted_columns(heads, (0, 2, 3, 1))),
            unattributed=sorted(unattributed),
            parallel=torch.tensor(header.parallel),
            span=header.span,
            value_layers=header.value_layers,
        )


@dataclass(frozen=True, eq=False, repr=False)
class RouteGraph(GraphData):
    """The information flow routes of one prediction (paper section 2); tensors on the CPU.

    Its fields and importances are those of `GraphData`.
    """

    # Version 1 had no spans.
    _FORMAT = Format("ifr_fast.route_graph", version=3, oldest=1, checked_from=3)

    def reach(self, source: SupportsIndex) -> Reach:
        """The reach of a token's information: the weight of all paths from its embedding up to
        each node, along this graph's edges.
        """
        return reach_in_graph(self, index_within("source", source, len(self.tokens)))

    def routes_from(self, source: SupportsIndex) -> RouteGraph:
        """The part of this graph that one token's information takes: the edges on paths from its
        embedding to the prediction, with the weights that they have here.
        """
        position = index_within("source", source, len(self.tokens))
        mid, post = reached_in_graph(self, position)
        embed = torch.zeros(1, len(self.tokens), dtype=torch.bool)
        embed[0, position] = True
        pre = torch.cat([embed, post[:-1]])
        below = torch.where(self.parallel[:, None], pre, mid)

        def kept(layer: Tensor, source: Tensor, into_post: Tensor) -> Tensor:
            return torch.where(into_post, below[layer, source], pre[layer, source])

        layer, kind, _, source_of, _ = self.edges
        into_post = (kind == EdgeKind.FFN) | (kind == EdgeKind.RESIDUAL_POST)
        read = torch.tensor(self.source_layers)
        edges = kept(
            torch.where(kind == EdgeKind.ATTENTION, read[layer], layer), source_of, into_post
        )
        layer, _, _, source_of, _ = self.head_edges
        heads = kept(read[layer], source_of, torch.zeros_like(layer, dtype=torch.bool))
        of_kind = {NodeKind.MID: mid, NodeKind.POST: post}
        return dataclasses.replace(
            self,
            edges=EdgeTable(*(column[edges] for column in self.edges)),
            head_edges=HeadEdgeTable(*(column[heads] for column in self.head_edges)),
            unattributed=[n for n in self.unattributed if of_kind[n.kind][n.layer, n.position]],
        )

    def compare(
        self, other: RouteGraph, *, positions: Iterable[tuple[int, int]] | None = None
    ) -> GraphDifference:
        """The difference of another graph from this one: the graph of another prompt, or of another
        model with as many layers and heads.

        positions: pairs of a position here and one there, ascending, that stand for each other.
        Default: texts of equal length token by token, others as their tokens match.
        """
        from .comparison import compare

        return compare(self, other, positions)

    def prune(self, threshold: float) -> RouteGraph:
        """The graph of the same prediction at a threshold of at least the present one."""
        threshold = check_fraction("threshold", threshold)
        if threshold < self.threshold:
            raise ValueError(
                f"threshold: this graph holds edges above {self.threshold:g} only, "
                f"got {threshold:g}; trace again for a lower one"
            )
        reached = torch.zeros(len(self.tokens), dtype=torch.bool)
        reached[list(self.starts)] = True
        frontier = Frontier(reached)
        grown = [
            frontier.descend(layer, self.layer_table(layer), threshold, self.granularity)
            for layer in reversed(range(self.n_layers))
        ]
        return assemble(grown, self.header._replace(threshold=threshold))

    def top_paths(self, k: int = 10) -> list[WeightedPath]:
        """The k heaviest paths from the prediction to an embedding, heaviest first.

        A path from a prediction of a span starts with that prediction's weight.
        """
        return top_paths(self, k)

    def top_routes(self, k: int = 10) -> list[Route]:
        """The k heaviest routes: paths taken together that change position at the same edges.

        Residual, FFN and self-attention edges leave the position as it is; a route's weight is
        the sum over all ways through them, times the weight of its prediction in a span. Where a
        layer reads the values of a lower one, self-attention is a hop of its own.
        """
        return top_routes(self, k)

    def to_json(self) -> str:
        """The graph as one JSON document; its keys are the attributes' names."""
        from ..export.json import to_json

        return to_json(self)

    def to_networkx(self) -> nx.MultiDiGraph:
        """The graph in networkx, edges in the direction in which information flows."""
        from ..export.networkx import to_networkx

        return to_networkx(self)

    def to_graphml(self) -> str:
        """The graph in GraphML, for Gephi, yEd, Cytoscape and others."""
        from ..export.graphml import to_graphml

        return to_graphml(self)

    def to_dot(self) -> str:
        """The graph in DOT, for Graphviz."""
        from ..export.dot import to_dot

        return to_dot(self)

    def to_neuronpedia(
        self, *, slug: str | None = None, scan: str = "unknown", max_links: int = 10_000
    ) -> str:
        """The graph as an attribution graph of Neuronpedia and circuit-tracer, in JSON.

        slug: the graph's name, by default made of its text. scan: the model's, as Neuronpedia
        calls it. max_links: how many links to keep at most, those that most flows through.
        """
        from ..export.neuronpedia import to_neuronpedia

        return to_neuronpedia(self, slug, scan, max_links)

    def save_neuronpedia(
        self,
        folder: str | os.PathLike[str],
        *,
        slug: str | None = None,
        scan: str = "unknown",
        max_links: int = 10_000,
    ) -> Path:
        """Writes `to_neuronpedia` as `<slug>.json` into a folder that circuit-tracer's viewer
        serves, and lists it in the folder's `graph-metadata.json`. A graph of the same slug is
        replaced. Returns the file's path.

        Raises ValueError for a slug that is no file name, and FormatError for a damaged list.
        """
        from ..export.neuronpedia import save_neuronpedia

        return save_neuronpedia(self, check_path("folder", folder), slug, scan, max_links)

    def to_pandas(self, table: TableName = "edges") -> pd.DataFrame:
        """The graph's edges, one row each; or its "parts", one row a head; or its "tokens"
        (export/tables.py).
        """
        from ..export.tables import to_pandas

        return to_pandas(self, table)

    def to_arrow(self, table: TableName = "edges") -> pa.Table:
        """The table of `to_pandas` as an Arrow table; its metadata hold the graph's own fields."""
        from ..export.tables import to_arrow

        return to_arrow(self, table)

    def to_parquet(self, path: str | os.PathLike[str], table: TableName = "parts") -> None:
        """Writes one of these tables to a Parquet file; "parts" holds the whole graph."""
        from ..export.tables import to_parquet

        to_parquet(self, check_path("path", path), table)

    def to_html(self) -> str:
        """A standalone page that draws the graph; needs no network."""
        from ..export.html import to_html

        return to_html(self)

    def plot(self) -> Figure:
        """The graph as a matplotlib figure."""
        from ..export.plot import plot

        return plot(self)

    def _repr_html_(self) -> str:
        from ..export.html import to_notebook_html

        return to_notebook_html(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves to a safetensors file; `load` gives the same graph back, bit for bit."""
        tensors = {f"edges.{k}": v for k, v in self.edges._asdict().items()}
        tensors |= {f"head_edges.{k}": v for k, v in self.head_edges._asdict().items()}
        tensors |= {"token_ids": self.token_ids, "parallel": self.parallel}
        fields = {
            "tokens": self.tokens,
            "position": self.position,
            "threshold": self.threshold,
            "granularity": self.granularity,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "predictions": self.predictions,
            "unattributed": self.unattributed,
            "span": self.span,
        }
        if self.value_layers is not None:
            fields["value_layers"] = self.value_layers
        save_tensors(check_path("path", path), self._FORMAT, tensors, fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RouteGraph:
        """The graph that `save` saved. Raises FormatError for a truncated or foreign file."""
        tensors, fields = load_tensors(check_path("path", path), cls._FORMAT)
        try:
            edges = EdgeTable(*(tensors.pop(f"edges.{name}") for name in EdgeTable._fields))
            heads = HeadEdgeTable(
                *(tensors.pop(f"head_edges.{name}") for name in HeadEdgeTable._fields)
            )
            predictions = [Prediction(*p) for p in fields.pop("predictions")]
            span = fields.pop("span", None)
            if span is not None:
                positions, weights, of_each = span
                of_each = [[Prediction(*p) for p in of] for of in of_each]
                span = Span(positions, weights, of_each)
            nodes = [Node(n[0], NodeKind(n[1]), n[2]) for n in fields.pop("unattributed")]
            graph = cls(
                edges=edges,
                head_edges=heads,
                predictions=predictions,
                span=span,
                unattributed=nodes,
                token_ids=tensors["token_ids"],
                parallel=tensors["parallel"],
                **fields,
            )
            check_graph(graph)
            # Weights of older versions may be above 1 by rounding.
            return dataclasses.replace(
                graph,
                edges=edges._replace(weight=edges.weight.clamp(max=1)),
                head_edges=heads._replace(weight=heads.weight.clamp(max=1)),
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise FormatError(f"{path}: not a whole {cls._FORMAT.name} file ({error})") from error
