"""Data frames, Arrow tables and Parquet files hold the graph."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hostile import trace

from ifr_fast.errors import IfrError
from ifr_fast.export.tables import check_parquet
from ifr_fast.graph.tables import EdgeKind
from ifr_fast.routes.route_graph import RouteGraph


@pytest.fixture
def graph(any_graph: RouteGraph) -> RouteGraph:
    return any_graph


def test_tables_hold_the_edges(graph: RouteGraph) -> None:
    frame = graph.to_pandas()
    kinds = {kind.name.lower(): int(kind) for kind in EdgeKind}
    for name in ("layer", "target", "source", "weight"):
        assert frame[name].tolist() == getattr(graph.edges, name).tolist()
    assert [kinds[kind] for kind in frame["kind"]] == graph.edges.kind.tolist()
    for end in ("target", "source"):
        assert frame[f"{end}_token"].tolist() == [graph.tokens[i] for i in frame[end]]
    # An independent account of flow: what leaves a node upwards comes back as its importance.
    ffn = frame[frame["kind"] == "ffn"].groupby("layer", observed=True)["flow"].sum()
    for layer, importance in enumerate(graph.ffn_importance().tolist()):
        assert ffn.get(layer, 0.0) == pytest.approx(importance, abs=1e-6)
    bottom = frame[(frame["layer"] == 0) & (frame["kind"] != "ffn")]
    if not bool(graph.parallel[0]):
        bottom = bottom[bottom["kind"] != "residual_post"]
        flow = bottom.groupby("source")["flow"].sum()
        for position, importance in enumerate(graph.token_importance().tolist()):
            assert flow.get(position, 0.0) == pytest.approx(importance, abs=1e-6)


def test_parts_hold_the_whole_graph(graph: RouteGraph) -> None:
    frame = graph.to_pandas("parts")
    attention = frame[frame["kind"] == "attention"]
    assert frame[frame["kind"] != "attention"]["head"].isna().all()
    for name in ("layer", "head", "target", "source", "weight"):
        assert attention[name].tolist() == getattr(graph.head_edges, name).tolist()
    ends = ["layer", "kind", "target", "source"]
    summed = frame.groupby(ends, observed=True)[["weight", "flow"]].sum().reset_index()
    whole = graph.to_pandas()[[*ends, "weight", "flow"]]
    both = whole.merge(summed, on=ends, suffixes=("", "_of_parts"), validate="one_to_one")
    assert len(both) == len(whole)
    for name in ("weight", "flow"):
        assert (both[name] - both[f"{name}_of_parts"]).abs().max() < 1e-5
    importance = attention.groupby(["layer", "head"])["flow"].sum()
    expected = graph.head_importance()
    for layer, head in expected.nonzero().tolist():
        assert importance[layer, head] == pytest.approx(float(expected[layer, head]), abs=1e-6)


@pytest.mark.parametrize("table", ["edges", "parts", "tokens"])
def test_arrow_and_parquet_are_the_same_tables(
    graph: RouteGraph, table: Any, tmp_path: Path
) -> None:
    expected = graph.to_pandas(table)
    path = tmp_path / "graph.parquet"
    graph.to_parquet(path, table)
    assert [p.name for p in tmp_path.iterdir()] == ["graph.parquet"]
    read = pq.read_table(path)
    assert read.equals(graph.to_arrow(table))
    assert read.column_names == list(expected.columns)
    for name in read.column_names:
        values = [None if pd.isna(x) else x for x in expected[name].tolist()]
        if "token" in name and name != "token_id":  # Arrow holds UTF-8
            values = [x.encode(errors="replace").decode() for x in values]
        assert read[name].to_pylist() == values
    said = json.loads(read.schema.metadata[b"ifr_fast.route_graph"])
    assert said["tokens"] == graph.tokens
    assert said["threshold"] == graph.threshold


def test_wrong_table_and_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    graph = trace(False)
    with pytest.raises(ValueError, match="table: expected one of edges, parts, tokens, got 'rows'"):
        graph.to_pandas("rows")  # type: ignore[arg-type]
    own = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("pandas", "pyarrow"):
            raise ImportError(name)
        return own(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (
        graph.to_pandas,
        graph.to_arrow,
        lambda: graph.to_parquet(tmp_path / "x"),
        check_parquet,
    ):
        with pytest.raises(IfrError, match=r"pip install 'ifr-fast\[tables\]'"):
            call()
