"""A RouteGraph as tidy tables: pandas data frames, Arrow tables, Parquet files.

- `edges`: one row per edge. `layer`, `kind`, `target` and `source` (positions), `target_token`,
  `source_token`, `weight`, and `flow`: the weight of all paths through the edge.
- `parts`: like `edges`, but an attention edge has one row per head (`head`, missing in other rows),
  with that head's share of weight and flow. This table holds the whole graph, and is the default
  for Parquet files.
- `tokens`: one row per token. `position`, `token`, `token_id`, `importance`.

The metadata of a file, and of an Arrow table, hold the graph's other attributes as JSON under
`ifr_fast.route_graph`: threshold, granularity, starts, predictions and so on.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_choice
from ..errors import needing
from ..graph.tables import EdgeKind
from ..storage.files import whole_file
from .json import described

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from ..graph.data import GraphData

TableName = Literal["edges", "parts", "tokens"]
TABLES: tuple[TableName, ...] = ("edges", "parts", "tokens")
METADATA = b"ifr_fast.route_graph"


class _Column(NamedTuple):
    """A column, independent of pandas and Arrow."""

    values: np.ndarray[Any, Any]  # numbers, or indices into `names`
    names: list[str] | None = None  # strings of the column
    missing: np.ndarray[Any, Any] | None = None  # bool


def to_pandas(graph: GraphData, table: TableName) -> pd.DataFrame:
    """A table as a data frame; strings are categorical."""
    with needing("to_pandas", "pandas", "pip install 'ifr-fast[tables]'"):
        import pandas as pd

    def series(column: _Column) -> Any:
        if column.names is not None:
            named = pd.Categorical.from_codes(
                _codes(column), categories=pd.Index(list(dict.fromkeys(column.names)), dtype=object)
            )
            return pd.Series(named)
        if column.missing is not None:
            return pd.Series(pd.arrays.IntegerArray(column.values, column.missing))
        return pd.Series(column.values)

    return pd.DataFrame({name: series(x) for name, x in _columns(graph, table).items()})


def to_arrow(graph: GraphData, table: TableName) -> pa.Table:
    """A table as an Arrow table; strings are dictionary-encoded."""
    with needing("to_arrow", "pyarrow", "pip install 'ifr-fast[tables]'"):
        import pyarrow as pa

    def array(column: _Column) -> Any:
        if column.names is not None:
            names = list(dict.fromkeys(_encodable(name) for name in column.names))
            place = {name: i for i, name in enumerate(names)}
            codes = np.array([place[_encodable(name)] for name in column.names], dtype=np.int32)
            return pa.DictionaryArray.from_arrays(
                pa.array(codes[column.values], pa.int32()), pa.array(names, pa.string())
            )
        return pa.array(column.values, mask=column.missing)

    found = pa.table({name: array(x) for name, x in _columns(graph, table).items()})
    metadata = {**described(graph), "starts": graph.starts}
    return found.replace_schema_metadata({METADATA: json.dumps(metadata).encode()})


def check_parquet() -> None:
    """Raises IfrError if `to_parquet` cannot run."""
    with needing("to_parquet", "pyarrow", "pip install 'ifr-fast[tables]'"):
        import pyarrow.parquet  # noqa: F401


def to_parquet(graph: GraphData, path: str | os.PathLike[str], table: TableName) -> None:
    """Writes a table, whole or not at all."""
    check_parquet()
    import pyarrow.parquet as pq

    found = to_arrow(graph, table)
    with whole_file(path) as temporary:
        pq.write_table(found, temporary)


def _columns(graph: GraphData, table: TableName) -> dict[str, _Column]:
    match check_choice("table", table, TABLES):
        case "edges":
            layer, kind, target, source, weight = graph.edges
            return _of_edges(graph, layer, kind, target, source, weight, None)
        case "parts":
            return _of_parts(graph)
        case _:
            T = len(graph.tokens)
            return {
                "position": _Column(np.arange(T, dtype=np.int32)),
                "token": _Column(np.arange(T, dtype=np.int32), graph.tokens),
                "token_id": _Column(graph.token_ids.numpy()),
                "importance": _Column(graph.token_importance().numpy()),
            }


def _of_parts(graph: GraphData) -> dict[str, _Column]:
    edges, heads = graph.edges, graph.head_edges
    other = edges.kind != EdgeKind.ATTENTION
    alone = [column[other] for column in edges]
    none = torch.full_like(alone[0], -1)
    layer, kind, target, source, weight, head = (
        torch.cat(pair)
        for pair in (
            (alone[0], heads.layer),
            (alone[1], torch.full_like(heads.layer, EdgeKind.ATTENTION)),
            (alone[2], heads.target),
            (alone[3], heads.source),
            (alone[4], heads.weight),
            (none, heads.head),
        )
    )
    return _of_edges(graph, layer, kind, target, source, weight, head)


def _of_edges(
    graph: GraphData,
    layer: Tensor,
    kind: Tensor,
    target: Tensor,
    source: Tensor,
    weight: Tensor,
    head: Tensor | None,
) -> dict[str, _Column]:
    into_post = (kind == EdgeKind.FFN) | (kind == EdgeKind.RESIDUAL_POST)
    reached = graph.node_importance()
    flow = torch.where(into_post, reached.post[layer, target], reached.mid[layer, target]) * weight

    def narrow(x: Tensor) -> np.ndarray[Any, Any]:
        return x.to(torch.int32).numpy()

    columns = {
        "layer": _Column(narrow(layer)),
        "kind": _Column(narrow(kind), [k.name.lower() for k in EdgeKind]),
    }
    if head is not None:
        columns["head"] = _Column(narrow(head.clamp(min=0)), missing=(head < 0).numpy())
    return columns | {
        "target": _Column(narrow(target)),
        "source": _Column(narrow(source)),
        "target_token": _Column(narrow(target), graph.tokens),
        "source_token": _Column(narrow(source), graph.tokens),
        "weight": _Column(weight.numpy()),
        "flow": _Column(flow.numpy()),
    }


def _codes(column: _Column) -> np.ndarray[Any, Any]:
    """Indices of the distinct names."""
    assert column.names is not None
    place: dict[str, int] = {}
    codes = np.array([place.setdefault(name, len(place)) for name in column.names], dtype=np.int32)
    return codes[column.values]


def _encodable(text: str) -> str:
    """Text for UTF-8, as Arrow requires: a lone surrogate becomes a replacement mark."""
    return text.encode(errors="replace").decode()
