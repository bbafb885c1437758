"""Component graphs: by hand, against a float64 account of the model, and as the JSON they are."""

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
from tiny import account, tiny_model, tiny_text
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ifr_fast import Tracer
from ifr_fast.compat.eap_ig import Graph, attribute, score_components
from ifr_fast.errors import FormatError
from ifr_fast.recording import RecordingMode

T = 9

# A model of two layers, two heads of two numbers and one neuron a layer, all in whole numbers.
# At the first token a head reads itself alone, so its output is W_O[h] @ v[h]:
#
#   input              ( 1,  1, -1,  1)     rms 1
#   a0.h0              ( 2,  0,  0,  0)
#   a0.h1              ( 0,  0, -4,  0)     resid_mid  (3, 1, -5, 1)    rms 3
#   m0                 (-2,  0, -2,  6)     resid_post (1, 1, -7, 7)    rms 5
#   a1.h0              ( 0,  4,  0,  0)
#   a1.h1              ( 0,  0,  2,  0)     resid_mid  (1, 5, -5, 7)    rms 5
#   m1                 ( 1, -2,  4, -6)     resid_post (2, 3, -1, 1)
#
# |y|_1 - |y - p|_1 of each part, by hand; below 0 it counts as 0.
PROXIMITY = {
    "a0": {"input": 4},  # of y = (1, 1, -1, 1)
    "m0": {"input": 10 - 6, "a0.h0": 10 - 8, "a0.h1": 10 - 6},
    "a1": {"input": 16 - 12, "a0.h0": 16 - 16, "a0.h1": 16 - 12, "m0": 16 - 10},
    "m1": {
        "input": 18 - 14, "a0.h0": 18 - 18, "a0.h1": 18 - 14, "m0": 18 - 12,
        "a1.h0": 18 - 14, "a1.h1": 18 - 20,
    },
    "logits": {
        "input": 7 - 3, "a0.h0": 7 - 5, "a0.h1": 7 - 9, "m0": 7 - 13,
        "a1.h0": 7 - 5, "a1.h1": 7 - 9, "m1": 7 - 18,
    },
}  # fmt: skip


def scores_by_hand() -> dict[str, float]:
    found = {}
    for reader, parts in PROXIMITY.items():
        total = sum(max(p, 0) for p in parts.values())
        inputs = [reader]
        if reader[0] == "a":
            inputs = [f"{reader}.h{head}<{letter}>" for head in (0, 1) for letter in "qkv"]
        for part, proximity in parts.items():
            for name in inputs:
                found[f"{part}->{name}"] = max(proximity, 0) / total
    return found


def by_hand() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=2, hidden_size=4, intermediate_size=1, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
        hidden_act="relu", rms_norm_eps=1e-12, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1 if "norm" in name else 0)
        model.model.embed_tokens.weight.copy_(torch.tensor([[1, 1, -1, 1], [1, -1, 2, 2]]))
        model.lm_head.weight.normal_()
        first, second = model.model.layers
        first.self_attn.v_proj.weight.copy_(torch.eye(4))  # v = (1, 1), (-1, 1)
        first.self_attn.o_proj.weight[0, 0] = 2
        first.self_attn.o_proj.weight[2, 2] = 4
        first.mlp.gate_proj.weight[0, 0] = 1  # of (1, 1/3, -5/3, 1/3)
        first.mlp.up_proj.weight[0, 1] = 3
        first.mlp.down_proj.weight[:, 0] = torch.tensor([-2, 0, -2, 6])
        second.self_attn.v_proj.weight.copy_(5 * torch.eye(4))  # v = (1, 1), (-7, 7)
        second.self_attn.o_proj.weight[1, 0] = 4
        second.self_attn.o_proj.weight[2, 3] = 2 / 7
        second.mlp.gate_proj.weight[0, 1] = 1  # of (1/5, 1, -1, 7/5)
        second.mlp.up_proj.weight[0, 2] = -1
        second.mlp.down_proj.weight[:, 0] = torch.tensor([1, -2, 4, -6])
    return model


def test_scores_of_two_layers_by_hand() -> None:
    tracer = Tracer(by_hand(), None)
    recording = tracer.record([0])
    assert recording.resid_final[0].tolist() == pytest.approx([2, 3, -1, 1])
    graph = score_components(tracer, [[0]])
    expected = scores_by_hand()
    assert set(graph.edges) == set(expected)
    for name, edge in graph.edges.items():
        assert edge.score == pytest.approx(expected[name], abs=1e-6), name


# A float64 account of the model

PARALLEL = {"phi", "gptj"}
FAMILIES = ["llama", "gpt2", "gemma2", "phi", "bloom", "opt", "qwen3_next", "gptj"]


def tokens_part(model: Any, text: Tensor, resid_pre: Tensor) -> Tensor:
    """What the tokens' embeddings alone put into the stream, by the models' own names."""
    model = copy.deepcopy(model).double()
    embedding = model.get_input_embeddings()
    match model.tiny_family:
        case "gpt2" | "opt":
            return embedding(text)
        case "bloom":  # whose norm after the embedding has a bias
            norm = model.transformer.word_embeddings_layernorm
            return norm(embedding(text)) - norm.bias
        case _:
            return resid_pre


