"""Differences of two graphs, entry by entry."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from exported import written
from hypothesis import given, settings
from hypothesis import strategies as st
from opened import tiny_tracer
from tiny import tiny_model, tiny_text

from ifr_fast import RouteGraph, Tracer
from ifr_fast.graph.tables import EdgeKind
from ifr_fast.routes.comparison import Column

T = 13


def as_dict(table: Any, places: list[int | None]) -> dict[Any, float]:
    rows = zip(*(x.tolist() for x in table), strict=True)
    return {(a, b, places[t], places[s]): w for a, b, t, s, w in rows}


def assert_difference(first: Any, second: Any, difference: Any) -> None:
    """The tables hold both graphs and nothing else."""
    for name in ("edges", "head_edges"):
        table = getattr(difference, name)
        rows = list(zip(*(x.tolist() for x in table), strict=True))
        assert rows == sorted(rows)
        for i, graph in enumerate((first, second)):
            where = {c[i]: n for n, c in enumerate(difference.columns) if c[i] is not None}
            expected = as_dict(getattr(graph, name), [where[t] for t in range(len(graph.tokens))])
            got = {row[:4]: row[4 + i] for row in rows}
            assert {key: w for key, w in got.items() if w > 0} == expected
    importance = difference.token_importance()
    for i, graph in enumerate((first, second)):
        for column, weight in zip(difference.columns, importance[:, i].tolist(), strict=True):
            expected = 0 if column[i] is None else float(graph.token_importance()[column[i]])
            assert weight == pytest.approx(expected)


def test_difference_of_two_prompts_of_unequal_length() -> None:
    tracer, text = tiny_tracer("llama"), tiny_text(T)
    inserted = torch.cat([text[:4], torch.tensor([90, 91]), text[4:]])
    first, second = (tracer.trace(ids, threshold=0.03) for ids in (text, inserted))
    difference = first.compare(second)
    expected = [Column(i, i) for i in range(4)] + [Column(None, 4), Column(None, 5)]
    assert difference.columns == expected + [Column(i, i + 2) for i in range(4, T)]
    assert difference.tokens[4] == (None, "<90>")
    assert_difference(first, second, difference)
    changes = difference.top_changes(5)
    sizes = (difference.edges.second - difference.edges.first).abs()
    assert [abs(c.second - c.first) for c in changes] == pytest.approx(
        sizes.topk(5).values.tolist()
    )


def test_difference_of_two_models_and_its_forms() -> None:
    text = tiny_text(T)
    graphs = [
        Tracer(tiny_model("gpt2", seed).eval(), None).trace(text, threshold=0.03) for seed in (0, 1)
    ]
    difference = graphs[0].compare(graphs[1])
    assert difference.columns == [Column(i, i) for i in range(T)]
    assert_difference(*graphs, difference)
    heads = graphs[1].head_importance() - graphs[0].head_importance()
    assert torch.equal(difference.head_importance(), heads)
    ffn = graphs[1].ffn_importance() - graphs[0].ffn_importance()
    assert torch.equal(difference.ffn_importance(), ffn)

    frame = difference.to_pandas()
    expected = (frame["second"] - frame["first"]).tolist()
    assert frame["difference"].tolist() == pytest.approx(expected, abs=1e-6)
    kinds = [EdgeKind[kind.upper()] for kind in frame["kind"]]
    assert kinds == difference.edges.kind.tolist()
    joined = difference.to_networkx()
    for name, graph in zip(("first", "second"), graphs, strict=True):
        mine = graph.to_networkx()
        got = {
            (u, v, data["kind"]): data[name]
            for u, v, data in joined.edges(data=True)
            if data[name] > 0
        }
        assert got == {(u, v, d["kind"]): d["weight"] for u, v, d in mine.edges(data=True)}
        tokens = {n: d[name] for n, d in joined.nodes(data=True) if name in d}
        assert tokens == {n: d["token"] for n, d in mine.nodes(data=True)}


@pytest.mark.parametrize("form", ["graphml", "gml"])
def test_networkx_writes_a_difference(form: str) -> None:
    tracer = tiny_tracer("llama")
    difference = tracer.trace(tiny_text(6)).compare(tracer.trace(tiny_text(8, 1)))
    joined = difference.to_networkx()
    read = written(joined, form)
    assert dict(read.nodes(data=True)) == {
        name: {key: value for key, value in data.items() if value != ""}
        for name, data in joined.nodes(data=True)
    }
    for u, v, data in joined.edges(data=True):
        assert any(found == data for found in read.get_edge_data(u, v).values())
    columns = [Column(*pair) for pair in json.loads(read.graph["columns"])]
    assert columns == difference.columns


def test_a_graph_does_not_differ_from_itself() -> None:
    tracer, text = tiny_tracer("phi"), tiny_text(T)
    graph = tracer.trace(text, threshold=0.02)
    difference = graph.compare(graph)
    assert difference.top_changes() == []
    assert len(difference.edges.layer) == len(graph.edges.layer)
    assert f"{len(graph.edges.layer)} in both" in repr(difference)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_columns_hold_every_position_once(data: st.DataObject) -> None:
    n = [data.draw(st.integers(1, T)) for _ in range(2)]
    first, second = (small_graph(length) for length in n)
    pairs: list[tuple[int, int]] = []
    for i, j in zip(
        sorted(data.draw(st.sets(st.integers(0, n[0] - 1)))),
        sorted(data.draw(st.sets(st.integers(0, n[1] - 1)))),
        strict=False,
    ):
        pairs.append((i, j))
    columns = first.compare(second, positions=pairs).columns
    for which in (0, 1):
        assert [c[which] for c in columns if c[which] is not None] == list(range(n[which]))
    assert [c for c in columns if None not in c] == pairs


@cache
def small_graph(n_tokens: int) -> RouteGraph:
    tracer, text = tiny_tracer("llama"), tiny_text(T)
    return tracer.trace(text[:n_tokens], threshold=0.1)


def test_differences_refused() -> None:
    graph = small_graph(5)
    other = tiny_tracer("gpt_neox").trace(tiny_text(5))
    with pytest.raises(ValueError, match="other: expected a graph of a model with the same layers"):
        graph.compare(other)
    with pytest.raises(ValueError, match="other: expected a RouteGraph, got int"):
        graph.compare(3)  # type: ignore[arg-type]
    for positions in ([(0, 5)], [(1, 1), (1, 2)], [(2, 1), (1, 2)], [(-1, 0)]):
        with pytest.raises(ValueError, match="positions: expected pairs"):
            graph.compare(graph, positions=positions)
