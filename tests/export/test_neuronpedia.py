"""Attribution graphs (Neuronpedia) hold the graph."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import networkx as nx
import pytest
from exported import edges_of, keyed
from hostile import trace

from ifr_fast.errors import FormatError, IfrError
from ifr_fast.routes.route_graph import RouteGraph

# What Neuronpedia's published schema (apps/webapp/app/api/graph/graph-schema.json, version 1.0.0)
# requires, and the types that it names; and the fields that circuit-tracer's own nodes have.
SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "required": ["metadata", "qParams", "nodes", "links"],
    "properties": {
        "metadata": {
            "type": "object",
            "required": ["slug", "scan", "prompt_tokens", "prompt", "transcoder_list"],
            "properties": {
                "slug": {"type": "string"},
                "scan": {"type": "string"},
                "prompt_tokens": {"type": "array", "items": {"type": "string"}},
                "prompt": {"type": "string"},
                "transcoder_list": {"type": "array", "items": {"type": "string"}},
                "schema_version": {"type": "integer"},
                "node_threshold": {"type": "number"},
                "info": {
                    "type": "object",
                    "properties": {
                        "description": {"type": "string"},
                        "generator": {
                            "type": "object",
                            "properties": {
                                "name": {"type": "string"},
                                "version": {"type": "string"},
                            },
                        },
                    },
                },
                "generation_settings": {"type": "object"},
            },
        },
        "qParams": {
            "type": "object",
            "required": ["pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"],
            "properties": {
                "pinnedIds": {"type": "array", "items": {"type": "string"}},
                "supernodes": {"type": "array"},
                "linkType": {"type": "string"},
                "clickedId": {"type": "string"},
                "sg_pos": {"type": "string"},
            },
        },
        "nodes": {
            "type": "array",
            "items": {
                "type": "object",
                "required": [
                    "node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp",
                    "influence", "activation", "token_prob", "is_target_logit", "run_idx",
                    "reverse_ctx_idx",
                ],
                "properties": {
                    "node_id": {"type": "string"},
                    "feature": {"type": "integer"},
                    "layer": {"type": "string"},
                    "ctx_idx": {"type": "integer"},
                    "feature_type": {"type": "string"},
                    "jsNodeId": {"type": "string"},
                    "clerp": {"type": "string"},
                    "influence": {"type": ["number", "null"]},
                    "activation": {"type": ["number", "null"]},
                    "token_prob": {"type": "number"},
                    "is_target_logit": {"type": "boolean"},
                },
            },
        },
        "links": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["source", "target", "weight"],
                "properties": {
                    "source": {"type": "string"},
                    "target": {"type": "string"},
                    "weight": {"type": "number"},
                },
            },
        },
    },
}  # fmt: skip


@pytest.fixture
def graph(any_graph: RouteGraph) -> RouteGraph:
    return any_graph


def from_json(document: dict[str, Any]) -> nx.DiGraph:
    """An independent reader: the nodes and links as they stand."""
    read = nx.DiGraph()
    read.add_nodes_from((node["node_id"], node) for node in document["nodes"])
    assert len(read) == len(document["nodes"])
    for link in document["links"]:
        assert link["source"] in read
        assert link["target"] in read
        assert not read.has_edge(link["source"], link["target"])
        read.add_edge(link["source"], link["target"], **link)
    return read


def node_id(graph: RouteGraph, node: tuple[str, int, int]) -> str:
    kind, layer, position = node
    if kind == "embed":
        return f"E_{int(graph.token_ids[position])}_{position}"
    return f"{layer}_{['mid', 'ffn', 'post'].index(kind)}_{position}"


def test_attribution_graph_is_valid_and_equals_the_graph(graph: RouteGraph) -> None:
    text = graph.to_neuronpedia(slug="a-graph", scan="tiny")
    assert text.isascii()
    document = json.loads(text)
    jsonschema.validate(document, SCHEMA)
    assert document["metadata"]["slug"] == "a-graph"
    assert document["metadata"]["scan"] == "tiny"
    assert document["metadata"]["prompt_tokens"] == graph.tokens
    assert document["metadata"]["prompt"] == "".join(graph.tokens)
    read, mine = from_json(document), keyed(graph.to_networkx())
    logits = {name for name, node in read.nodes(data=True) if node["feature_type"] == "logit"}
    into_logits = {
        node["ctx_idx"]: read.edges[edge]["weight"]
        for name, node in read.nodes(data=True)
        for edge in read.in_edges(name)
        if name in logits
    }
    assert into_logits == graph.starts
    read.remove_nodes_from(logits)

    # Edge by edge, kinds told apart.
    found = Counter(
        (u, v, kind, weight)
        for u, v, data in read.edges(data=True)
        for kind, weight in data["kinds"].items()
    )
    assert found == edges_of(mine, lambda node: node_id(graph, node))
    assert set(read) == {node_id(graph, node) for node in mine}
    # And as the simple graph that the format is.
    for _, _, data in read.edges(data=True):
        assert data["weight"] == pytest.approx(sum(data["kinds"].values()))


def test_influence_is_the_share_of_flow_of_all_stronger_nodes(graph: RouteGraph) -> None:
    nodes = [n for n in json.loads(graph.to_neuronpedia())["nodes"] if n["influence"] is not None]
    total = sum(node["flow"] for node in nodes)
    strongest_first = sorted(nodes, key=lambda node: node["influence"])
    so_far = 0.0
    for before, node in zip([None, *strongest_first], strongest_first, strict=False):
        assert before is None or before["flow"] >= node["flow"] - 1e-12
        so_far += node["flow"]
        assert node["influence"] == pytest.approx(so_far / total, abs=1e-9)
    tokens = {n["ctx_idx"]: n["flow"] for n in nodes if n["feature_type"] == "embedding"}
    for position, flow in tokens.items():
        assert flow == pytest.approx(float(graph.token_importance()[position]), abs=1e-6)


@pytest.mark.parametrize("cap", [1, 40, 100_000])
def test_the_slider_of_the_viewer_begins_with_the_whole_graph(graph: RouteGraph, cap: int) -> None:
    document = json.loads(graph.to_neuronpedia(max_links=cap))
    influences = [n["influence"] for n in document["nodes"] if n["influence"] is not None]
    assert document["metadata"]["node_threshold"] == 1.0
    assert max(influences) <= 1.0
    assert max(influences) == pytest.approx(1.0)


def test_a_folder_that_the_viewer_serves(graph: RouteGraph, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "graphs"
    for slug in ("a", "b.2", "a"):
        path = graph.save_neuronpedia(folder, slug=slug, scan="tiny", max_links=40)
        assert path == folder / f"{slug}.json"
        assert path.read_text() == graph.to_neuronpedia(slug=slug, scan="tiny", max_links=40)
        jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    listed = json.loads((folder / "graph-metadata.json").read_text())
    assert list(listed) == ["graphs"]
    assert [x["slug"] for x in listed["graphs"]] == ["b.2", "a"]
    for metadata in listed["graphs"]:
        jsonschema.validate(metadata, SCHEMA["properties"]["metadata"])  # type: ignore[index]
        document = json.loads((folder / f"{metadata['slug']}.json").read_text())
        assert document["metadata"] == metadata
    other = {"slug": "others", "by": "another tool"}
    (folder / "graph-metadata.json").write_text(json.dumps({"graphs": [other]}))
    path = graph.save_neuronpedia(folder)
    listed = json.loads((folder / "graph-metadata.json").read_text())["graphs"]
    assert listed == [other, json.loads(path.read_text())["metadata"]]


def test_a_folder_is_left_as_it_is_where_its_list_or_the_slug_is_wrong(tmp_path: Path) -> None:
    graph = trace(False, n_tokens=1, n_layers=1)
    for slug in ("../a", "", ".a", "a/b", "a b", "graph-metadata", "a\n", "é"):
        with pytest.raises(ValueError, match="slug: expected letters, digits"):
            graph.save_neuronpedia(tmp_path / "graphs", slug=slug)
    assert list(tmp_path.iterdir()) == []
    for damaged in ("", "[]", "{}", '{"graphs": {}}', '{"graphs": [1]}', "[" * 100_000):
        (tmp_path / "graph-metadata.json").write_text(damaged)
        with pytest.raises(FormatError, match="not a list of graphs"):
            graph.save_neuronpedia(tmp_path, slug="a")
    assert [path.name for path in tmp_path.iterdir()] == ["graph-metadata.json"]
    with pytest.raises(IfrError, match="cannot be written"):
        graph.save_neuronpedia(tmp_path / "graph-metadata.json" / "x", slug="a")


@pytest.mark.parametrize("cap", [1, 7, 40, 100_000])
def test_the_cap_keeps_the_strongest_and_leaves_nothing_in_the_air(
    graph: RouteGraph, cap: int
) -> None:
    whole = from_json(json.loads(graph.to_neuronpedia()))
    document = json.loads(graph.to_neuronpedia(max_links=cap))
    jsonschema.validate(document, SCHEMA)
    read = from_json(document)
    assert read.number_of_edges() == min(cap, whole.number_of_edges())
    assert all(degree > 0 for _, degree in read.degree)
    logits = {name for name, node in read.nodes(data=True) if node["feature_type"] == "logit"}
    assert set(read) == logits.union(*(nx.ancestors(read, name) for name in logits))

    def through(ends: tuple[str, str]) -> float:
        flow = whole.nodes[ends[1]].get("flow", 1.0)
        return flow * whole.edges[ends]["weight"]

    last = document["links"][-1]
    weakest = through((last["source"], last["target"]))
    left_out = [
        e for e in whole.edges if e[1] in read and e[1] != last["source"] and e not in read.edges
    ]
    assert all(through(ends) <= weakest + 1e-12 for ends in left_out)


def test_attribution_graph_without_predictions_and_names_by_default() -> None:
    graph = dataclasses.replace(trace(False, n_tokens=1, n_layers=1), predictions=[])
    document = json.loads(graph.to_neuronpedia())
    jsonschema.validate(document, SCHEMA)
    assert document["metadata"]["scan"] == "unknown"
    assert re.fullmatch("[a-z0-9-]+", document["metadata"]["slug"])
    with pytest.raises(ValueError, match="max_links: expected at least 1, got 0"):
        graph.to_neuronpedia(max_links=0)
    for name in ("slug", "scan"):
        with pytest.raises(ValueError, match=f"{name}: expected a string, got 3"):
            graph.to_neuronpedia(**{name: 3})  # type: ignore[arg-type]