@torch.no_grad()
def expected_scores(model: Any, text: Tensor, positions: bool = False) -> dict[str, Tensor]:
    """Of each reader (a0, m0, ...), the mean importance [n] of all that is written before it."""
    layers = account(model, text)
    first = layers[0].resid_pre
    parts = [first if positions else tokens_part(model, text, first)]
    found = {}

    def read(reader: str, y: Tensor) -> None:
        p = torch.stack(parts)  # [n, T, D]
        proximity = (y.abs().sum(-1) - (y - p).abs().sum(-1)).clamp(min=0)
        found[reader] = (proximity / proximity.sum(0)).mean(-1)

    for i, layer in enumerate(layers):
        read(f"a{i}", layer.resid_pre)
        if layer.resid_mid is None:
            read(f"m{i}", layer.resid_pre)
        z = torch.einsum("htj,jhv->htv", layer.pattern, layer.v)
        if layer.gate is not None:
            z = z * layer.gate.transpose(0, 1)
        heads = torch.einsum("htv,hvd->htd", z, layer.W_O)
        parts += list(heads if layer.after is None else heads * layer.after)
        if layer.resid_mid is not None:
            read(f"m{i}", layer.resid_mid)
        parts.append(layer.ffn)
    read("logits", layers[-1].resid_post)
    return found


def assert_scores(graph: Graph, expected: dict[str, Tensor]) -> None:
    seen = torch.zeros_like(graph.in_graph)
    for j, (child, letter) in enumerate(graph.inputs):
        of = expected[child.partition(".")[0]]
        assert (letter is None) == (child[0] != "a")
        assert float((graph.scores[: len(of), j] - of).abs().max()) < 1e-5
        seen[: len(of), j] = True
    assert torch.equal(seen, graph.real_edge_mask)
    assert not graph.scores[~seen].any()


@functools.cache
def tracer(family: str) -> Tracer:
    return Tracer(tiny_model(family).eval(), None)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_agree_with_the_models_own_account(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifr_fast.compat.eap_ig.scores._ELEMENTS", 3000)  # several blocks of rows
    own, text = tracer(family), tiny_text(T)
    graph = score_components(own, [text])
    assert graph.cfg["parallel_attn_mlp"] == (family in PARALLEL)
    assert_scores(graph, expected_scores(own.model, text))
    for mode in RecordingMode:
        again = score_components(own, [own.record(text, mode=mode)], positions=True)
        assert_scores(again, expected_scores(own.model, text, positions=True))


def test_texts_count_alike_whatever_their_length() -> None:
    own, texts = tracer("llama"), [tiny_text(n, seed=n) for n in (3, 11)]
    each = [expected_scores(own.model, text) for text in texts]
    mean = {reader: (each[0][reader] + each[1][reader]) / 2 for reader in each[0]}
    assert_scores(score_components(own, texts), mean)


def test_attribute_is_called_as_eap_ig_calls_it() -> None:
    own, texts = tracer("llama"), [tiny_text(n, seed=n).tolist() for n in (3, 7, 5)]
    graph = Graph.from_model(own)
    loader = [(texts[:2], None, None), (texts[2:], None, None)]
    assert attribute(own, graph, loader, lambda x: x, "information-flow-routes", quiet=True) is None
    assert torch.equal(graph.scores, score_components(own, texts).scores)
    mean = Graph.from_model(own)
    attribute(own, mean, iter(loader), None, aggregation="mean")
    assert torch.allclose(mean.scores * 36, graph.scores)
    with pytest.raises(ValueError, match="method: expected 'information-flow-routes', got 'EAP'"):
        attribute(own, graph, loader, None, "EAP")
    with pytest.raises(ValueError, match="aggregation: expected 'sum' or 'mean', got 'max'"):
        attribute(own, graph, loader, None, aggregation="max")
    with pytest.raises(ValueError, match="graph: was made of another model"):
        attribute(tracer("gpt2"), Graph.from_model(tracer("phi")), loader, None)
    with pytest.raises(ValueError, match="texts: is empty"):
        attribute(own, graph, [], None)
    with pytest.raises(ValueError, match="dataloader: expected batches"):
        attribute(own, graph, [("a text", None, None)], None)


@pytest.mark.default_model
def test_bos_is_put_in_front_once(smol: Tracer) -> None:
    bos = smol.tokenizer.bos_token_id
    ids = smol.tokenizer("The capital")["input_ids"]
    assert ids[0] != bos
    given = [score_components(smol, [[bos, *ids]]), score_components(smol, [ids])]
    graph = Graph.from_model(smol)
    attribute(smol, graph, [(["The capital"], None, None)], None)
    assert torch.equal(graph.scores, given[0].scores)
    assert not torch.equal(graph.scores, given[1].scores)
    attribute(smol, graph, [([[bos, *ids]], None, None)], None)
    assert torch.equal(graph.scores, given[0].scores)


# Circuits


@functools.cache
def scored(family: str) -> Graph:
    return score_components(tracer(family), [tiny_text(T)])


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
    for _ in range(30):  # as EAP-IG says it: always the best edge into what is in the circuit
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
    with pytest.raises(ValueError, match=f"n: expected 0 to {n} edges, got {n + 1}"):
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


# JSON


def edge_names(L: int, H: int, parallel: bool) -> Iterator[str]:
    """All edges, spelled out."""
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
    # Where EAP-IG puts each score in its own matrix.
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
    if not math.isnan(value):  # a node without a score has NaN, and is written without
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
