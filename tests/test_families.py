"""The whole way, from a model to its graphs, against each family's own eager account."""

import pytest
import torch
from oracle import TOLERANCE, assert_graph_agrees, importances
from tiny import CONFIGS, account, tiny_model, tiny_text
from unchecked import skip_closure_check

from ifr_fast import Tracer
from ifr_fast.kernels import reference
from ifr_fast.recording.layer_inputs import layer_inputs

LENGTHS = [1, 2, 33]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def family(request):
    model = tiny_model(request.param)
    accounts = {T: account(model, tiny_text(T)) for T in LENGTHS}
    return model, {T: [importances(layer) for layer in a] for T, a in accounts.items()}


@pytest.mark.parametrize("impl", ["cpu", "eager", "reference"])
@pytest.mark.parametrize("mode", ["full", "lean"])
@pytest.mark.parametrize("T", LENGTHS)
def test_contributions_match_the_models_own_account(family, T, mode, impl):
    model, layers = family
    tracer = Tracer(model, impl=impl)
    recording = tracer.record(tiny_text(T), mode=mode)
    n = 0
    for scores in tracer.contributions(recording, keep=0.0):
        expected = layers[T][scores.layer]
        torch.testing.assert_close(
            scores.residual.double(), expected.residual, atol=TOLERANCE, rtol=0
        )
        torch.testing.assert_close(scores.ffn.double(), expected.ffn, atol=TOLERANCE, rtol=0)
        if expected.ffn_residual is None:
            assert scores.ffn_residual is None
            total = scores.residual + scores.ffn + scores.head_total.sum(-1)
        else:
            torch.testing.assert_close(
                scores.ffn_residual.double(), expected.ffn_residual, atol=TOLERANCE, rtol=0
            )
            total = scores.residual + scores.head_total.sum(-1)
        torch.testing.assert_close(total, torch.ones(T), atol=TOLERANCE, rtol=0)
        dense = torch.zeros_like(expected.heads)
        head, target, source, weight = scores.head_edges
        dense[head, target, source] = weight.double()
        torch.testing.assert_close(dense, expected.heads, atol=TOLERANCE, rtol=0)
        target, source, weight = scores.token_edges
        dense = torch.zeros(T, T, dtype=torch.float64)
        dense[target, source] = weight.double()
        torch.testing.assert_close(dense, expected.heads.sum(0), atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(
            scores.head_total.double(), expected.heads.sum(-1).T, atol=TOLERANCE, rtol=0
        )
        assert not scores.unattributed.any()
        n += 1
    assert n == model.config.num_hidden_layers


@pytest.mark.parametrize("granularity", ["token", "head"])
@pytest.mark.parametrize("mode", ["full", "lean"])
@pytest.mark.parametrize("T", LENGTHS)
def test_graphs_match_the_models_own_account(family, T, mode, granularity):
    model, layers = family
    tracer = Tracer(model)
    recording = tracer.record(tiny_text(T), mode=mode)
    for threshold in (0.0, 0.02, 0.08, 0.3, 0.6):
        routes = tracer.trace_all(recording, threshold=threshold, granularity=granularity)
        for position in {0, T // 2, T - 1}:
            graph = tracer.trace(
                recording, position=position, threshold=threshold, granularity=granularity
            )
            assert_graph_agrees(graph, layers[T])
            assert_graph_agrees(routes[position], layers[T])
    assert len(routes) == T


def test_a_window_hides_what_lies_before_it(monkeypatch):
    """Changing v at one position changes the weights of exactly the rows that see it."""
    T, changed = 33, 12
    # The closure check would see the change, rightly.
    skip_closure_check(monkeypatch)
    model = tiny_model("mistral")
    window = model.config.sliding_window
    tracer = Tracer(model)
    layer = model.config.num_hidden_layers - 1

    def head_weights(scale: float) -> torch.Tensor:
        recording = tracer.record(tiny_text(T), mode="full")
        v = recording.layers[layer].v.clone()
        v[changed] *= scale
        recording.layers[layer].v = v
        (scores,) = tracer.contributions(recording, layers=[layer], keep=0.0)
        dense = torch.zeros(T, T)
        dense[scores.token_edges.target, scores.token_edges.source] = scores.token_edges.weight
        return dense

    rows = (head_weights(1) != head_weights(0.5)).any(-1).nonzero().squeeze(1).tolist()
    assert rows == list(range(changed, changed + window))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    """Against the float64 oracle on the activations that were recorded."""
    tracer = Tracer(tiny_model("llama", dtype=dtype))
    recording = tracer.record(tiny_text(21))
    for scores in tracer.contributions(recording, keep=0.0):
        inputs, resid_post = layer_inputs(recording, scores.layer, scores.rows)
        exact = reference.score_attention(inputs.to(torch.float64), 0.0)
        of_ffn = reference.score_ffn(inputs.y.double(), resid_post.double())
        for mine, theirs in (
            (scores.head_total, exact.head_total),
            (scores.residual, exact.residual),
            (scores.ffn, of_ffn.ffn),
        ):
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine.double(), theirs, atol=TOLERANCE, rtol=0)
