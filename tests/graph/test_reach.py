"""Reach of a token, against sums over the paths of an exported graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import networkx as nx
import pytest
import torch
from exported import keyed
from opened import tiny_tracer
from tiny import tiny_text

from ifr_fast.graph.tables import Granularity

T = 13


def path_sums(graph: nx.MultiDiGraph, source: Any) -> dict[Any, float]:
    """Weight of all paths from a node of a networkx graph to each."""
    weights = dict.fromkeys(graph, 0.0)
    if source not in weights:
        return weights
    weights[source] = 1.0
    for node in nx.topological_sort(graph):
        for _, target, data in graph.out_edges(node, data=True):
            weights[target] += weights[node] * data["weight"]
    return weights


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("granularity", ["token", "head"])
def test_reach_in_a_graph(family: str, granularity: Granularity) -> None:
    tracer, text = tiny_tracer(family), tiny_text(T)
    graph = tracer.trace(
        text, position=[7, -1], position_weights=[1, 3], threshold=0.02, granularity=granularity
    )
    drawn = keyed(graph.to_networkx())
    importance = graph.token_importance()
    for source in range(T):
        reach = graph.reach(source)
        expected = path_sums(drawn, ("embed", 0, source))
        for (kind, layer, position), weight in expected.items():
            if kind in ("mid", "post"):
                got = getattr(reach, kind)[layer, position]
                assert float(got) == pytest.approx(weight, abs=1e-6)
        at_top = sum(w * float(reach.predictions[t]) for t, w in graph.starts.items())
        assert at_top == pytest.approx(float(importance[source]), abs=1e-6)
        listed = {(n.kind, n.layer, n.position): weight for n, weight in reach.nodes(0.01)}
        above = {
            key: weight
            for key, weight in expected.items()
            if weight > 0.01 and key[0] in ("mid", "post")
        }
        assert listed == pytest.approx(above, abs=1e-6)
        order = [weight for _, weight in reach.nodes()]
        assert order == sorted(order, reverse=True)


def test_routes_from_a_token() -> None:
    tracer, text = tiny_tracer("llama"), tiny_text(T)
    graph = tracer.trace(text, threshold=0.02)
    importance = graph.token_importance()
    for source in range(-T, 0):
        part = graph.routes_from(source)
        got = part.token_importance()
        assert float(got[source]) == pytest.approx(float(importance[source]), abs=1e-6)
        assert got.count_nonzero() == (importance[source] > 0)
        drawn = keyed(part.to_networkx())
        root, top = ("embed", 0, source % T), ("post", graph.n_layers - 1, T - 1)
        if len(part.edges.layer):
            assert set(drawn) == {root} | nx.descendants(drawn, root)
            assert set(drawn) == {top} | nx.ancestors(drawn, top)
    with pytest.raises(ValueError, match="source: expected -13 to 12, got 13"):
        graph.routes_from(13)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_routes_whose_weight_rounds_to_0_are_routes(family: str) -> None:
    """In deep models a product of many small weights rounds to 0."""
    tracer, text = tiny_tracer(family), tiny_text(T)
    graph = tracer.trace(text, threshold=0.02)
    weak = dataclasses.replace(
        graph, edges=graph.edges._replace(weight=torch.full_like(graph.edges.weight, 1e-38))
    )
    assert float(weak.reach(0).predictions.max()) == 0
    for source in range(T):
        part, expected = weak.routes_from(source), graph.routes_from(source)
        for got, column in zip(part.edges[:4], expected.edges[:4], strict=True):
            assert torch.equal(got, column)
        for got, column in zip(part.head_edges, expected.head_edges, strict=True):
            assert torch.equal(got, column)
    assert len(weak.routes_from(0).edges.layer) > 3


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("granularity", ["token", "head"])
def test_reach_in_all_routes(family: str, granularity: Granularity) -> None:
    tracer, text = tiny_tracer(family), tiny_text(T)
    routes = tracer.trace_all(text, threshold=0.02, granularity=granularity)
    for at in (routes, routes.at(0.05)):
        importance = torch.stack([at[t].token_importance() for t in range(T)])
        for source in range(T):
            torch.testing.assert_close(
                at.reach(source).predictions, importance[:, source], atol=1e-6, rtol=0
            )
