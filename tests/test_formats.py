"""GraphML, DOT, tables and attribution graphs say what the graph says, whatever tokens hold."""

from __future__ import annotations

import builtins
import dataclasses
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import networkx as nx
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hostile import HOSTILE, N_TOKENS, VOCABULARY, trace, tracer

from ifr_fast.errors import IfrError
from ifr_fast.export.tables import check_parquet
from ifr_fast.graph import EdgeKind, RouteGraph

# What Neuronpedia's published schema (apps/webapp/app/api/graph/graph-schema.json, version 1.0.0)
# requires, and the types that it names; and the fields that circuit-tracer's own nodes have.
SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "required": ["metadata", "qParams", "nodes", "links"],
    "properties": {
        "metadata": {
            "type": "object",
            "required": ["slug", "scan", "prompt_tokens", "prompt"],
            "properties": {
                "slug": {"type": "string"},
                "scan": {"type": "string"},
                "prompt_tokens": {"type": "array", "items": {"type": "string"}},
                "prompt": {"type": "string"},
                "transcoder_list": {"type": "array", "items": {"type": "string"}},
                "schema_version": {"type": "integer"},
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

Edges = Counter[tuple[Any, Any, str, float]]


@pytest.fixture(scope="module", params=["sequential", "parallel", "span", "hostile"])
def graph(request: pytest.FixtureRequest) -> RouteGraph:
    if request.param == "span":
        ids = torch.randint(VOCABULARY, (N_TOKENS,), generator=torch.Generator().manual_seed(5))
        return tracer(False, 4).trace(
            ids, position=[3, 8, 13], position_weights=[1, 2, 5], threshold=0.01
        )
    found = trace(request.param == "parallel")
    return dataclasses.replace(found, tokens=HOSTILE) if request.param == "hostile" else found


def edges_of(graph: nx.MultiDiGraph, name: Any = lambda node: node) -> Edges:
    return Counter(
        (name(u), name(v), data["kind"], data["weight"]) for u, v, data in graph.edges(data=True)
    )


def named(node: tuple[str, int, int]) -> str:
    return "_".join(map(str, node))


def test_graphml_reads_back_in_networkx(graph: RouteGraph) -> None:
    text = graph.to_graphml()
    read = nx.read_graphml(io.BytesIO(text.encode("utf-8")), force_multigraph=True)
    mine = graph.to_networkx()
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
    mine = graph.to_networkx()
    assert found == edges_of(mine, named)
    assert set(nodes) == {named(node) for node in mine.nodes}
    labelled = {name for name, attributes in nodes.items() if "label=" in attributes}
    tops = {f"post_{graph.n_layers - 1}_{position}" for position in graph.starts}
    assert labelled == {name for name in nodes if name.startswith("embed")} | tops


def test_tables_hold_the_edges(graph: RouteGraph) -> None:
    frame = graph.to_pandas()
    kinds = {kind.name.lower(): int(kind) for kind in EdgeKind}
    for name in ("layer", "target", "source", "weight"):
        assert frame[name].tolist() == getattr(graph.edges, name).tolist()
    assert [kinds[kind] for kind in frame["kind"]] == graph.edges.kind.tolist()
    for end in ("target", "source"):
        assert frame[f"{end}_token"].tolist() == [graph.tokens[i] for i in frame[end]]
    # An independent account of flow: what leaves a node upwards comes back as its importance.
    ffn = frame[frame["kind"] == "ffn"].groupby("layer", observed=True)["flow"].sum()
    for layer, importance in enumerate(graph.ffn_importance().tolist()):
        assert ffn.get(layer, 0.0) == pytest.approx(importance, abs=1e-6)
    bottom = frame[(frame["layer"] == 0) & (frame["kind"] != "ffn")]
    if not bool(graph.parallel[0]):
        bottom = bottom[bottom["kind"] != "residual_post"]
        flow = bottom.groupby("source")["flow"].sum()
        for position, importance in enumerate(graph.token_importance().tolist()):
            assert flow.get(position, 0.0) == pytest.approx(importance, abs=1e-6)


def test_parts_hold_the_whole_graph(graph: RouteGraph) -> None:
    frame = graph.to_pandas("parts")
    attention = frame[frame["kind"] == "attention"]
    assert frame[frame["kind"] != "attention"]["head"].isna().all()
    for name in ("layer", "head", "target", "source", "weight"):
        assert attention[name].tolist() == getattr(graph.head_edges, name).tolist()
    ends = ["layer", "kind", "target", "source"]
    summed = frame.groupby(ends, observed=True)[["weight", "flow"]].sum().reset_index()
    whole = graph.to_pandas()[[*ends, "weight", "flow"]]
    both = whole.merge(summed, on=ends, suffixes=("", "_of_parts"), validate="one_to_one")
    assert len(both) == len(whole)
    for name in ("weight", "flow"):
        assert (both[name] - both[f"{name}_of_parts"]).abs().max() < 1e-5
    importance = attention.groupby(["layer", "head"])["flow"].sum()
    expected = graph.head_importance()
    for layer, head in expected.nonzero().tolist():
        assert importance[layer, head] == pytest.approx(float(expected[layer, head]), abs=1e-6)


@pytest.mark.parametrize("table", ["edges", "parts", "tokens"])
def test_arrow_and_parquet_are_the_same_tables(
    graph: RouteGraph, table: Any, tmp_path: Path
) -> None:
    expected = graph.to_pandas(table)
    path = tmp_path / "graph.parquet"
    graph.to_parquet(path, table)
    assert [p.name for p in tmp_path.iterdir()] == ["graph.parquet"]
    read = pq.read_table(path)
    assert read.equals(graph.to_arrow(table))
    assert read.column_names == list(expected.columns)
    for name in read.column_names:
        values = [None if pd.isna(x) else x for x in expected[name].tolist()]
        if "token" in name and name != "token_id":  # Arrow holds UTF-8
            values = [x.encode(errors="replace").decode() for x in values]
        assert read[name].to_pylist() == values
    said = json.loads(read.schema.metadata[b"ifr_fast.route_graph"])
    assert said["tokens"] == graph.tokens
    assert said["threshold"] == graph.threshold


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
    read, mine = from_json(document), graph.to_networkx()
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


def test_wrong_table_and_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    graph = trace(False)
    with pytest.raises(ValueError, match="table: expected one of edges, parts, tokens, got 'rows'"):
        graph.to_pandas("rows")  # type: ignore[arg-type]
    own = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("pandas", "pyarrow"):
            raise ImportError(name)
        return own(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (
        graph.to_pandas,
        graph.to_arrow,
        lambda: graph.to_parquet(tmp_path / "x"),
        check_parquet,
    ):
        with pytest.raises(IfrError, match=r"pip install 'ifr-fast\[tables\]'"):
            call()
