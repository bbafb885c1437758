"""RouteGraph: pruning, unattributed nodes, and results as objects."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from listed_paths import edges_of
from opened import tiny_tracer
from same_graph import assert_same_bits, assert_same_graph
from tiny import tiny_text
from unchecked import skip_closure_check

from ifr_fast import RouteGraph, Routes, Tracer
from ifr_fast.graph.tables import EdgeKind, Granularity, Node, NodeKind
from ifr_fast.recording.recording import LayerRecording
from ifr_fast.scoring.scores import LayerScores


@pytest.mark.parametrize("threshold", [0.01, 0.02, 0.05, 0.2, 0.6, 1.0])
def test_prune_is_what_trace_gives_at_that_threshold(
    tracer: Tracer, granularity: Granularity, threshold: float
) -> None:
    recording = tracer.record(tiny_text(20))
    options: dict[str, Any] = {"position": 13, "granularity": granularity}
    low = tracer.trace(recording, threshold=0.01, **options)
    expected = tracer.trace(recording, threshold=threshold, **options)
    pruned = low.prune(threshold)
    assert_same_graph(pruned, expected)
    assert pruned.predictions == low.predictions
    if threshold == 1.0:
        assert len(pruned.edges.layer) == len(pruned.head_edges.layer) == 0
        assert pruned.token_importance().tolist() == [0.0] * 20
        assert pruned.top_paths(3) == pruned.top_routes(3) == []
    if threshold == 0.05:
        assert 0 < len(pruned.edges.layer) < len(low.edges.layer)


def test_prune_at_its_own_threshold_changes_nothing(
    tracer: Tracer, granularity: Granularity
) -> None:
    graph = tracer.trace(tiny_text(20), threshold=0.02, granularity=granularity)
    assert_same_bits(graph.prune(0.02), graph)


def test_prune_twice_is_prune_once(tracer: Tracer, granularity: Granularity) -> None:
    graph = tracer.trace(tiny_text(20), threshold=0.0, granularity=granularity)
    assert_same_bits(graph.prune(0.03).prune(0.1), graph.prune(0.1))


@pytest.mark.parametrize("threshold", [0.0, 0.0199, -1.0, 1.01, float("nan")])
def test_prune_refuses_what_the_graph_does_not_hold(threshold: float) -> None:
    graph = tiny_tracer("llama").trace(tiny_text(5), threshold=0.02)
    with pytest.raises(ValueError, match="threshold"):
        graph.prune(threshold)


def test_results_are_compared_by_identity(tracer: Tracer) -> None:
    """Tensors have no single bool for == and no hash of their values."""
    recording = tracer.record(tiny_text(5))
    first, second = (tracer.trace(recording) for _ in range(2))
    scores = [next(tracer.contributions(recording)) for _ in range(2)]
    routes = [tracer.trace_all(recording) for _ in range(2)]
    copies = [dataclasses.replace(recording), recording]
    for a, b in ([first, second], scores, routes, copies, recording.layers[:2]):
        assert isinstance(a, RouteGraph | Routes | LayerScores | LayerRecording | type(recording))
        assert a == a
        assert a != b
        assert len({a, b, a}) == 2


def test_results_are_ordinary_tensors(tracer: Tracer, granularity: Granularity) -> None:
    """Autograd refuses tensors of inference mode, and they cannot be changed in place."""
    text = tiny_text(8)
    graph = tracer.trace(text, threshold=0.05, granularity=granularity)
    routes = tracer.trace_all(text, threshold=0.05, granularity=granularity)
    for of in (graph, routes[-1], graph.prune(0.1)):
        of_graph = [*of.edges, *of.head_edges, of.token_ids, of.parallel, of.token_importance(),
                    of.head_importance(), of.ffn_importance()]  # fmt: skip
        assert not any(x.is_inference() for x in of_graph)
    of_routes = [routes.token_ids, routes.head_frequency(), routes.head_importance(),
                 routes.ffn_importance()]  # fmt: skip
    assert not any(x.is_inference() for x in of_routes)
    scale = torch.ones((), requires_grad=True)
    (scale * graph.edges.weight).sum().backward()
    with torch.inference_mode():
        again = tracer.trace_all(text, threshold=0.05, granularity=granularity)
        assert not again[2].edges.weight.is_inference()


def test_unattributed_nodes_are_in_the_graph_with_equal_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y = 1, parts 10 and -9: each is farther from y than 0 is."""
    T, layer, t = 5, 1, 4
    tracer = tiny_tracer("llama")
    H = tracer.decoder.n_heads
    recording = tracer.record(tiny_text(T), mode="full")
    # The closure check would refuse the change.
    skip_closure_check(monkeypatch)

    def edit(x: torch.Tensor, value: float) -> torch.Tensor:
        x = x.clone()
        x[t] = value
        return x

    # post of layer 1: resid_mid 10, FFN -9. mid of layer 0: resid_pre 0.01, sum 0.001, attention
    # 0, too small to show in its post.
    below, of_layer, above = recording.layers[layer - 1 : layer + 2]
    of_layer.resid_mid = edit(of_layer.resid_mid, 10)
    above.resid_pre = edit(above.resid_pre, 1)
    below.resid_pre, below.resid_mid = edit(below.resid_pre, 1e-2), edit(below.resid_mid, 1e-3)
    below.v = torch.zeros_like(below.v)

    graph = tracer.trace(recording, position=t, threshold=0.0)
    assert graph.unattributed == [Node(0, NodeKind.MID, t), Node(1, NodeKind.POST, t)]
    weights = {(s.layer, s.kind, s.target, s.source): s.weight for s in edges_of(graph)}
    assert weights[1, EdgeKind.FFN, t, t] == weights[1, EdgeKind.RESIDUAL_POST, t, t] == 0.5
    n_parts = 1 + H * (t + 1)
    assert weights[0, EdgeKind.RESIDUAL_MID, t, t] == pytest.approx(1 / n_parts)
    for source in range(t + 1):
        assert weights[0, EdgeKind.ATTENTION, t, source] == pytest.approx(H / n_parts)
    assert float(graph.token_importance().sum()) == pytest.approx(1, abs=1e-5)
    assert torch.isfinite(graph.edges.weight).all()

    routes = tracer.trace_all(recording, threshold=0.0)
    assert_same_graph(routes[t], graph)
    assert routes[0].unattributed == []
    graph.save(tmp_path / "graph")
    assert RouteGraph.load(tmp_path / "graph").unattributed == graph.unattributed
    assert_same_bits(graph.prune(0.0), graph)
    # Halves do not exceed 0.5, so nothing below layer 1 is reached through this node any more.
    halves = {(s.kind, s.target) for s in edges_of(graph.prune(0.5)) if s.layer == 1}
    assert halves & {(EdgeKind.FFN, t), (EdgeKind.RESIDUAL_POST, t)} == set()


