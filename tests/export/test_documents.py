"""GraphML and DOT say what the graph says, whatever tokens hold."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections import Counter

import networkx as nx
import pytest
from exported import Edges, edges_of, keyed, named
from hostile import HOSTILE, N_TOKENS, trace

from ifr_fast.routes.route_graph import RouteGraph


@pytest.fixture
def graph(any_graph: RouteGraph) -> RouteGraph:
    return any_graph


def test_graphml_reads_back_in_networkx(graph: RouteGraph) -> None:
    text = graph.to_graphml()
    read = nx.read_graphml(io.BytesIO(text.encode("utf-8")), force_multigraph=True)
    mine = keyed(graph.to_networkx())
    assert edges_of(read) == edges_of(mine, named)
    assert set(read.nodes) == {named(node) for node in mine.nodes}
    importance = graph.token_importance()
    for node, data in read.nodes(data=True):
        kind, layer, position = node.rsplit("_", 2)
        assert (data["kind"], data["layer"], data["position"]) == (kind, int(layer), int(position))
        assert data["token_id"] == int(graph.token_ids[int(position)])
        if kind == "embed":
            assert data["flow"] == pytest.approx(float(importance[int(position)]), abs=1e-6)
    by_ends = {
        (named(u), named(v)): d["heads"] for u, v, d in mine.edges(data=True) if "heads" in d
    }
    for u, v, data in read.edges(data=True):
        if data["kind"] == "attention":
            heads = {int(head): weight for head, weight in json.loads(data["heads"]).items()}
            assert heads == by_ends[u, v]
    assert json.loads(read.graph["tokens"]) == graph.tokens
    starts = {
        int(position): weight for position, weight in json.loads(read.graph["starts"]).items()
    }
    assert starts == graph.starts
    assert read.graph["threshold"] == graph.threshold


def test_graphml_keeps_every_character_that_xml_can_hold() -> None:
    graph = dataclasses.replace(trace(False, threshold=0.0), tokens=HOSTILE)
    read = nx.read_graphml(io.BytesIO(graph.to_graphml().encode("utf-8")), force_multigraph=True)
    assert {data["position"] for _, data in read.nodes(data=True)} == set(range(N_TOKENS))
    for _, data in read.nodes(data=True):
        token = HOSTILE[data["position"]]
        # networkx drops an empty string; "\x00" and a lone surrogate are no XML characters
        assert data.get("token", "") == re.sub("[\x00\ud800]", "\ufffd", token)


def test_dot_holds_the_same_graph(graph: RouteGraph) -> None:
    text = graph.to_dot()
    assert all(char.isprintable() or char == "\n" for char in text)
    lines = text.splitlines()
    string = r'"(?:[^"\\]|\\.)*"'
    attribute = rf"\w+=(?:{string}|[\w.#-]+)"
    list_ = rf"\[{attribute}(?:, {attribute})*\]"
    found: Edges = Counter()
    nodes: dict[str, str] = {}
    for line in lines[3:-1]:
        edge = re.fullmatch(rf"  (\w+) -> (\w+) ({list_});", line)
        if edge:
            values = dict(re.findall(rf"(\w+)=({string}|[\w.#-]+)", edge[3]))
            found[edge[1], edge[2], values["kind"], float(values["importance"])] += 1
            assert ("heads" in values) == (values["kind"] == "attention")
            continue
        row = re.fullmatch(rf"  {{ rank=same; ((?:\w+ {list_}; ?)+)}}", line)
        assert row, line
        nodes |= dict(re.findall(rf"(\w+) ({list_});", row[1]))
    mine = keyed(graph.to_networkx())
    assert found == edges_of(mine, named)
    assert set(nodes) == {named(node) for node in mine.nodes}
    labelled = {name for name, attributes in nodes.items() if "label=" in attributes}
    tops = {f"post_{graph.n_layers - 1}_{position}" for position in graph.starts}
    assert labelled == {name for name in nodes if name.startswith("embed")} | tops
