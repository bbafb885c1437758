"""A layer of a graph, grown from the nodes above it, and the tables that come of it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from listed_paths import edges_of, head_edges_of, target_of, walk
from tiny import tiny_text
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from ifr_fast import RouteGraph, Routes, Tracer
from ifr_fast.graph.flow import thresholded
from ifr_fast.graph.growth import Frontier, packed_columns
from ifr_fast.graph.tables import EdgeKind, Granularity, LayerTable
from ifr_fast.kernels.contract import EdgeList


def test_tables_are_in_canonical_order_and_hold_only_what_is_above_the_threshold(
    tracer: Tracer, granularity: Granularity
) -> None:
    graph = tracer.trace(tiny_text(20), threshold=0.005, granularity=granularity)
    keys = list(zip(*(c.tolist() for c in graph.edges[:4]), strict=True))
    assert keys == sorted(set(keys))
    assert all(c.is_contiguous() for table in (graph.edges, graph.head_edges) for c in table)
    heads = [
        (layer, target, source, head) for layer, head, target, source, _ in head_edges_of(graph)
    ]
    assert heads == sorted(set(heads))
    assert (graph.edges.weight > 0.005).all()
    assert (graph.head_edges.weight > (0.005 if granularity == "head" else 0)).all()
    assert (graph.edges.source <= graph.edges.target).all()
    in_parallel = {EdgeKind.ATTENTION, EdgeKind.FFN, EdgeKind.RESIDUAL_POST}
    kinds = {EdgeKind(k) for k in graph.edges.kind.tolist()}
    assert kinds == (in_parallel if graph.parallel.all() else set(EdgeKind))


@pytest.mark.parametrize("wrap", [torch.tensor, np.array])
def test_heads_that_are_kept_sum_to_one_at_most(wrap: Any) -> None:
    heads = [0.75, 0.25 + 2**-22]
    one, none = wrap([1.0]), wrap([0.0])
    edges = EdgeList(wrap([0]), wrap([0]), one, wrap([heads]))
    table = LayerTable(wrap([0]), none, none, None, edges, none > 0, None)
    assert float(wrap([heads]).sum(-1)[0]) > 1
    assert thresholded(table, 0.1, "head").edges.weight.tolist() == [1.0]


def test_head_shares_sum_to_their_attention_edge(tracer: Tracer, granularity: Granularity) -> None:
    graph = tracer.trace(tiny_text(20), threshold=0.005, granularity=granularity)
    summed: dict[tuple[int, int, int], float] = defaultdict(float)
    for layer, _, target, source, weight in head_edges_of(graph):
        summed[layer, target, source] += weight
    attention = [step for step in edges_of(graph) if step.kind == EdgeKind.ATTENTION]
    assert set(summed) == {(s.layer, s.target, s.source) for s in attention}
    for step in attention:
        key = step.layer, step.target, step.source
        assert summed[key] == pytest.approx(step.weight, abs=1e-6)
    assert len(graph.head_edges.layer) > len(attention) > 10


def test_every_node_above_the_bottom_is_reached_from_the_prediction(small: RouteGraph) -> None:
    reached = {node for _, _, node in walk(small)}
    for step in edges_of(small):
        assert target_of(small, step) in reached


def test_a_graph_is_grown_without_a_look_at_values(granularity: Granularity) -> None:
    """The tensors have no values, so code that depends on them would raise."""
    T, H, N = 20, 4, 60
    with FakeTensorMode():
        table = LayerTable(
            rows=torch.arange(T),
            residual=torch.rand(T),
            ffn=torch.rand(T),
            ffn_residual=torch.rand(T),
            edges=EdgeList(
                torch.zeros(N, dtype=torch.int64),
                torch.zeros(N, dtype=torch.int64),
                torch.rand(N),
                torch.rand(N, H),
            ),
            unattributed=torch.zeros(T, dtype=torch.bool),
            ffn_unattributed=torch.zeros(T, dtype=torch.bool),
        )
        tables = [table, table._replace(ffn_residual=None, ffn_unattributed=None)]
        frontier = Frontier(torch.zeros(T, dtype=torch.bool))
        grown = [frontier.descend(i, of, 0.04, granularity) for i, of in enumerate(tables)]
        assert [len(x) for x in packed_columns(grown)] == [6, 6, 4]
        routes = Routes(["a"] * T, torch.arange(T), 0.04, granularity, tables, lambda p: [], 0.04)
        assert routes.head_importance().shape == (T, 2, H)
        assert routes.head_frequency().shape == (2, H)
        with pytest.raises(DynamicOutputShapeException):
            frontier.reached.nonzero()
