"""Importances of neurons, against every neuron's output formed in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_oracle import LAYER, NAMES, Case, Oracle, T, assert_close, case
from opened import tiny_tracer
from oracle import proximity
from refusals import attend, feed, llama_with
from tiny import tiny_model, tiny_text
from torch import Tensor, nn

from ifr_fast import Tracer, UnsupportedArchitectureError
from ifr_fast.drilldown import neurons
from ifr_fast.graph.tables import NodeKind
from ifr_fast.kernels import neurons as neuron_kernel
from ifr_fast.kernels.neurons import neuron_proximities
from ifr_fast.recording.recording import RecordingMode


def shares_of_neurons(oracle: Oracle, layer: int, kind: NodeKind) -> list[Tensor]:
    """Importances of neurons [T, F]; in `post` also the stream's, and attention's if parallel."""
    of, parts = oracle.layers[layer], oracle.neurons(layer)
    y = of.ffn if kind == NodeKind.FFN else of.unscaled
    neurons = torch.stack([proximity(p, row) for p, row in zip(parts, y, strict=True)])
    found = [neurons]
    if kind == NodeKind.POST:
        found.append(proximity(oracle.before_ffn(layer), y))
        if of.resid_mid is None:
            pairs = torch.zeros(T, dtype=torch.float64)
            for t in range(T):
                for head in range(len(of.pattern)):
                    of_head = oracle.head(layer, head, t)[: t + 1]
                    pairs[t] += proximity(of_head, y[t]).sum()
            found.append(pairs)
    total = neurons.sum(-1) + sum(found[1:])
    return [x / (total[:, None] if x.ndim == 2 else total) for x in found]


@pytest.mark.parametrize("kind", ["post", "ffn"])
def test_neurons(neuron_case: Case, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron_kernel, "VISIT_ELEMENTS", 300)
    tracer, oracle, text = neuron_case
    for mode in RecordingMode:
        recording = tracer.record(text, mode=mode)
        for layer in (0, LAYER):
            expected = shares_of_neurons(oracle, layer, NodeKind(kind))
            rows = [0, 5, T - 1]
            scores = tracer.neurons(recording, layer=layer, position=rows, kind=kind)
            assert_close(scores.activations, oracle.seen[layer, "a"][rows])
            got = [scores.importance, scores.residual, scores.attention]
            got = [x for x in got if x is not None]
            assert len(got) == len(expected)
            for mine, other in zip(got, expected, strict=True):
                assert_close(mine, other[rows])
            total = sum(x if x.ndim == 1 else x.sum(-1) for x in got)
            assert_close(total, torch.ones(3, dtype=torch.float64))
            assert not scores.unattributed.any()


@pytest.mark.parametrize("kind", ["post", "ffn"])
def test_neurons_of_a_layer_that_scales_the_stream(kind: str) -> None:
    def scaled(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
        mid = x + attend(layer, x, kwargs)
        return (mid + feed(layer, mid)) * layer.layer_scalar

    model, text = llama_with(scaled), tiny_text(T)
    model.model.layers[LAYER].layer_scalar = 0.3
    tracer, oracle = Tracer(model), Oracle(model, NAMES["llama"], text)
    expected = shares_of_neurons(oracle, LAYER, NodeKind(kind))
    scores = tracer.neurons(text, layer=LAYER, position=slice(None), kind=kind)
    assert_close(scores.importance, expected[0])
    found = tracer.promoted_tokens(text, layer=LAYER, position=6, neuron=17)
    assert_close(found.part, oracle.neurons(LAYER)[6, 17])
    assert_close(found.logits, oracle.direct(found.part.double(), 6))


def test_an_ffn_that_is_a_sum_has_no_basis_of_neurons() -> None:
    tracer, text = tiny_tracer("gemma4"), tiny_text(T)
    with pytest.raises(UnsupportedArchitectureError, match=r"layers\.1 is a sum .* 2 submodules"):
        tracer.neurons(text, layer=LAYER)


def test_the_most_important_neurons_come_first() -> None:
    tracer, oracle, text = case("gpt2")
    scores = tracer.neurons(text, layer=LAYER)
    with pytest.raises(ValueError, match="k: expected at least 1, got -1"):
        scores.top(-1)
    (top,) = scores.top(5)
    expected = shares_of_neurons(oracle, LAYER, NodeKind.POST)[0][-1].topk(5)
    assert [n.neuron for n in top] == expected.indices.tolist()
    assert [n.importance for n in top] == pytest.approx(expected.values.tolist(), abs=1e-5)
    for n in top:
        value = float(oracle.seen[LAYER, "a"][-1, n.neuron])
        assert n.activation == pytest.approx(value, abs=1e-4)


def test_neurons_in_bfloat16() -> None:
    """The float64 importances are those of the same half-precision activations and streams."""
    model = tiny_model("llama", dtype=torch.bfloat16).eval()
    tracer, text, seen = Tracer(model, None), tiny_text(T), {}
    layer = model.model.layers[LAYER]
    down = layer.mlp.down_proj

    def keep(_: nn.Module, args: tuple[Tensor], __: Tensor) -> None:
        if args[0].shape[1] == T:  # and not the rows of a check
            seen.update(a=args[0][0])

    handle = down.register_forward_hook(keep)
    recording = tracer.record(text)
    handle.remove()
    scores = tracer.neurons(recording, layer=LAYER, position=slice(None))
    parts = (seen["a"].double()[..., None] * down.weight.double().T).detach()
    post = recording.resid_post(LAYER).double()
    of_neurons = torch.stack([proximity(p, y) for p, y in zip(parts, post, strict=True)])
    mid = proximity(recording.layers[LAYER].resid_mid.double(), post)
    total = of_neurons.sum(-1) + mid
    assert float((scores.importance - of_neurons / total[:, None]).abs().max()) < 2e-4
    assert float((scores.residual - mid / total).abs().max()) < 2e-3


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_neurons_where_nothing_is_attributed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All proximities to a sum of 0 are 0, so each of the n parts gets 1/n."""
    tracer, _, text = case(family)
    rows = neurons.ffn_rows

    def cancelled(*args: Any) -> Any:
        found, y = rows(*args), torch.zeros(1, 36)
        return found._replace(post=y, inputs=found.inputs._replace(y=y))

    monkeypatch.setattr(neurons, "ffn_rows", cancelled)
    scores = tracer.neurons(text, layer=LAYER, position=4)
    n = 1 + scores.importance.shape[1] + (0 if scores.attention is None else 6 * 5)
    assert scores.unattributed.tolist() == [True]
    assert torch.equal(scores.importance, torch.full_like(scores.importance, 1 / n))
    assert float(scores.residual) == pytest.approx(1 / n)
    if scores.attention is not None:
        assert float(scores.attention) == pytest.approx(30 / n)


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 30), st.integers(0, 99), st.booleans())
def test_neuron_proximities_are_exact(R: int, F: int, D: int, seed: int, zeros: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    c, W, y = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((R, F), (F, D), (R, D))
    )
    if zeros:
        W[:, seed % D], y[:, seed % D], c[:, seed % F] = 0, 0, 0
    got = neuron_proximities(4 * c, W.T.contiguous().T, y)
    expected = torch.stack(
        [proximity(4 * row[:, None] * W, y_row) for row, y_row in zip(c, y, strict=True)]
    )
    assert torch.allclose(got, expected, rtol=0, atol=1e-12 * D)