def test_unattributed_nodes_of_parallel_blocks_are_posts(monkeypatch: pytest.MonkeyPatch) -> None:
    T, t = 4, 3
    tracer = tiny_tracer("gpt_neox")
    H = tracer.decoder.n_heads
    recording = tracer.record(tiny_text(T), mode="full")
    skip_closure_check(monkeypatch)
    top = recording.layers[-1]
    top.v = torch.zeros_like(top.v)
    top.resid_pre, top.resid_mid = torch.full((2, T, tracer.decoder.d_model), 10.0)
    recording.resid_final = torch.ones_like(recording.resid_final)
    graph = tracer.trace(recording, threshold=0.0)
    assert graph.unattributed == [Node(2, NodeKind.POST, t)]
    weights = {(s.layer, s.kind, s.target, s.source): s.weight for s in edges_of(graph)}
    n_parts = 2 + H * T
    assert weights[2, EdgeKind.FFN, t, t] == pytest.approx(1 / n_parts)
    assert weights[2, EdgeKind.RESIDUAL_POST, t, t] == pytest.approx(1 / n_parts)
    for source in range(T):
        assert weights[2, EdgeKind.ATTENTION, t, source] == pytest.approx(H / n_parts)
    assert float(graph.token_importance().sum()) == pytest.approx(1, abs=1e-5)
