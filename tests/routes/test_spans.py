"""Several positions explained by one graph: the union of their graphs, and the mean flow."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import keyed
from graphs import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from opened import tiny_tracer
from rewritten import rewrite
from same_graph import assert_same_bits, assert_same_graph
from tiny import tiny_text

from ifr_fast import FormatError, RouteGraph, Tracer
from ifr_fast.export.labels import visible
from ifr_fast.graph.tables import Granularity
from ifr_fast.recording.recording import Recording

T = 20


@cache
def opened(family: str) -> tuple[Tracer, Recording]:
    tracer = tiny_tracer(family)
    return tracer, tracer.record(tiny_text(T))


@cache
def single(family: str, position: int, threshold: float, granularity: Granularity) -> RouteGraph:
    """The graph of one position."""
    tracer, recording = opened(family)
    return tracer.trace(recording, position=position, threshold=threshold, granularity=granularity)


def edges_of(graph: RouteGraph) -> dict[tuple[int, ...], float]:
    rows = zip(*(column.tolist() for column in graph.edges), strict=True)
    return {tuple(key): weight for *key, weight in rows}


@settings(deadline=None, max_examples=40)
@given(
    family=st.sampled_from(FAMILIES),
    granularity=st.sampled_from(["token", "head"]),
    threshold=st.sampled_from([0.0, 0.02, 0.1, 0.5]),
    chosen=st.dictionaries(st.integers(0, T - 1), st.floats(0.01, 100), min_size=1, max_size=6),
)
def test_a_span_is_the_union_and_the_weighted_mean(
    family: str, granularity: Granularity, threshold: float, chosen: dict[int, float]
) -> None:
    tracer, recording = opened(family)
    options: dict[str, Any] = {"threshold": threshold, "granularity": granularity}
    weights = np.array(list(chosen.values()))
    graph = tracer.trace(
        recording, position=list(chosen), position_weights=weights.tolist(), **options
    )
    alone = [single(family, t, threshold, granularity) for t in chosen]
    share = torch.tensor(weights / weights.sum())

    together: dict[tuple[int, ...], float] = {}
    for one in alone:
        together |= edges_of(one)
    mine = edges_of(graph)
    assert mine.keys() == together.keys()
    assert all(abs(mine[key] - together[key]) < 1e-6 for key in mine)
    for name in ("token_importance", "head_importance", "ffn_importance"):
        each = torch.stack([getattr(one, name)().double() for one in alone])
        mean = (share.view(-1, *[1] * (each.ndim - 1)) * each).sum(0)
        torch.testing.assert_close(getattr(graph, name)().double(), mean, atol=1e-6, rtol=0)
    assert list(graph.starts) == sorted(chosen)
    assert sum(graph.starts.values()) == pytest.approx(1)
    best = [
        w * paths[0].weight
        for w, one in zip(share.tolist(), alone, strict=True)
        if (paths := one.top_paths(1))
    ]
    got = [path.weight for path in graph.top_paths(1)]
    assert got == pytest.approx(sorted(best)[-1:], abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_span_of_one_is_its_trace(family: str) -> None:
    tracer, recording = opened(family)
    expected = tracer.trace(recording, position=7, threshold=0.02)
    for position in ([7], slice(7, 8), range(7, 8), (7 - T,), torch.tensor([7]), np.array([7, 7])):
        graph = tracer.trace(recording, position=position, threshold=0.02)
        assert graph.span is None
        assert_same_bits(graph, expected)


def test_all_ways_to_name_a_span_agree() -> None:
    tracer, recording = opened("llama")
    expected = tracer.trace(recording, position=[16, 17, 18, 19], threshold=0.02)
    assert expected.span is not None
    assert expected.position == T - 1
    for t, predictions in zip(range(16, T), expected.span.predictions, strict=True):
        alone = tracer.trace(recording, position=t).predictions
        assert [p.token_id for p in predictions] == [p.token_id for p in alone]
        assert [p.probability for p in predictions] == pytest.approx(
            [p.probability for p in alone], abs=1e-6
        )
    assert expected.predictions == expected.span.predictions[-1]
    for position in (slice(-4, None), range(16, T), [-1, 17, -2, 16], torch.arange(16, T)):
        assert_same_bits(tracer.trace(recording, position=position, threshold=0.02), expected)
    assert_same_bits(tracer.trace(tiny_text(T), position=slice(-4, None), threshold=0.02), expected)
    twice = tracer.trace(recording, position=[3, 3, 5], threshold=0.02)
    assert list(twice.starts.items()) == [(3, pytest.approx(2 / 3)), (5, pytest.approx(1 / 3))]


@pytest.mark.parametrize(
    ("position", "weights", "words"),
    [
        ([], None, "names none"),
        (slice(30, 40), None, "names none"),
        ([0, T], None, "expected -20 to 19"),
        ([0, 1.5], None, "expected an int"),
        ("-1", None, "expected an int"),
        ([True, False], None, "expected an int"),
        ([0, 1], [1.0], "one for each of 2"),
        ([0, 1], [1.0, -1.0], "at least 0"),
        ([0, 1], [0.0, 0.0], "at least 0"),
        ([0, 1], [float("nan"), 1.0], "at least 0"),
        ([0, 1], [float("inf"), 1.0], "at least 0"),
    ],
)
def test_other_objects_than_spans_are_refused(position: Any, weights: Any, words: str) -> None:
    tracer, recording = opened("llama")
    with pytest.raises(ValueError, match=words):
        tracer.trace(recording, position=position, position_weights=weights)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["token", "head"])
def test_pruned_saved_and_loaded(family: str, granularity: Granularity, tmp_path: Path) -> None:
    tracer, recording = opened(family)
    options: dict[str, Any] = {
        "position": [4, 11, 19],
        "position_weights": [1, 2, 5],
        "granularity": granularity,
    }
    graph = tracer.trace(recording, threshold=0.01, **options)
    assert_same_graph(graph.prune(0.1), tracer.trace(recording, threshold=0.1, **options))
    assert graph.prune(0.1).span == graph.span
    graph.save(tmp_path / "span")
    loaded = RouteGraph.load(tmp_path / "span")
    assert loaded.span == graph.span
    assert_same_bits(loaded, graph)
    assert "3 positions from 4 to 19" in repr(loaded)


def test_files_of_the_first_version_are_read(tmp_path: Path) -> None:
    tracer, recording = opened("llama")
    graph = tracer.trace(recording, threshold=0.02)
    path = tmp_path / "graph"
    graph.save(path)
    rewrite(path, fields=lambda _: {"span": ...}, version=1)
    assert_same_bits(RouteGraph.load(path), graph)


@pytest.mark.parametrize(
    "span",
    [
        [[4, 11], [0.5, 0.5], [[], []]],  # ends elsewhere
        [[11, 19], [0.5, 0.6], [[], []]],
        [[19], [1.0], [[]]],
        [[19, 11], [0.5, 0.5], [[], []]],
        [[11, 19], [0.5], [[], []]],
        [[11, 19], [0.5, 0.5], [[]]],
        [[11, "19"], [0.5, 0.5], [[], []]],
        [[11, 19], ["x", 0.5], [[], []]],
        [[11, 19], [0.5, 0.5]],
        "span",
        3,
    ],
)
def test_files_with_broken_spans_are_refused(tmp_path: Path, span: Any) -> None:
    tracer, recording = opened("llama")
    path = tmp_path / "graph"
    tracer.trace(recording, position=[11, 19], threshold=0.02).save(path)
    whole = {"predictions": [], "span": [[11, 19], [0.5, 0.5], [[], []]]}
    rewrite(path, fields=lambda _: whole)
    RouteGraph.load(path)
    rewrite(path, fields=lambda _: {"span": span})
    with pytest.raises(FormatError, match="not a whole"):
        RouteGraph.load(path)


def test_every_form_has_all_starts(tmp_path: Path) -> None:
    nx = pytest.importorskip("networkx")
    pytest.importorskip("matplotlib")
    graph = tiny_tracer("llama").trace(
        tiny_text(6), position=[2, 5], position_weights=[1, 3], threshold=0.05
    )
    document = json.loads(graph.to_json())
    assert document["span"]["positions"] == [2, 5]
    assert document["span"]["weights"] == [0.25, 0.75]
    assert len(document["span"]["predictions"]) == 2
    assert document["position"] == 5
    exported = keyed(graph.to_networkx())
    assert json.loads(exported.graph["starts"]) == {"2": 0.25, "5": 0.75}
    importance = torch.zeros(6, dtype=torch.float64)
    for node in [n for n in exported if n[0] == "embed"]:
        for position, weight in graph.starts.items():
            top = ("post", graph.n_layers - 1, position)
            for path in nx.all_simple_edge_paths(exported, node, top):
                for edge in path:
                    weight *= exported.edges[edge]["weight"]
                importance[node[2]] += weight
                weight = graph.starts[position]
    torch.testing.assert_close(importance.float(), graph.token_importance(), rtol=1e-5, atol=1e-8)
    figure = graph.plot()
    figure.savefig(tmp_path / "span.png")
    assert graph.span is not None
    boxes = {  # upright texts above the axes; labels of tokens are below
        round(text.xy[0]): text.get_text()
        for text in figure.axes[0].texts
        if text.get_rotation() == 90 and text.xy[1] > graph.n_layers
    }
    of_each = zip(graph.span.positions, graph.span.predictions, strict=True)
    assert boxes == {position: visible(of[0].token) for position, of in of_each}
    assert (tmp_path / "span.png").stat().st_size > 1000
    assert '"positions":[2,5]' in graph.to_html()
