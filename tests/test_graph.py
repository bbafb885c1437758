"""RouteGraph and Routes, against path after path followed by hand."""

from __future__ import annotations

import dataclasses
import errno
import json
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from same_graph import assert_same_bits, assert_same_graph
from tiny import tiny_model, tiny_text
from unchecked import skip_closure_check

import ifr_fast.routes.all_positions
import ifr_fast.storage
from ifr_fast import FormatError, IfrError, RouteGraph, Routes, Tracer
from ifr_fast.graph.tables import EdgeKind, LayerTable, Node, NodeKind, Prediction, Step
from ifr_fast.kernels.contract import EdgeList
from ifr_fast.recording.recording import LayerRecording
from ifr_fast.scoring.scores import LayerScores
from ifr_fast.tokens import encode

FAMILIES = ["llama", "gpt_neox", "mistral"]  # sequential, parallel, windowed
GRANULARITIES = ["token", "head"]
HOSTILE = ["\ud800", "\ufffd", "\x00", "\u202eעברית", "日本語🎉", "</script>", ""]


@pytest.fixture(scope="module", params=FAMILIES)
def tracer(request: pytest.FixtureRequest) -> Tracer:
    return Tracer(tiny_model(request.param))


@pytest.fixture(scope="module", params=GRANULARITIES)
def granularity(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def small(tracer: Tracer, granularity: str) -> RouteGraph:
    """A graph whose paths can all be listed."""
    graph = tracer.trace(tiny_text(6), threshold=0.01, granularity=granularity)
    assert set(graph.edges.source[graph.edges.layer == 0].tolist()) > {graph.position}
    return graph


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "graph.safetensors"
    Tracer(tiny_model("llama")).trace(tiny_text(20), threshold=0.05).save(path)
    return path


@pytest.fixture
def detailed(tmp_path: Path) -> Path:
    """With attention edges in it."""
    path = tmp_path / "graph.safetensors"
    graph = Tracer(tiny_model("llama")).trace(tiny_text(20), threshold=0.005)
    assert len(graph.head_edges.layer) > 9
    graph.save(path)
    return path


def edges_of(graph: RouteGraph) -> list[Step]:
    rows = zip(*(column.tolist() for column in graph.edges), strict=True)
    return [Step(layer, EdgeKind(kind), t, s, weight) for layer, kind, t, s, weight in rows]


def walk(graph: RouteGraph) -> Iterator[tuple[float, list[Step], tuple[int, str, int]]]:
    """Every path from the prediction to every node, by recursion: (product, steps, node)."""
    into: dict[tuple[int, str, int], list[Step]] = defaultdict(list)
    for step in edges_of(graph):
        reads_pre = step.kind in (EdgeKind.ATTENTION, EdgeKind.RESIDUAL_MID)
        kind = "mid" if reads_pre and not graph.parallel[step.layer] else "post"
        into[step.layer, kind, step.target].append(step)

    def down(
        node: tuple[int, str, int], weight: float, steps: list[Step]
    ) -> Iterator[tuple[float, list[Step], tuple[int, str, int]]]:
        yield weight, steps, node
        layer, kind, _ = node
        to_mid = layer >= 0 and kind == "post" and not graph.parallel[layer]
        for step in into[node]:
            below = (layer, "mid", step.source) if to_mid else (layer - 1, "post", step.source)
            yield from down(below, weight * step.weight, [*steps, step])

    yield from down((graph.n_layers - 1, "post", graph.position), 1.0, [])


def paths(graph: RouteGraph) -> list[tuple[float, list[Step]]]:
    """Every whole path, from the prediction to an embedding."""
    return [(weight, steps) for weight, steps, node in walk(graph) if node[0] == -1]


def brute_importances(graph: RouteGraph) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of tokens [T], heads [L, H] and FFN blocks [L], float64, by listing all paths."""
    flow: dict[tuple[int, str, int], float] = defaultdict(float)
    for weight, _, node in walk(graph):
        flow[node] += weight
    tokens = torch.tensor(
        [flow[-1, "post", j] for j in range(len(graph.tokens))], dtype=torch.float64
    )
    heads = torch.zeros(graph.n_layers, graph.n_heads, dtype=torch.float64)
    rows = zip(*(column.tolist() for column in graph.head_edges), strict=True)
    for layer, head, target, _, weight in rows:
        node = "post" if graph.parallel[layer] else "mid"
        heads[layer, head] += weight * flow[layer, node, target]
    ffn = torch.zeros(graph.n_layers, dtype=torch.float64)
    for step in edges_of(graph):
        if step.kind == EdgeKind.FFN:
            ffn[step.layer] += step.weight * flow[step.layer, "post", step.target]
    return tokens, heads, ffn


# The tables


def test_tables_are_in_canonical_order_and_hold_only_what_is_above_the_threshold(
    tracer: Tracer, granularity: str
) -> None:
    graph = tracer.trace(tiny_text(20), threshold=0.005, granularity=granularity)
    keys = list(zip(*(c.tolist() for c in graph.edges[:4]), strict=True))
    assert keys == sorted(set(keys))
    assert all(c.is_contiguous() for table in (graph.edges, graph.head_edges) for c in table)
    heads = [
        (layer, target, source, head)
        for layer, head, target, source in zip(
            *(c.tolist() for c in graph.head_edges[:4]), strict=True
        )
    ]
    assert heads == sorted(set(heads))
    assert (graph.edges.weight > 0.005).all()
    assert (graph.head_edges.weight > (0.005 if granularity == "head" else 0)).all()
    assert (graph.edges.source <= graph.edges.target).all()
    in_parallel = {EdgeKind.ATTENTION, EdgeKind.FFN, EdgeKind.RESIDUAL_POST}
    kinds = {EdgeKind(k) for k in graph.edges.kind.tolist()}
    assert kinds == (in_parallel if graph.parallel.all() else set(EdgeKind))


def test_head_shares_sum_to_their_attention_edge(tracer: Tracer, granularity: str) -> None:
    graph = tracer.trace(tiny_text(20), threshold=0.005, granularity=granularity)
    summed: dict[tuple[int, int, int], float] = defaultdict(float)
    for layer, _, target, source, weight in zip(
        *(c.tolist() for c in graph.head_edges), strict=True
    ):
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
        reads_pre = step.kind in (EdgeKind.ATTENTION, EdgeKind.RESIDUAL_MID)
        kind = "mid" if reads_pre and not small.parallel[step.layer] else "post"
        assert (step.layer, kind, step.target) in reached


# prune


@pytest.mark.parametrize("threshold", [0.01, 0.02, 0.05, 0.2, 0.6, 1.0])
def test_prune_is_what_trace_gives_at_that_threshold(
    tracer: Tracer, granularity: str, threshold: float
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


def test_prune_at_its_own_threshold_changes_nothing(tracer: Tracer, granularity: str) -> None:
    graph = tracer.trace(tiny_text(20), threshold=0.02, granularity=granularity)
    assert_same_bits(graph.prune(0.02), graph)


def test_prune_twice_is_prune_once(tracer: Tracer, granularity: str) -> None:
    graph = tracer.trace(tiny_text(20), threshold=0.0, granularity=granularity)
    assert_same_bits(graph.prune(0.03).prune(0.1), graph.prune(0.1))


@pytest.mark.parametrize("threshold", [0.0, 0.0199, -1.0, 1.01, float("nan")])
def test_prune_refuses_what_the_graph_does_not_hold(threshold: float) -> None:
    graph = Tracer(tiny_model("llama")).trace(tiny_text(5), threshold=0.02)
    with pytest.raises(ValueError, match="threshold"):
        graph.prune(threshold)


# Paths and importances


def test_importances_are_sums_over_all_paths(small: RouteGraph) -> None:
    tokens, heads, ffn = brute_importances(small)
    assert (tokens > 0).sum() > 2
    torch.testing.assert_close(small.token_importance().double(), tokens, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(small.head_importance().double(), heads, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(small.ffn_importance().double(), ffn, atol=1e-7, rtol=1e-6)
    assert small.token_importance().dtype == torch.float32


def test_nothing_is_lost_without_a_threshold(tracer: Tracer, granularity: str) -> None:
    """Each node's importances sum to 1, so all that leaves the prediction reaches a token."""
    for position in (0, 1, 19):
        graph = tracer.trace(
            tiny_text(20), position=position, threshold=0.0, granularity=granularity
        )
        importance = graph.token_importance()
        assert float(importance.sum()) == pytest.approx(1, abs=1e-4)
        assert (importance[position + 1 :] == 0).all()
        # What a layer's parts carry is what comes in, so a parallel block's sum to 1 together.
        of_layer = graph.head_importance().sum(-1) + graph.ffn_importance()
        assert (of_layer < 2 + 1e-4).all()
        if graph.parallel.all():
            assert (of_layer < 1 + 1e-4).all()


def test_top_paths_are_the_heaviest_of_all(small: RouteGraph) -> None:
    every = sorted(paths(small), key=lambda path: -path[0])
    assert len(every) > 20
    listed = {tuple(steps): weight for weight, steps in every}
    for k in (1, 2, 7, 20):
        found = small.top_paths(k)
        assert len(found) == k
        weights = [path.weight for path in found]
        assert weights == pytest.approx([weight for weight, _ in every[:k]], rel=1e-12)
        assert weights == sorted(weights, reverse=True)
        assert len({tuple(path.steps) for path in found}) == k
        for path in found:
            assert listed[tuple(path.steps)] == pytest.approx(path.weight, rel=1e-12)
            assert path.steps[0].target == small.position
            for upper, lower in zip(path.steps, path.steps[1:], strict=False):
                assert upper.source == lower.target
                assert lower.layer in (upper.layer, upper.layer - 1)
            assert path.steps[-1].layer == 0
    everything = small.top_paths(10 * len(every))
    assert {tuple(path.steps) for path in everything} == set(listed)


def test_top_routes_sum_the_paths_that_hop_alike(small: RouteGraph) -> None:
    classes: dict[tuple[tuple[int, int, int], ...], float] = defaultdict(float)
    for weight, steps in paths(small):
        hops = tuple((s.layer, s.target, s.source) for s in steps if s.target != s.source)
        classes[hops] += weight
    every = sorted(classes.values(), reverse=True)
    assert len(every) > 5
    found = small.top_routes(10 * len(every))
    assert [route.weight for route in found] == pytest.approx(every, rel=1e-9)
    attention = {
        (s.layer, s.target, s.source): s.weight
        for s in edges_of(small)
        if s.kind == EdgeKind.ATTENTION
    }
    heads: dict[tuple[int, int, int], dict[int, float]] = defaultdict(dict)
    for layer, head, target, source, weight in zip(
        *(c.tolist() for c in small.head_edges), strict=True
    ):
        heads[layer, target, source][head] = weight
    for route in found:
        hops = tuple((hop.layer, hop.target, hop.source) for hop in route.hops)
        assert classes.pop(hops) == pytest.approx(route.weight, rel=1e-9)
        assert route.source == (hops[-1][2] if hops else small.position)
        for hop, key in zip(route.hops, hops, strict=True):
            assert hop.weight == pytest.approx(attention[key], rel=1e-5)
            assert dict(hop.heads) == heads[key]
            assert [w for _, w in hop.heads] == sorted(heads[key].values(), reverse=True)
    assert not classes
    top = small.top_routes(3)
    assert [route.weight for route in top] == pytest.approx(every[:3], rel=1e-9)


@pytest.mark.parametrize("k", [0, -1])
def test_no_paths_are_not_to_be_asked_for(small: RouteGraph, k: int) -> None:
    with pytest.raises(ValueError, match=r"k: expected at least 1"):
        small.top_paths(k)
    with pytest.raises(ValueError, match=r"k: expected at least 1"):
        small.top_routes(k)


# Save and load


def test_a_graph_comes_back_bit_for_bit(tracer: Tracer, granularity: str, tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    graph = tracer.trace(tiny_text(20), position=-3, threshold=0.02, granularity=granularity)
    graph.save(path)
    assert_same_bits(RouteGraph.load(path), graph)
    assert [p.name for p in tmp_path.iterdir()] == ["graph.safetensors"]
    assert_same_bits(RouteGraph.load(str(path)), graph)


def test_hostile_tokens_and_unattributed_nodes_come_back(tmp_path: Path) -> None:
    graph = Tracer(tiny_model("llama")).trace(tiny_text(len(HOSTILE)), threshold=0.1)
    graph = dataclasses.replace(
        graph,
        tokens=HOSTILE,
        predictions=[Prediction(token, i, 0.1) for i, token in enumerate(HOSTILE)],
        unattributed=[Node(0, NodeKind.MID, 1), Node(2, NodeKind.POST, 6)],
    )
    graph.save(tmp_path / "graph")
    assert_same_bits(RouteGraph.load(tmp_path / "graph"), graph)


def test_a_graph_without_edges_comes_back(tmp_path: Path) -> None:
    graph = Tracer(tiny_model("llama")).trace(tiny_text(1), threshold=1.0)
    assert len(graph.edges.layer) == 0
    graph.save(tmp_path / "graph")
    assert_same_bits(RouteGraph.load(tmp_path / "graph"), graph)


def test_routes_come_back_bit_for_bit(tracer: Tracer, granularity: str, tmp_path: Path) -> None:
    path = tmp_path / "routes.safetensors"
    routes = tracer.trace_all(tiny_text(9), threshold=0.02, granularity=granularity).at(0.03)
    routes.save(path)
    loaded = Routes.load(path)
    assert (loaded.threshold, loaded.scored_threshold) == (0.03, 0.02)
    all_at_once = routes.predict(list(range(9)))
    for t in range(9):
        expected = dataclasses.replace(routes[t], predictions=all_at_once[t])
        assert_same_bits(loaded[t], expected)
        for one, of_all in zip(routes[t].predictions, all_at_once[t], strict=True):
            assert one[:2] == of_all[:2]
            assert one.probability == pytest.approx(of_all.probability, abs=1e-6)
    low = dataclasses.replace(routes.at(0.02)[4], predictions=all_at_once[4])
    assert_same_bits(loaded.at(0.02)[4], low)
    loaded.save(tmp_path / "again")
    assert_same_bits(Routes.load(tmp_path / "again")[4], loaded[4])
    with pytest.raises(ValueError, match="threshold"):
        loaded.at(0.01)
    for mine, theirs in zip(loaded.layers, routes.layers, strict=True):
        for a, b in zip((*mine[:4], *mine.edges), (*theirs[:4], *theirs.edges), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert torch.equal(loaded.head_frequency(), routes.head_frequency())
    assert torch.equal(loaded.head_importance(), routes.head_importance())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_truncated_files_are_refused(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    for kind in (RouteGraph, Routes):
        with pytest.raises(FormatError, match=saved.name):
            kind.load(saved)
    saved.write_bytes(whole[:-1])
    with pytest.raises(FormatError, match=saved.name):
        RouteGraph.load(saved)


@pytest.mark.parametrize("kind", [RouteGraph, Routes])
def test_foreign_files_are_refused(kind: type[RouteGraph | Routes], tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    with pytest.raises(FormatError, match="no such file"):
        kind.load(path)
    with pytest.raises(FormatError, match=tmp_path.name):
        kind.load(tmp_path)
    for content in (b'{"tokens": []}', pickle.dumps({"edges": [1, 2]}), b"\x00" * 99, b"\xff" * 99):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="foreign"):
            kind.load(path)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(FormatError, match=f"expected a file of format '{kind._FORMAT}', got None"):
        kind.load(path)


def test_each_kind_refuses_the_other(saved: Path) -> None:
    with pytest.raises(FormatError, match=r"'ifr_fast.routes', got 'ifr_fast.route_graph'"):
        Routes.load(saved)


def test_other_versions_are_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for monkeypatched, words in ((1, "version 2.*version 1"), (3, "version 2.*version 3")):
        monkeypatch.setattr(RouteGraph, "_VERSION", monkeypatched)
        monkeypatch.setattr(RouteGraph, "_OLDEST", monkeypatched)
        with pytest.raises(FormatError, match=words):
            RouteGraph.load(saved)
    monkeypatch.setattr(RouteGraph, "_OLDEST", 1)
    RouteGraph.load(saved)


def rewrite(path: Path, drop: str | None = None, fields: Any = ..., **tensors: Any) -> None:
    """Writes the file again without one tensor, with other fields, or with tensors changed."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        kept = {k: file.get_tensor(k) for k in file.keys() if k != drop}  # noqa: SIM118
    if callable(fields):
        fields = json.loads(metadata["fields"]) | fields(json.loads(metadata["fields"]))
    if fields is not ...:
        metadata["fields"] = json.dumps(fields)
    for name, change in tensors.items():
        kept[name] = change(kept[name]).contiguous()
    save_file(kept, path, metadata)


def put(index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A tensor's copy with one value exchanged."""

    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.view(-1)[index] = value
        return x

    return change


def tensor_names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def test_files_without_one_of_their_tensors_are_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    names = tensor_names(saved)
    assert len(names) == 5 + 5 + 2
    for name in names:
        rewrite(saved, drop=name)
        with pytest.raises(FormatError, match="not a whole"):
            RouteGraph.load(saved)
        saved.write_bytes(whole)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_routes_without_one_of_their_tensors_are_refused(family: str, tmp_path: Path) -> None:
    path = tmp_path / "routes"
    Tracer(tiny_model(family)).trace_all(tiny_text(5), threshold=0.1).save(path)
    whole = path.read_bytes()
    accepted = []
    for name in tensor_names(path):
        rewrite(path, drop=name)
        try:
            Routes.load(path)
            accepted.append(name)
        except FormatError:
            pass
        path.write_bytes(whole)
    assert accepted == []


@pytest.mark.parametrize("fields", [None, [], {}, "text", {"n_layers": 3}, {"n_layers": "x"}])
def test_files_with_other_fields_are_refused(saved: Path, tmp_path: Path, fields: Any) -> None:
    rewrite(saved, fields=fields)
    with pytest.raises(FormatError, match="not a whole"):
        RouteGraph.load(saved)
    routes = tmp_path / "routes"
    Tracer(tiny_model("llama")).trace_all(tiny_text(3), threshold=0.1).save(routes)
    rewrite(routes, fields=fields)
    with pytest.raises(FormatError, match="not a whole"):
        Routes.load(routes)


COLUMNS = [
    *(f"edges.{name}" for name in ("layer", "kind", "target", "source", "weight")),
    *(f"head_edges.{name}" for name in ("layer", "head", "target", "source", "weight")),
]


@pytest.mark.parametrize("name", [*COLUMNS, "token_ids", "parallel"])
def test_graphs_whose_tensors_do_not_fit_together_are_refused(detailed: Path, name: str) -> None:
    whole = detailed.read_bytes()
    last = {"weight": float("nan")}
    changes = {
        "shorter": lambda x: x[:-1],
        "2-d": lambda x: x[:, None],
        "0-d": lambda x: x[0],
        "other dtype": lambda x: x.int() if x.dtype != torch.int32 else x.long(),
    }
    if name in COLUMNS:
        changes["negative"] = put(-1, -1)
        changes["too large"] = put(-1, last.get(name.partition(".")[2], 20))
    for what, change in changes.items():
        rewrite(detailed, **{name: change})
        with pytest.raises(FormatError, match=rf"not a whole .*{name.partition('.')[0]}"):
            pytest.fail(f"{what}: {RouteGraph.load(detailed)}")
        detailed.write_bytes(whole)


def test_graphs_out_of_canonical_order_are_refused(detailed: Path) -> None:
    whole = detailed.read_bytes()
    for table in ("edges", "head_edges"):
        columns = [name for name in COLUMNS if name.startswith(f"{table}.")]
        for change in (lambda x: x.flip(0), lambda x: torch.cat([x[:1], x])):
            rewrite(detailed, **dict.fromkeys(columns, change))
            with pytest.raises(FormatError, match=f"{table}: not in canonical order"):
                RouteGraph.load(detailed)
            detailed.write_bytes(whole)


def test_graphs_with_edges_that_no_graph_has_are_refused(detailed: Path) -> None:
    whole = detailed.read_bytes()
    graph = RouteGraph.load(detailed)
    i = int((graph.edges.kind == EdgeKind.RESIDUAL_MID).nonzero()[-1])
    target = int(graph.edges.target[i])
    alone = [name for name in COLUMNS if name.startswith("head_edges.")]
    for tensors, words in (
        ({"edges.source": put(i, target - 1)}, "edges: a source"),
        ({"parallel": torch.ones_like}, "RESIDUAL_MID in a parallel block"),
        ({"head_edges.target": put(-1, 0), "head_edges.source": put(-1, 0)}, "head_edges"),
        ({name: (lambda x: x[:0]) for name in COLUMNS if name not in alone}, "head_edges: not all"),
    ):
        rewrite(detailed, **tensors)
        with pytest.raises(FormatError, match=words):
            RouteGraph.load(detailed)
        detailed.write_bytes(whole)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("position", 20),
        ("position", -1),
        ("position", 1.0),
        ("position", True),
        ("n_layers", 4),
        ("n_layers", 0),
        ("n_heads", 0),
        ("n_heads", 1),
        ("threshold", 2),
        ("threshold", "0.1"),
        ("threshold", float("nan")),
        ("granularity", "both"),
        ("granularity", None),
        ("tokens", []),
        ("tokens", ["a"] * 19),
        ("tokens", "abcdefghijabcdefghij"),
        ("tokens", [1] * 20),
        ("predictions", [["a", 1]]),
        ("predictions", [["a", -1, 0.5]]),
        ("predictions", [["a", "1", 0.5]]),
        ("predictions", [[1, 1, 0.5]]),
        ("unattributed", [[3, "mid", 0]]),
        ("unattributed", [[0, "mid", 20]]),
        ("unattributed", [[0, "embed", 0]]),
        ("unattributed", [[0, "top", 0]]),
        ("unattributed", [[0]]),
        ("surprise", 1),
    ],
)
def test_graphs_whose_fields_do_not_fit_are_refused(detailed: Path, field: str, value: Any) -> None:
    rewrite(detailed, fields=lambda _: {field: value})
    with pytest.raises(FormatError, match=r"graph\.safetensors: not a whole"):
        RouteGraph.load(detailed)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_routes_whose_parts_do_not_fit_together_are_refused(family: str, tmp_path: Path) -> None:
    path = tmp_path / "routes"
    Tracer(tiny_model(family)).trace_all(tiny_text(5), threshold=0.005).save(path)
    whole = path.read_bytes()
    assert len(Routes.load(path)) == 5
    edits: list[dict[str, Any]] = []
    for name in tensor_names(path):
        edits += [
            {name: lambda x: x[:-1]},
            {name: lambda x: x[..., None]},
            {name: torch.Tensor.int},
        ]
        column = name.partition(".")[2]
        if column in ("row", "source"):
            edits += [{name: put(-1, 5)}, {name: put(-1, -1)}]
        elif column in ("weight", "head_weight", "residual", "ffn", "ffn_residual"):
            edits += [{name: put(0, -0.5)}, {name: put(0, float("inf"))}]
    edges = [f"1.{name}" for name in EdgeList._fields]
    edits += [
        {"1.head_weight": lambda x: x[:, :-1]},
        {name: (lambda x: torch.cat([x, x])) for name in edges},
        {"1.row": torch.zeros_like, "1.source": lambda x: 1 + torch.zeros_like(x)},
    ]
    for field, value in {
        "parallel": [[], [False], [True] * 3 if family == "llama" else [False] * 3, ["a"] * 4],
        "tokens": [["a"] * 4, [], [1] * 5],
        "threshold": [0.004, 2, None],
        "scored_threshold": [0.2, -1, "0"],
        "granularity": ["both"],
        "predictions": [[], [[["a", 1]]] * 5, [[]] * 4, [[["a", 1, "x"]]] * 5],
    }.items():
        edits += [{"fields": lambda _, change={field: of}: change} for of in value]
    accepted = []
    for edit in edits:
        rewrite(path, **edit)
        try:
            Routes.load(path)
            accepted.append(edit)
        except FormatError:
            pass
        path.write_bytes(whole)
    assert accepted == []


@pytest.mark.parametrize("failure", ["disk full", "interrupted"])
def test_a_failed_save_leaves_the_file_that_was_there(
    saved: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    before = saved.read_bytes()
    graph = RouteGraph.load(saved)

    def partly(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of it")
        if failure == "interrupted":
            raise KeyboardInterrupt
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ifr_fast.storage, "save_file", partly)
    if failure == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            graph.save(saved)
    else:
        with pytest.raises(IfrError, match=r"graph\.safetensors.*No space left on device"):
            graph.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_paths_that_cannot_be_written_to_are_named(saved: Path, tmp_path: Path) -> None:
    graph = RouteGraph.load(saved)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "graph", saved / "graph", tmp_path / "folder"):
        with pytest.raises(IfrError, match=path.name):
            graph.save(path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder", saved.name]


# Routes


@pytest.mark.parametrize("threshold", [0.01, 0.04, 0.3])
def test_routes_are_the_graphs_of_every_position(
    tracer: Tracer, granularity: str, threshold: float
) -> None:
    recording = tracer.record(tiny_text(12))
    routes = tracer.trace_all(recording, threshold=0.01, granularity=granularity).at(threshold)
    assert len(routes) == 12
    for t, graph in enumerate(routes):
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
    granularity: str,
    threshold: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    T = 12
    routes = tracer.trace_all(tiny_text(T), threshold=0.02, granularity=granularity)
    routes = routes.at(threshold)
    frequency = torch.zeros(routes.n_layers, routes.n_heads)
    for t in range(T):
        graph = routes[t]
        # A head is in a graph when one of its edges exceeds the threshold by itself.
        alone = graph.head_edges.weight > threshold
        for layer, head in set(
            zip(
                graph.head_edges.layer[alone].tolist(),
                graph.head_edges.head[alone].tolist(),
                strict=True,
            )
        ):
            frequency[layer, head] += 1
        torch.testing.assert_close(
            routes.head_importance()[t], graph.head_importance(), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(
            routes.ffn_importance()[t], graph.ffn_importance(), atol=1e-6, rtol=0
        )
    assert 0 < float(frequency.mean()) < T
    torch.testing.assert_close(routes.head_frequency(), frequency / T, atol=1e-6, rtol=0)
    for elements in (1, 5 * T):  # predictions walked one by one, and in a ragged last block
        monkeypatch.setattr(ifr_fast.routes.all_positions, "_FLOW_ELEMENTS", elements)
        again = routes.at(threshold)
        torch.testing.assert_close(again.head_frequency(), routes.head_frequency())
        torch.testing.assert_close(again.head_importance(), routes.head_importance())
        torch.testing.assert_close(again.ffn_importance(), routes.ffn_importance())


def test_routes_refuse_what_was_not_scored() -> None:
    routes = Tracer(tiny_model("llama")).trace_all(tiny_text(5), threshold=0.04)
    for threshold in (0.0399, 0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            routes.at(threshold)
    assert routes.at(0.5).at(0.04).threshold == 0.04
    assert_same_bits(routes.at(0.5).at(0.04)[3], routes[3])


def test_routes_are_indexed_as_sequences_are() -> None:
    routes = Tracer(tiny_model("llama")).trace_all(tiny_text(5), threshold=0.04)
    assert [graph.position for graph in routes] == [0, 1, 2, 3, 4]
    assert_same_bits(routes[-1], routes[4])
    assert_same_bits(routes[-5], routes[0])
    for position in (5, -6):
        with pytest.raises(IndexError, match=f"position: expected -5 to 4, got {position}"):
            routes[position]


def test_integers_and_numbers_of_other_libraries() -> None:
    tracer = Tracer(tiny_model("llama"))
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
    assert rows == [1, 1]  # the last position's were formed with the forward pass


def test_results_are_compared_by_identity(tracer: Tracer) -> None:
    """An == of tensors is no bool, and none has a hash by value."""
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


def test_results_are_ordinary_tensors(tracer: Tracer, granularity: str) -> None:
    """Not inference mode's, which autograd refuses and nothing may change in place."""
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


# Text


class StartsWithOne:
    """A tokenizer that puts a special token 1 in front."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1, *map(ord, text)]}


@pytest.mark.parametrize(
    "ids",
    [
        [np.int64(3), np.int64(5)],
        [np.uint8(3), 5],
        np.array([3, 5]),
        np.array([3, 5], dtype=np.uint16),
        np.array([3, 5], dtype=np.int32)[::1],
        np.array([5, 3])[::-1],
        (3, 5),
        [torch.tensor(3), torch.tensor(5)],
        torch.tensor([3, 5], dtype=torch.int16),
    ],
    ids=repr,
)
def test_token_ids_of_other_libraries(ids: Any) -> None:
    encoded = encode(ids, None, None)
    assert encoded.dtype == torch.int64
    assert encoded.tolist() == [3, 5]


@pytest.mark.parametrize(
    "text",
    [
        [3, 5.0],
        [3, np.float32(5)],
        [True, False],
        [np.bool_(True)],
        [3, "5"],
        [3, [5]],
        np.array([3.0, 5.0]),
        np.array([True, False]),
        np.array([[3, 5]]),
        np.array(3),
        np.array(["a", "b"]),
        [1 << 70],
    ],
    ids=repr,
)
def test_what_is_no_text_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"text: (expected|token ids must)"):
        encode(text, None, None)


@pytest.mark.parametrize(
    "text", ["", [], (), np.array([], dtype=np.int64), torch.tensor([]).long()]
)
def test_empty_text_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="text: is empty; expected at least one token"):
        encode(text, StartsWithOne(), None)
    assert encode("a", StartsWithOne(), None).tolist() == [1, 97]


# Unattributed nodes


def test_unattributed_nodes_are_in_the_graph_with_equal_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Y = 1, parts 10 and -9: each is farther from y than 0 is."""
    T, layer, t = 5, 1, 4
    tracer = Tracer(tiny_model("llama"))
    H = tracer.decoder.n_heads
    recording = tracer.record(tiny_text(T), mode="full")
    # The closure check would see the change, rightly.
    skip_closure_check(monkeypatch)

    def edit(x: torch.Tensor, value: float) -> torch.Tensor:
        x = x.clone()
        x[t] = value
        return x

    # post of layer 1: resid_mid 10, FFN -9. mid of layer 0: the same, as small as not to show in
    # its post: resid_pre 0.01 in 0.001, all of attention 0.
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
    tracer = Tracer(tiny_model("gpt_neox"))
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


# Any graph at all


@st.composite
def any_routes(draw: st.DrawFn) -> Routes:
    """Routes whose weights are sixteenths, so that some meet a threshold exactly."""
    T, L, H = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))

    def sixteenths(*shape: int) -> torch.Tensor:
        return torch.randint(0, 9, shape, generator=generator) / 16

    layers = []
    for _ in range(L):
        parallel = draw(st.booleans())
        row, source = torch.ones(T, T).tril().nonzero(as_tuple=True)
        head_weight = sixteenths(len(row), H) * sixteenths(len(row), 1)
        # An entry of weight 0 is padding, wherever it points.
        padding = torch.zeros(2, dtype=torch.int64)
        edges = EdgeList(
            torch.cat([row, padding]),
            torch.cat([source, padding + T - 1]),
            torch.cat([head_weight.sum(-1), torch.zeros(2)]),
            torch.cat([head_weight, torch.zeros(2, H)]),
        )
        layers.append(
            LayerTable(
                torch.arange(T),
                sixteenths(T),
                sixteenths(T),
                None if parallel else sixteenths(T),
                edges,
                torch.randint(2, (T,), generator=generator).bool(),
                None if parallel else torch.randint(2, (T,), generator=generator).bool(),
            )
        )
    return Routes(
        tokens=[f"<{t}>" for t in range(T)],
        token_ids=torch.arange(T),
        threshold=0.0,
        granularity=draw(st.sampled_from(GRANULARITIES)),
        layers=layers,
        predict=lambda positions: [[Prediction("x", t, 0.5)] for t in positions],
        scored_threshold=0.0,
    )


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
        tokens, heads, ffn = brute_importances(graph)
        close = {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(graph.token_importance().double(), tokens, **close)
        torch.testing.assert_close(graph.head_importance().double(), heads, **close)
        torch.testing.assert_close(graph.ffn_importance().double(), ffn, **close)
        torch.testing.assert_close(at_low.head_importance()[t].double(), heads, **close)
        torch.testing.assert_close(at_low.ffn_importance()[t].double(), ffn, **close)
        every = sorted((weight for weight, _ in paths(graph)), reverse=True)[:3]
        assert [path.weight for path in graph.top_paths(3)] == pytest.approx(every, rel=1e-12)
        alone = {
            (layer, head)
            for layer, head, _, _, weight in zip(
                *(c.tolist() for c in graph.head_edges), strict=True
            )
            if weight > low
        }
        for layer, head in alone:
            frequency[layer, head] += 1
        # A node is unattributed if it is in the graph and its layer's scores say so.
        nodes = {node for _, _, node in walk(graph)}
        for node in graph.unattributed:
            assert (node.layer, node.kind.value, node.position) in nodes
    torch.testing.assert_close(at_low.head_frequency(), frequency / T)
