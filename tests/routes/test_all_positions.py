"""Routes: the graphs of every position, and what is summed over them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import any_routes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from listed_paths import head_edges_of, listed_importances, paths, walk
from opened import tiny_tracer
from same_graph import assert_same_bits, assert_same_graph
from tiny import tiny_model, tiny_text

from ifr_fast import Routes, Tracer
from ifr_fast.graph.tables import Granularity
from ifr_fast.routes import all_positions


def test_routes_are_the_graphs_of_every_position(tracer: Tracer, granularity: Granularity) -> None:
    T = 10
    recording = tracer.record(tiny_text(T))
    low = tracer.trace_all(recording, threshold=0.01, granularity=granularity)
    assert len(low) == T
    every = [(threshold, t) for threshold in (0.01, 0.04, 0.3) for t in range(T)]
    for threshold, t in every:
        graph = low.at(threshold)[t]
        expected = tracer.trace(recording, position=t, threshold=threshold, granularity=granularity)
        assert_same_graph(graph, expected)
        assert [p.token_id for p in graph.predictions] == [p.token_id for p in expected.predictions]
        assert [p.probability for p in graph.predictions] == pytest.approx(
            [p.probability for p in expected.predictions], abs=1e-6
        )
        assert len(graph.edges.layer) > 0


@pytest.mark.parametrize("threshold", [0.02, 0.1])
def test_routes_aggregates_are_those_of_the_graphs(
    tracer: Tracer,
    granularity: Granularity,
    threshold: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    T = 10
    routes = tracer.trace_all(tiny_text(T), threshold=0.02, granularity=granularity)
    routes = routes.at(threshold)
    frequency = torch.zeros(routes.n_layers, routes.n_heads)
    for t in range(T):
        graph = routes[t]
        # A head is in a graph when one of its edges exceeds the threshold by itself.
        alone = graph.head_edges.weight > threshold
        frequency[graph.head_edges.layer[alone], graph.head_edges.head[alone]] += 1
        torch.testing.assert_close(
            routes.head_importance()[t], graph.head_importance(), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(
            routes.ffn_importance()[t], graph.ffn_importance(), atol=1e-6, rtol=0
        )
    assert 0 < float(frequency.mean()) < T
    torch.testing.assert_close(routes.head_frequency(), frequency / T, atol=1e-6, rtol=0)
    for elements in (1, 5 * T):  # one prediction at a time, and a ragged last block
        monkeypatch.setattr(all_positions, "_FLOW_ELEMENTS", elements)
        again = routes.at(threshold)
        torch.testing.assert_close(again.head_frequency(), routes.head_frequency())
        torch.testing.assert_close(again.head_importance(), routes.head_importance())
        torch.testing.assert_close(again.ffn_importance(), routes.ffn_importance())


def test_routes_refuse_what_was_not_scored() -> None:
    routes = tiny_tracer("llama").trace_all(tiny_text(5), threshold=0.04)
    for threshold in (0.0399, 0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            routes.at(threshold)
    assert routes.at(0.5).at(0.04).threshold == 0.04
    assert_same_bits(routes.at(0.5).at(0.04)[3], routes[3])


def test_routes_are_indexed_as_sequences_are() -> None:
    routes = tiny_tracer("llama").trace_all(tiny_text(5), threshold=0.04)
    assert [graph.position for graph in routes] == [0, 1, 2, 3, 4]
    assert_same_bits(routes[-1], routes[4])
    assert_same_bits(routes[-5], routes[0])
    for position in (5, -6):
        with pytest.raises(IndexError, match=f"position: expected -5 to 4, got {position}"):
            routes[position]


def test_integers_and_numbers_of_other_libraries() -> None:
    tracer = tiny_tracer("llama")
    routes = tracer.trace_all(tiny_text(5), threshold=0.0)
    graph = routes[3]
    for three in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert_same_bits(routes[three], graph)
        assert graph.top_paths(three) == graph.top_paths(3)
        assert graph.top_routes(three) == graph.top_routes(3)
    for position in (slice(1, 3), 1.0, "1", None, True, np.float64(1)):
        with pytest.raises(ValueError, match=r"position: expected an int, got "):
            routes[position]
        for top in (graph.top_paths, graph.top_routes):
            with pytest.raises(ValueError, match=r"k: expected an int, got "):
                top(position)
    for quarter in (np.float32(0.25), np.float64(0.25), Fraction(1, 4)):
        assert_same_bits(graph.prune(quarter), graph.prune(0.25))
        assert_same_bits(routes.at(quarter)[3], routes.at(0.25)[3])
    for threshold in ("0.25", None, True, np.float32("nan"), [0.25], 0.25j, float("inf")):
        for at in (graph.prune, routes.at):
            with pytest.raises(ValueError, match=r"threshold: expected a number from 0 to 1, got "):
                at(threshold)


def test_saving_routes_forms_the_logits_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracer = Tracer(tiny_model("llama"))
    routes = tracer.trace_all(tiny_text(90), threshold=0.5)
    head, rows = tracer.decoder.head, []

    def counted(states: torch.Tensor) -> torch.Tensor:
        rows.append(len(states))
        return head(states)

    monkeypatch.setattr(tracer.decoder, "head", counted)
    routes.save(tmp_path / "routes")
    assert sum(rows) == 90
    assert max(rows) <= 64
    assert len(rows) == 2
    rows.clear()
    assert [len(routes[t].predictions) for t in (89, 3, -2)] == [5, 5, 5]
    assert rows == [1, 1]  # the forward pass formed those of the last position


@given(any_routes(), st.sampled_from([0, 1 / 16, 3 / 16, 0.3]), st.sampled_from([0, 1 / 8, 0.25]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_routes_hold_together(routes: Routes, low: float, more: float) -> None:
    T, high = len(routes), low + more
    at_low, at_high = routes.at(low), routes.at(high)
    frequency = torch.zeros(routes.n_layers, routes.n_heads)
    for t in range(T):
        graph = at_low[t]
        assert (graph.edges.weight > low).all()
        assert_same_bits(graph.prune(high), at_high[t])
        tokens, heads, ffn = listed_importances(graph)
        close = {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(graph.token_importance().double(), tokens, **close)
        torch.testing.assert_close(graph.head_importance().double(), heads, **close)
        torch.testing.assert_close(graph.ffn_importance().double(), ffn, **close)
        torch.testing.assert_close(at_low.head_importance()[t].double(), heads, **close)
        torch.testing.assert_close(at_low.ffn_importance()[t].double(), ffn, **close)
        every = sorted((weight for weight, _ in paths(graph)), reverse=True)[:3]
        assert [path.weight for path in graph.top_paths(3)] == pytest.approx(every, rel=1e-12)
        alone = {
            (layer, head) for layer, head, _, _, weight in head_edges_of(graph) if weight > low
        }
        for layer, head in alone:
            frequency[layer, head] += 1
        # A node is unattributed if it is in the graph and its layer's scores say so.
        nodes = {node for _, _, node in walk(graph)}
        for node in graph.unattributed:
            assert (node.layer, node.kind.value, node.position) in nodes
    torch.testing.assert_close(at_low.head_frequency(), frequency / T)
