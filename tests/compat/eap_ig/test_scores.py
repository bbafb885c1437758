"""Scores between components: by hand, and against float64 activations of the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from opened import tiny_tracer
from tiny import account, tiny_text
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ifr_fast import Tracer
from ifr_fast.compat.eap_ig import Graph, attribute, score_components
from ifr_fast.recording.recording import RecordingMode

T = 9

# The model has two layers, and in each two heads of width 2 and one neuron, all in whole numbers.
# At the first token a head reads only that token, so its output is W_O[h] @ v[h]:
#
#   input              ( 1,  1, -1,  1)     rms 1
#   a0.h0              ( 2,  0,  0,  0)
#   a0.h1              ( 0,  0, -4,  0)     resid_mid  (3, 1, -5, 1)    rms 3
#   m0                 (-2,  0, -2,  6)     resid_post (1, 1, -7, 7)    rms 5
#   a1.h0              ( 0,  4,  0,  0)
#   a1.h1              ( 0,  0,  2,  0)     resid_mid  (1, 5, -5, 7)    rms 5
#   m1                 ( 1, -2,  4, -6)     resid_post (2, 3, -1, 1)
#
# |y|_1 - |y - p|_1 of each part by hand; negative values count as 0.
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


PARALLEL = {"phi", "gptj"}
FAMILIES = [
    "llama", "gpt2", "gemma2", "gemma4", "phi", "bloom", "opt", "qwen3_next", "gptj",
    "beam", "doge", "minimax", "openai-gpt", "opt-post_norm",
]  # fmt: skip


def tokens_part(model: Any, text: Tensor, resid_pre: Tensor) -> Tensor:
    """The tokens' embeddings alone, read from the model's own parameters."""
    model = copy.deepcopy(model).double()
    embedding = model.get_input_embeddings()
    match model.tiny_family:
        case "gpt2" | "opt" | "openai-gpt" | "opt-post_norm":
            return embedding(text)
        case "bloom":  # its norm after the embedding has a bias
            norm = model.transformer.word_embeddings_layernorm
            return norm(embedding(text)) - norm.bias
        case _:
            return resid_pre


@torch.no_grad()
def expected_scores(model: Any, text: Tensor, positions: bool = False) -> dict[str, Tensor]:
    """For each reader (a0, m0, ...), the mean importances [n] of all outputs before it."""
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
        if layer.to_mid is not None:
            parts = [layer.to_mid(part) for part in parts]
        parts += list(heads if layer.after is None else heads * layer.after)
        if layer.resid_mid is not None:
            read(f"m{i}", layer.resid_mid)
        if layer.to_post is not None:
            parts = [layer.to_post(part) for part in parts]
        parts = [part * layer.scale for part in (*parts, layer.ffn)]
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


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_agree_with_the_models_own_account(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifr_fast.compat.eap_ig.scores._ELEMENTS", 3000)  # several blocks of rows
    own, text = tiny_tracer(family), tiny_text(T)
    graph = score_components(own, [text])
    assert graph.cfg["parallel_attn_mlp"] == (family in PARALLEL)
    assert_scores(graph, expected_scores(own.model, text))
    for mode in RecordingMode:
        again = score_components(own, [own.record(text, mode=mode)], positions=True)
        assert_scores(again, expected_scores(own.model, text, positions=True))


def test_texts_count_alike_whatever_their_length() -> None:
    own, texts = tiny_tracer("llama"), [tiny_text(n, seed=n) for n in (3, 11)]
    each = [expected_scores(own.model, text) for text in texts]
    mean = {reader: (each[0][reader] + each[1][reader]) / 2 for reader in each[0]}
    assert_scores(score_components(own, texts), mean)


def test_attribute_is_called_as_eap_ig_calls_it() -> None:
    own, texts = tiny_tracer("llama"), [tiny_text(n, seed=n).tolist() for n in (3, 7, 5)]
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
        attribute(tiny_tracer("gpt2"), Graph.from_model(tiny_tracer("phi")), loader, None)
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
