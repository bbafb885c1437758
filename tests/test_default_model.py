"""The default model on real prose, against the float64 oracle of its own eager run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import TOLERANCE, LayerImportance, assert_graph_agrees, importances
from tiny import account
from torch import Tensor

from ifr_fast import Tracer
from ifr_fast.graph.tables import Granularity

pytestmark = pytest.mark.default_model

SENTENCE = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module", params=[33, 131])
def text(
    request: pytest.FixtureRequest, smol: Tracer, prose: Tensor
) -> tuple[Tensor, list[LayerImportance]]:
    """Token ids, and the oracle's importances of every layer."""
    token_ids = prose[20_000 : 20_000 + request.param]
    return token_ids, [importances(layer) for layer in account(smol.model, token_ids)]


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_every_weight_matches_the_oracle(smol: Tracer, text: Any, impl: str) -> None:
    token_ids, layers = text
    T = len(token_ids)
    tracer = Tracer(smol.model, smol.tokenizer, impl=impl)
    worst = 0.0
    for scores in tracer.contributions(token_ids, keep=0.0):
        expected = layers[scores.layer]
        dense = torch.zeros_like(expected.heads)
        head, target, source, weight = scores.head_edges
        dense[head, target, source] = weight.double()
        summed = torch.zeros(T, T, dtype=torch.float64)
        summed[scores.token_edges.target, scores.token_edges.source] = (
            scores.token_edges.weight.double()
        )
        worst = max(
            worst,
            float((dense - expected.heads).abs().max()),
            float((summed - expected.heads.sum(0)).abs().max()),
            float((scores.head_total.T - expected.heads.sum(-1)).abs().max()),
            float((scores.residual - expected.residual).abs().max()),
            float((scores.ffn - expected.ffn).abs().max()),
            float((scores.ffn_residual - expected.ffn_residual).abs().max()),
        )
        total = scores.residual + scores.head_total.sum(-1)
        assert float((total - 1).abs().max()) < TOLERANCE
    print(f"T = {T}, {tracer.impl}: largest error {worst:.1e}")
    assert worst < TOLERANCE


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_graphs_match_the_oracle(smol: Tracer, text: Any, granularity: Granularity) -> None:
    token_ids, layers = text
    T = len(token_ids)
    recording = smol.record(token_ids)
    for threshold in (0.02, 0.04):
        routes = smol.trace_all(recording, threshold=threshold, granularity=granularity)
        for position in (T - 1, T // 2, T // 3):
            graph = smol.trace(
                recording, position=position, threshold=threshold, granularity=granularity
            )
            assert_graph_agrees(graph, layers)
            assert_graph_agrees(routes[position], layers)


def test_known_predictions(smol: Tracer) -> None:
    graph = smol.trace(SENTENCE)
    assert graph.predictions[0].token == " Mary"
    assert graph.predictions[0].probability == pytest.approx(0.923, abs=0.002)
    assert graph.tokens[1] == " Mary"
    assert "".join(graph.tokens) == SENTENCE
    assert int(graph.token_importance().argsort(descending=True)[1]) == 1
    paris = smol.trace("The capital of France is").predictions[0]
    assert (paris.token, round(paris.probability, 2)) == (" Paris", 0.77)


def test_a_lean_recording_gives_the_same_graph(smol: Tracer, prose: Tensor) -> None:
    token_ids = prose[:150]
    full, lean = (smol.record(token_ids, mode=mode) for mode in ("full", "lean"))
    expected, graph = smol.trace(full, threshold=0.02), smol.trace(lean, threshold=0.02)
    for mine, theirs in zip(graph.edges[:4], expected.edges[:4], strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(graph.edges.weight, expected.edges.weight, atol=TOLERANCE, rtol=0)
    assert lean.nbytes < full.nbytes


def test_recordings_hold_no_more_than_planned(smol: Tracer, prose: Tensor) -> None:
    T = 256
    plan = smol.plan(T)
    for mode, planned in (("lean", plan.lean_bytes), ("full", plan.full_bytes)):
        assert smol.record(prose[:T], mode=mode).nbytes < 1.1 * planned


def test_same_input_same_bits(smol: Tracer) -> None:
    first, second = smol.trace(SENTENCE), smol.trace(SENTENCE)
    for mine, theirs in zip(first.edges, second.edges, strict=True):
        assert torch.equal(mine, theirs)
    assert first.predictions == second.predictions


def test_chat_messages_use_the_template(smol: Tracer) -> None:
    messages = [{"role": "user", "content": "Name a colour."}]
    graph = smol.trace(messages)
    assert graph.tokens[0] == "<|im_start|>"
    assert "".join(graph.tokens).endswith("<|im_start|>assistant\n")
