"""Logit lenses and promoted tokens, against the model's own norm and head in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_oracle import LAYER, Case, T, assert_close, case
from tiny import tiny_model, tiny_text
from torch import Tensor, nn

from ifr_fast import Tracer
from ifr_fast.errors import UnsupportedArchitectureError
from ifr_fast.graph.tables import Node, NodeKind
from ifr_fast.recording.recording import RecordingMode


def test_logit_lens_of_every_kind_of_node(any_case: Case) -> None:
    tracer, oracle, text = any_case
    of = oracle.layers[LAYER]
    states: dict[Any, Tensor] = {
        (0, "embed", 4): oracle.layers[0].resid_pre[4],
        (LAYER, "post", -1): of.resid_post[-1],
        (LAYER, "ffn", 3): of.ffn[3],
        (tracer.decoder.n_layers - 1, "post", 6): oracle.layers[-1].resid_post[6],
    }
    if of.resid_mid is not None:
        states[LAYER, "mid", 5] = of.resid_mid[5]
    expected = oracle.lens(torch.stack(list(states.values())))
    lenses = tracer.logit_lens(text, list(states), k=4)
    for node, lens, logits in zip(states, lenses, expected, strict=True):
        assert lens.node == Node(node[0], NodeKind(node[1]), node[2] % T)
        assert_close(lens.logits, logits)
        probabilities = logits.softmax(-1)
        top = probabilities.topk(4)
        assert [p.token_id for p in lens.predictions] == top.indices.tolist()
        got = [p.probability for p in lens.predictions]
        assert got == pytest.approx(top.values.tolist(), abs=1e-5)
        for place, token_id in enumerate(logits.argsort(descending=True)[:10].tolist(), start=1):
            assert lens.rank(token_id) == place
            assert lens.probability(token_id) == pytest.approx(
                float(probabilities[token_id]), abs=1e-5
            )
    assert_close(lenses[3].logits, oracle.logits[6])


def test_lens_of_one_node_and_what_is_refused() -> None:
    tracer, _, text = case("phi")
    one = tracer.logit_lens(text, Node(0, NodeKind.POST, 3))
    assert torch.equal(one.logits, tracer.logit_lens(text, [(0, "post", 3)])[0].logits)
    with pytest.raises(ValueError, match="nodes: layer 0 is a parallel block, which has no mid"):
        tracer.logit_lens(text, (0, "mid", 3))
    with pytest.raises(ValueError, match="nodes: an embed is at layer 0, got 1"):
        tracer.logit_lens(text, (1, "embed", 3))
    with pytest.raises(ValueError, match=r"nodes: expected \(layer, kind, position\)"):
        tracer.logit_lens(text, (0, "resid", 3))
    with pytest.raises(ValueError, match="nodes: position: expected -13 to 12, got 13"):
        tracer.logit_lens(text, (0, "post", 13))
    with pytest.raises(ValueError, match="nodes: is empty"):
        tracer.logit_lens(text, [])
    with pytest.raises(ValueError, match="nodes: expected a node or several, got 3"):
        tracer.logit_lens(text, 3)  # type: ignore[call-overload]
    for of in (one.rank, one.probability):
        for token_id in (-1, len(one.logits)):
            with pytest.raises(ValueError, match=f"token_id: expected 0 to .*, got {token_id}"):
                of(token_id)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        tracer.logit_lens(text, (0, "post", 3), k=0)


def test_promoted_by_heads_and_blocks(any_case: Case) -> None:
    tracer, oracle, text = any_case
    position = 9
    for mode in RecordingMode:
        recording = tracer.record(text, mode=mode)
        for head in (0, 4):
            parts = oracle.head(LAYER, head, position)
            whole = tracer.promoted_tokens(
                recording, layer=LAYER, head=head, position=position, k=3
            )
            assert_close(whole.part, parts.sum(0))
            expected = oracle.direct(parts.sum(0), position, by_head=True)
            assert_close(whole.logits, expected)
            for named, largest in ((whole.promoted, True), (whole.suppressed, False)):
                top = expected.topk(3, largest=largest)
                assert [x.token_id for x in named] == top.indices.tolist()
                assert_close(torch.tensor([x.logit for x in named]), top.values)
            single = tracer.promoted_tokens(
                recording, layer=LAYER, head=head, position=position, source=7
            )
            assert_close(single.logits, oracle.direct(parts[7], position, by_head=True))
        block = tracer.promoted_tokens(recording, layer=LAYER, position=position)
        assert_close(block.logits, oracle.direct(oracle.layers[LAYER].ffn[position], position))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gemma4"])
def test_what_all_parts_add_is_the_logits(family: str) -> None:
    """All heads, blocks and the embedding together give the logits without the biases' share."""
    tracer, oracle, text = case(family)
    recording = tracer.record(text)
    total = oracle.direct(oracle.layers[0].resid_pre[T - 1], T - 1, 0)
    for layer, block in enumerate(tracer.decoder.blocks):
        total += tracer.promoted_tokens(recording, layer=layer).logits
        total += oracle.direct(block.bias.double(), T - 1, layer)
        for head in range(tracer.decoder.n_heads):
            total += tracer.promoted_tokens(recording, layer=layer, head=head).logits
    bias = oracle.norm.bias if isinstance(oracle.norm, nn.LayerNorm) else torch.zeros(1)
    constant = bias.double().detach() @ oracle.unembedding.T if len(bias) > 1 else 0
    head_bias = getattr(oracle.model.get_submodule(oracle.names.head), "bias", None)
    constant = constant + (0 if head_bias is None else head_bias.detach())
    assert_close(total + constant, oracle.logits[-1].detach(), 1e-4)


def test_promoted_by_neurons(neuron_case: Case) -> None:
    tracer, oracle, text = neuron_case
    parts = oracle.neurons(LAYER)[6]
    for neuron in (0, 17, -1, -len(parts)):
        found = tracer.promoted_tokens(text, layer=LAYER, position=6, neuron=neuron)
        assert_close(found.part, parts[neuron])
        assert_close(found.logits, oracle.direct(parts[neuron], 6))


def test_promoted_tokens_refuses() -> None:
    tracer, _, text = case("llama")
    with pytest.raises(ValueError, match="neuron: give it, or head, not both"):
        tracer.promoted_tokens(text, layer=0, head=0, neuron=0)
    with pytest.raises(ValueError, match="source: goes with head"):
        tracer.promoted_tokens(text, layer=0, source=0)
    with pytest.raises(ValueError, match="source: expected a position up to 3, got 4"):
        tracer.promoted_tokens(text, layer=0, head=0, position=3, source=4)
    with pytest.raises(ValueError, match="neuron: expected -50 to 49, got 50"):
        tracer.promoted_tokens(text, layer=0, neuron=50)
    with pytest.raises(ValueError, match="neuron: expected -50 to 49, got -51"):
        tracer.promoted_tokens(text, layer=0, neuron=-51)
    with pytest.raises(ValueError, match="head: expected -6 to 5, got 6"):
        tracer.promoted_tokens(text, layer=0, head=6)


def test_more_than_a_norm_before_the_head_is_refused() -> None:
    model = tiny_model("llama").eval()
    tracer = Tracer(model, None)
    model.model.norm.register_forward_hook(lambda _, __, x: torch.tanh(x))
    with pytest.raises(UnsupportedArchitectureError, match="stands more than a norm"):
        tracer.promoted_tokens(tiny_text(T), layer=0)
