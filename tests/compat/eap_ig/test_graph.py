"""Circuits of a component graph, and its JSON."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from exported import written
from opened import tiny_tracer
from tiny import tiny_text

from ifr_fast.compat.eap_ig import Graph, score_components
from ifr_fast.errors import FormatError

T = 9


@functools.cache
def scored(family: str) -> Graph:
    return score_components(tiny_tracer(family), [tiny_text(T)])


@pytest.fixture(params=["llama", "phi"])
def graph(request: pytest.FixtureRequest) -> Graph:
    return copy.deepcopy(scored(request.param))


def on_paths(graph: nx.MultiDiGraph) -> set[str]:
    return ({"input"} | nx.descendants(graph, "input")) & nx.ancestors(graph, "logits")


@pytest.mark.parametrize("n", [0, 1, 30, 200])
def test_topn_takes_the_best_and_prune_leaves_paths(graph: Graph, n: int) -> None:
    graph.apply_topn(n, prune=False)
    assert graph.count_included_edges() == n
    taken = [edge.score for edge in graph.edges.values() if edge.in_graph]
    left = [edge.score for edge in graph.edges.values() if not edge.in_graph]
    assert min(taken, default=1) >= max(left)
    loose = nx.MultiDiGraph()
    loose.add_nodes_from(["input", "logits"])
    loose.add_edges_from((e.parent, e.child, e.name) for e in graph.edges.values() if e.in_graph)
    graph.prune()
    expected = on_paths(loose)
    names = graph.sources
    kept = {names[i] for i in graph.nodes_in_graph.nonzero().squeeze(1).tolist()}
    assert kept == expected
    circuit = graph.to_networkx()
    for form in ("graphml", "gml"):
        assert set(written(circuit, form).edges(keys=True)) == set(circuit.edges(keys=True))
    ends = expected | {"logits"}
    assert {key for *_, key in loose.edges(keys=True)} >= {
        edge.name for edge in graph.edges.values() if edge.in_graph
    }
    assert circuit.number_of_edges() == sum(u in ends and v in ends for u, v in loose.edges())
    assert graph.count_included_nodes() == len(kept)


def test_greedy_stays_connected(graph: Graph) -> None:
    for n in (0, 1, 25):
        graph.apply_greedy(n, prune=False)
        assert graph.count_included_edges() == n
        circuit = nx.MultiDiGraph()
        circuit.add_node("logits")
        chosen = [edge for edge in graph.edges.values() if edge.in_graph]
        circuit.add_edges_from((edge.parent, edge.child) for edge in chosen)
        reached = nx.ancestors(circuit, "logits") | {"logits"}
        assert all(edge.child in reached for edge in chosen)
    edges = {name: edge for name, edge in graph.edges.items() if edge.child == "logits"}
    graph.apply_greedy(1, prune=False)
    (first,) = [edge for edge in graph.edges.values() if edge.in_graph]
    assert first.score == max(edge.score for edge in edges.values())


@pytest.mark.parametrize("reset", [False, True])
def test_greedy_begins_with_the_circuit_or_with_nothing(graph: Graph, reset: bool) -> None:
    graph.scores = torch.rand(graph.scores.shape, generator=torch.Generator().manual_seed(0))
    graph.apply_topn(150)
    assert graph.count_included_edges() > 10
    begun = {"logits"} | {e.parent for e in graph.edges.values() if e.in_graph and not reset}
    expected = set() if reset else {name for name, e in graph.edges.items() if e.in_graph}
    taken: set[str] = set()
    for _ in range(30):  # as EAP-IG: always the best edge into the circuit
        open_edges = [e for e in graph.edges.values() if e.child in begun and e.name not in taken]
        best = max(open_edges, key=lambda edge: edge.score)
        taken.add(best.name)
        begun.add(best.parent)
    graph.apply_greedy(30, reset=reset, prune=False)
    assert {name for name, e in graph.edges.items() if e.in_graph} == expected | taken
    assert {name for name, node in graph.nodes.items() if node.in_graph} == begun


def test_threshold(graph: Graph) -> None:
    graph.apply_threshold(0.3, prune=False)
    for edge in graph.edges.values():
        assert edge.in_graph == (edge.score >= 0.3)
    n = int(graph.real_edge_mask.sum())
    with pytest.raises(ValueError, match=f"n: expected at most {n}, got {n + 1}"):
        graph.apply_topn(n + 1)
    with pytest.raises(ValueError, match="level: expected 'edge', got 'node'"):
        graph.apply_topn(1, True, "node")


def test_nodes_can_be_left_alone(graph: Graph) -> None:
    before = graph.nodes_in_graph.clone()
    graph.apply_topn(20, reset=False, prune=False)
    assert torch.equal(graph.nodes_in_graph, before)
    assert graph.nodes["logits"].in_graph
    assert not graph.nodes["m0"].in_graph
    graph.apply_threshold(0.0)
    assert all(node.in_graph for node in graph.nodes.values())


def edge_names(L: int, H: int, parallel: bool) -> Iterator[str]:
    """The names of all edges."""
    written = ["input"]
    for layer in range(L):
        heads = [f"a{layer}.h{head}" for head in range(H)]
        yield from (f"{p}->{h}<{x}>" for p in written for h in heads for x in "qkv")
        yield from (f"{p}->m{layer}" for p in written + ([] if parallel else heads))
        written += [*heads, f"m{layer}"]
    yield from (f"{p}->logits" for p in written)


def test_json_is_what_eap_ig_reads(graph: Graph, tmp_path: Path) -> None:
    graph.apply_topn(120)
    graph.to_json(tmp_path / "graph.json")
    document = json.loads((tmp_path / "graph.json").read_text())
    cfg = document["cfg"]
    assert cfg == {
        "n_layers": 3, "n_heads": 6, "d_model": 36, "parallel_attn_mlp": cfg["parallel_attn_mlp"],
    }  # fmt: skip
    assert list(document["nodes"]) == [*graph.sources, "logits"]
    assert document["nodes"]["logits"] == {"in_graph": True}
    names = edge_names(3, 6, cfg["parallel_attn_mlp"])
    assert set(document["edges"]) == set(names)
    assert len(document["edges"]) == int(graph.real_edge_mask.sum())
    for edge in document["edges"].values():
        assert type(edge["score"]) is float
        assert type(edge["in_graph"]) is bool
    # EAP-IG's own matrix has each score in this place.
    L, H = cfg["n_layers"], cfg["n_heads"]
    for name, edge in document["edges"].items():
        parent, child = name.split("->")
        head = re.fullmatch(r"a(\d+)\.h(\d+)<([qkv])>", child)
        if head:
            layer, number = int(head[1]), int(head[2])
            j = layer * (3 * H + 1) + "qkv".index(head[3]) * H + number
        else:
            j = L * (3 * H + 1) if child == "logits" else int(child[1:]) * (3 * H + 1) + 3 * H
        i = graph.sources.index(parent)
        assert edge["score"] == float(graph.scores[i, j])
        assert edge["in_graph"] == bool(graph.in_graph[i, j])


def test_json_round_trip(graph: Graph, tmp_path: Path) -> None:
    graph.apply_greedy(40)
    graph.nodes_scores = torch.rand(graph.n_forward)
    graph.nodes_scores[3] = torch.nan
    path = tmp_path / "graph.json"
    graph.to_json(path)
    read = Graph.from_json(path)
    assert read.cfg == graph.cfg
    for name in ("scores", "in_graph", "nodes_in_graph"):
        assert torch.equal(getattr(read, name), getattr(graph, name))
    assert torch.allclose(read.nodes_scores, graph.nodes_scores, equal_nan=True)
    again = tmp_path / "again.json"
    read.to_json(again)
    assert again.read_bytes() == path.read_bytes()
    graph.nodes_scores = None
    graph.to_json(path)
    assert Graph.from_json(path).nodes_scores is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_json_has_no_number_for(graph: Graph, tmp_path: Path, value: float) -> None:
    path = tmp_path / "graph.json"
    graph.to_json(path)
    document = json.loads(path.read_text())
    before = path.read_bytes()
    graph.scores[0, -1] = value
    with pytest.raises(ValueError, match=r"^scores: expected finite numbers, .* of input->logits$"):
        graph.to_json(path)
    graph.scores[0, -1] = 0
    if not math.isnan(value):  # a node without a score has NaN, and none in the file
        graph.nodes_scores = torch.full((graph.n_forward,), value)
        with pytest.raises(ValueError, match=r"^scores: expected finite numbers, .* of input$"):
            graph.to_json(path)
    assert path.read_bytes() == before
    document["edges"]["input->logits"]["score"] = value
    path.write_text(json.dumps(document))
    with pytest.raises(FormatError, match="input->logits has a score of"):
        Graph.from_json(path)


def test_files_that_are_no_component_graph(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    good = copy.deepcopy(scored("llama"))
    good.to_json(path)
    document = json.loads(path.read_text())

    def broken(change: Any) -> None:
        other = copy.deepcopy(document)
        change(other)
        path.write_text(json.dumps(other))
        with pytest.raises(FormatError, match=r"graph\.json: not a component graph"):
            Graph.from_json(path)

    broken(lambda d: d.pop("cfg"))
    broken(lambda d: d["cfg"].update(n_layers="3"))
    broken(lambda d: d["cfg"].update(n_layers=2))
    broken(lambda d: d["cfg"].update(parallel_attn_mlp=True))
    broken(lambda d: d["nodes"].pop("m0"))
    broken(lambda d: d["nodes"]["m0"].update(in_graph=1))
    broken(lambda d: d["nodes"]["m0"].update(neurons=[True] * 36))
    broken(lambda d: d["edges"].pop("input->m0"))
    broken(lambda d: d["edges"].update({"m2->m0": {"score": 0.0, "in_graph": False}}))
    broken(lambda d: d["edges"]["input->m0"].update(score="much"))
    path.write_text("[1, 2")
    with pytest.raises(FormatError, match="not a component graph"):
        Graph.from_json(path)
    with pytest.raises(FormatError, match="no such file"):
        Graph.from_json(tmp_path / "none.json")
