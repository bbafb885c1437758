"""JSON and networkx graphs say what the graph says."""

from __future__ import annotations

import builtins
import dataclasses
import json
from typing import Any

import pytest
import torch
from exported import edges_of, keyed, written
from hostile import HOSTILE, trace

from ifr_fast.errors import IfrError
from ifr_fast.graph.tables import EdgeKind, Node, NodeKind, Prediction
from ifr_fast.routes.route_graph import RouteGraph


def test_json_reproduces_the_tables(graph: RouteGraph) -> None:
    document = json.loads(graph.to_json())
    names = {kind.name.lower(): int(kind) for kind in EdgeKind}
    document["edges"]["kind"] = [names[name] for name in document["edges"]["kind"]]
    for name in ("edges", "head_edges"):
        table = getattr(graph, name)
        assert list(document[name]) == list(table._fields)
        for field, column in table._asdict().items():
            assert torch.equal(torch.tensor(document[name][field], dtype=column.dtype), column)
    for name in ("tokens", "position", "threshold", "granularity", "n_layers", "n_heads"):
        assert document[name] == getattr(graph, name)
    assert document["token_ids"] == graph.token_ids.tolist()
    assert document["parallel"] == graph.parallel.tolist()
    assert [Prediction(**p) for p in document["predictions"]] == graph.predictions
    assert document["token_importance"] == graph.token_importance().tolist()
    assert document["format"] == "ifr_fast.route_graph.json"
    assert document["version"] == 2
    assert document["span"] is None


def test_json_of_hostile_tokens_is_ascii_and_reads_back(hostile: RouteGraph) -> None:
    text = hostile.to_json()
    assert text.isascii()
    document = json.loads(text)
    assert document["tokens"] == HOSTILE
    assert [Node(**n) for n in document["unattributed"]] == hostile.unattributed


def test_json_refuses_what_is_not_finite(hostile: RouteGraph) -> None:
    weight = hostile.edges.weight.clone()
    weight[0] = float("nan")
    broken = dataclasses.replace(hostile, edges=hostile.edges._replace(weight=weight))
    with pytest.raises(ValueError, match="JSON compliant"):
        broken.to_json()


def test_networkx_paths_sum_to_token_importance(parallel: bool) -> None:
    nx = pytest.importorskip("networkx")
    graph = trace(parallel, n_layers=2, n_tokens=6, threshold=0.05)
    exported = keyed(graph.to_networkx())
    top = ("post", graph.n_layers - 1, graph.position)
    importance = torch.zeros(6, dtype=torch.float64)
    for node in [n for n in exported if n[0] == "embed"]:
        for path in nx.all_simple_edge_paths(exported, node, top):
            product = 1.0
            for edge in path:
                product *= exported.edges[edge]["weight"]
            importance[node[2]] += product
    assert (importance > 0).sum() > 1
    torch.testing.assert_close(importance.float(), graph.token_importance(), rtol=1e-5, atol=1e-8)


def test_networkx_attributes(graph: RouteGraph) -> None:
    pytest.importorskip("networkx")
    exported = keyed(graph.to_networkx())
    n_ffn = int((graph.edges.kind == EdgeKind.FFN).sum())
    assert exported.number_of_edges() == len(graph.edges.layer) + n_ffn
    for (kind, layer, position), data in exported.nodes(data=True):
        token = graph.tokens[position]
        number = int(graph.token_ids[position])
        own = {"token": token, "token_id": number, "kind": kind}
        assert data == {**own, "layer": layer, "position": position}
    kinds = {"embed", "ffn", "post"} if bool(graph.parallel[0]) else {k.value for k in NodeKind}
    assert {node[0] for node in exported} == kinds
    heads = 0
    for source, target, data in exported.edges(data=True):
        height = {"embed": 0, "mid": 1, "ffn": 2, "post": 3}
        assert (source[1], height[source[0]]) < (target[1], height[target[0]])
        assert ("heads" in data) == (data["kind"] == "attention")
        if data["kind"] == "attention":
            assert sum(data["heads"].values()) == pytest.approx(data["weight"], rel=1e-5)
            heads += len(data["heads"])
    assert heads == len(graph.head_edges.layer)
    assert exported.graph["threshold"] == graph.threshold
    assert json.loads(exported.graph["tokens"]) == graph.tokens


@pytest.mark.parametrize("form", ["graphml", "gml"])
def test_networkx_writes_the_graph(any_graph: RouteGraph, form: str) -> None:
    mine = any_graph.to_networkx()
    read = written(mine, form)
    assert set(read) == set(mine)
    assert edges_of(read) == edges_of(mine)
    heads = {(u, v): d["heads"] for u, v, d in mine.edges(data=True) if "heads" in d}
    assert {(u, v): d["heads"] for u, v, d in read.edges(data=True) if "heads" in d} == heads
    for name, data in mine.nodes(data=True):
        # XML readers make one line end of each, and networkx drops an empty string.
        expected = data["token"].replace("\r", "\n") if form == "graphml" else data["token"]
        assert read.nodes[name].get("token", "") == expected
        assert read.nodes[name]["token_id"] == data["token_id"]
    assert json.loads(read.graph["starts"]) == {str(t): x for t, x in any_graph.starts.items()}
    assert json.loads(read.graph["tokens"]) == any_graph.tokens


def test_a_missing_extra_is_named(hostile: RouteGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        level = args[3] if len(args) > 3 else kwargs.get("level", 0)
        if level == 0 and name.split(".")[0] in ("matplotlib", "networkx"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(IfrError, match=r"pip install 'ifr-fast\[plot\]'"):
        hostile.plot()
    with pytest.raises(IfrError, match=r"pip install 'ifr-fast\[networkx\]'"):
        hostile.to_networkx()
