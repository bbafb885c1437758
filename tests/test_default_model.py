"""The default model on real prose, against the float64 oracle of its own eager run."""

import pytest
import torch
from oracle import TOLERANCE, assert_graph_agrees, importances
from tiny import account

from ifr_fast import Tracer

pytestmark = pytest.mark.default_model

SENTENCE = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module", params=[64, 127, 256])
def text(request, smol, prose):
    """Token ids, the oracle's importances of every layer."""
    token_ids = prose[20_000 : 20_000 + request.param]
    return token_ids, [importances(layer) for layer in account(smol.model, token_ids)]


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_every_weight_matches_the_oracle(smol, text, impl):
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
def test_graphs_match_the_oracle(smol, text, granularity):
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


def test_known_predictions(smol):
    graph = smol.trace(SENTENCE)
    assert graph.predictions[0].token == " Mary"
    assert graph.predictions[0].probability == pytest.approx(0.923, abs=0.002)
    assert graph.tokens[1] == " Mary"
    assert "".join(graph.tokens) == SENTENCE
    assert int(graph.token_importance().argsort(descending=True)[1]) == 1
    paris = smol.trace("The capital of France is").predictions[0]
    assert (paris.token, round(paris.probability, 2)) == (" Paris", 0.77)


def test_a_trace_scores_only_rows_on_the_frontier(smol, prose, monkeypatch):
    import ifr_fast.routes.tracing as module

    scored: dict[int, list[int]] = {}
    original = module.score_layer

    def counting(recording, layer, rows, keep, kernel):
        scored[layer] = rows.tolist()
        return original(recording, layer, rows, keep, kernel)

    monkeypatch.setattr(module, "score_layer", counting)
    graph = smol.trace(prose[20_000:20_512], position=-100, threshold=0.04)
    rows = sum(len(r) for r in scored.values())
    n_layers = smol.decoder.n_layers
    reached = {511 - 99}
    for layer in reversed(range(n_layers)):
        assert set(scored[layer]) == reached
        edges = graph.edges
        reached = set(edges.source[(edges.layer == layer) & (edges.kind < 2)].tolist())
    print(f"{rows} of {512 * n_layers} rows scored")
    assert rows < 0.1 * 512 * n_layers


def test_a_lean_recording_gives_the_same_graph(smol, prose):
    token_ids = prose[:200]
    full = smol.trace(smol.record(token_ids, mode="full"), threshold=0.02)
    lean = smol.record(token_ids, mode="lean")
    graph = smol.trace(lean, threshold=0.02)
    for mine, theirs in zip(graph.edges[:4], full.edges[:4], strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(graph.edges.weight, full.edges.weight, atol=TOLERANCE, rtol=0)
    assert lean.nbytes < smol.record(token_ids, mode="full").nbytes


def test_recordings_hold_no_more_than_planned(smol, prose):
    for mode in ("lean", "full"):
        plan = smol.plan(512)
        recording = smol.record(prose[:512], mode=mode)
        planned = plan.lean_bytes if mode == "lean" else plan.full_bytes
        assert recording.nbytes < 1.1 * planned


def test_same_input_same_bits(smol):
    first, second = smol.trace(SENTENCE), smol.trace(SENTENCE)
    for mine, theirs in zip(first.edges, second.edges, strict=True):
        assert torch.equal(mine, theirs)
    assert first.predictions == second.predictions


def test_chat_messages_use_the_template(smol):
    messages = [{"role": "user", "content": "Name a colour."}]
    graph = smol.trace(messages)
    assert graph.tokens[0] == "<|im_start|>"
    assert "".join(graph.tokens).endswith("<|im_start|>assistant\n")
