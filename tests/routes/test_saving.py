"""Graphs and routes in files: bit for bit, whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from opened import tiny_tracer
from rewritten import put, rewrite, tensor_names
from safetensors.torch import save_file
from same_graph import assert_same_bits
from tiny import tiny_text

import ifr_fast.storage.tensors
from ifr_fast import FormatError, IfrError, RouteGraph, Routes, Tracer
from ifr_fast.graph.tables import Granularity, Node, NodeKind, Prediction

HOSTILE = ["\ud800", "\ufffd", "\x00", "\u202eעברית", "日本語🎉", "</script>", ""]


@cache
def graph_to_save() -> RouteGraph:
    return tiny_tracer("llama").trace(tiny_text(20), threshold=0.05)


@cache
def routes_to_save() -> Routes:
    return tiny_tracer("llama").trace_all(tiny_text(3), threshold=0.1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "graph.safetensors"
    graph_to_save().save(path)
    return path


def test_a_graph_comes_back_bit_for_bit(
    tracer: Tracer, granularity: Granularity, tmp_path: Path
) -> None:
    path = tmp_path / "graph.safetensors"
    graph = tracer.trace(tiny_text(20), position=-3, threshold=0.02, granularity=granularity)
    graph.save(path)
    assert_same_bits(RouteGraph.load(path), graph)
    assert [p.name for p in tmp_path.iterdir()] == ["graph.safetensors"]
    assert_same_bits(RouteGraph.load(str(path)), graph)


def test_hostile_tokens_and_unattributed_nodes_come_back(tmp_path: Path) -> None:
    graph = tiny_tracer("llama").trace(tiny_text(len(HOSTILE)), threshold=0.1)
    graph = dataclasses.replace(
        graph,
        tokens=HOSTILE,
        predictions=[Prediction(token, i, 0.1) for i, token in enumerate(HOSTILE)],
        unattributed=[Node(0, NodeKind.MID, 1), Node(2, NodeKind.POST, 6)],
    )
    graph.save(tmp_path / "graph")
    assert_same_bits(RouteGraph.load(tmp_path / "graph"), graph)


def test_a_graph_without_edges_comes_back(tmp_path: Path) -> None:
    graph = tiny_tracer("llama").trace(tiny_text(1), threshold=1.0)
    assert len(graph.edges.layer) == 0
    graph.save(tmp_path / "graph")
    assert_same_bits(RouteGraph.load(tmp_path / "graph"), graph)


def test_routes_come_back_bit_for_bit(
    tracer: Tracer, granularity: Granularity, tmp_path: Path
) -> None:
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
    with pytest.raises(
        FormatError, match=f"expected a file of format '{kind._FORMAT.name}', got None"
    ):
        kind.load(path)


def test_each_kind_refuses_the_other(saved: Path) -> None:
    with pytest.raises(FormatError, match=r"'ifr_fast.routes', got 'ifr_fast.route_graph'"):
        Routes.load(saved)


def test_other_versions_are_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for other, words in ((1, "version 3.*version 1"), (4, "version 3.*version 4")):
        read = RouteGraph._FORMAT._replace(version=other, oldest=other)
        monkeypatch.setattr(RouteGraph, "_FORMAT", read)
        with pytest.raises(FormatError, match=words):
            RouteGraph.load(saved)
    monkeypatch.setattr(RouteGraph, "_FORMAT", read._replace(oldest=1))
    RouteGraph.load(saved)


def test_files_without_one_of_their_tensors_are_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    names = tensor_names(saved)
    assert len(names) == 5 + 5 + 2
    for name in names:
        rewrite(saved, drop=name)
        with pytest.raises(FormatError, match="not a whole"):
            RouteGraph.load(saved)
        saved.write_bytes(whole)


@pytest.mark.parametrize("fields", [None, [], {}, "text", {"n_layers": 3}, {"n_layers": "x"}])
def test_files_with_other_fields_are_refused(saved: Path, tmp_path: Path, fields: Any) -> None:
    rewrite(saved, fields=fields)
    with pytest.raises(FormatError, match="not a whole"):
        RouteGraph.load(saved)
    routes = tmp_path / "routes"
    routes_to_save().save(routes)
    rewrite(routes, fields=fields)
    with pytest.raises(FormatError, match="not a whole"):
        Routes.load(routes)


ABOVE_ONE = 1 + 2**-23  # in float32, what rounding made of a sum of 1 in older versions


def test_weights_that_rounding_put_above_one_are_one(saved: Path, tmp_path: Path) -> None:
    rewrite(saved, **{name: put(0, ABOVE_ONE) for name in ("edges.weight", "head_edges.weight")})
    graph = RouteGraph.load(saved)
    assert graph.edges.weight[0] == graph.head_edges.weight[0] == 1
    expected = graph_to_save()
    assert torch.equal(graph.edges.weight[1:], expected.edges.weight[1:])
    if importlib.util.find_spec("matplotlib"):
        graph.plot().savefig(tmp_path / "graph.png", dpi=20)

    routes = tmp_path / "routes"
    routes_to_save().save(routes)
    columns = ("residual", "ffn", "ffn_residual", "weight", "head_weight")
    rewrite(routes, **{f"1.{name}": put(0, ABOVE_ONE) for name in columns})
    table = Routes.load(routes).layers[1]
    own = (table.residual, table.ffn, table.ffn_residual)
    for x in (*own, table.edges.weight, table.edges.head_weight):
        assert x is not None
        assert x.flatten()[0] == x.max() == 1

    folder, text = tmp_path / "layers", tiny_text(3)
    tiny_tracer("llama").trace_all(text, threshold=0.1, checkpoint=folder)
    rewrite(folder / "layer-000.safetensors", ffn=put(0, ABOVE_ONE))
    resumed = tiny_tracer("llama").trace_all(text, threshold=0.1, checkpoint=folder)
    assert resumed.layers[0].ffn[0] == 1


@pytest.mark.parametrize("value", [1.01, float("inf"), float("nan"), -0.1])
def test_other_weights_are_refused(saved: Path, tmp_path: Path, value: float) -> None:
    rewrite(saved, **{"edges.weight": put(0, value)})
    with pytest.raises(FormatError, match=r"edges.weight: expected numbers from 0 to 1"):
        RouteGraph.load(saved)
    routes_to_save().save(tmp_path / "routes")
    rewrite(tmp_path / "routes", **{"0.ffn": put(0, value)})
    with pytest.raises(FormatError, match=r"0.ffn: expected numbers from 0 to 1"):
        Routes.load(tmp_path / "routes")


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

    monkeypatch.setattr(ifr_fast.storage.tensors, "save_file", partly)
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
