"""The choice of an implementation, and float64 models."""

from __future__ import annotations

import pytest
import torch
from opened import tiny_tracer
from oracle import importances
from tiny import account, tiny_text

from ifr_fast import Tracer
from ifr_fast.kernels import reference
from ifr_fast.recording.layer_inputs import layer_inputs


def test_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_tracer("llama").model
    monkeypatch.delenv("IFR_FAST_IMPL", raising=False)
    assert Tracer(model).impl in ("eager", "cpu", "triton")
    for impl in ("fast", "Eager"):
        with pytest.raises(ValueError, match=f"impl: expected one of auto, .*, got '{impl}'"):
            Tracer(model, impl=impl)
    monkeypatch.setenv("IFR_FAST_IMPL", "reference")
    assert Tracer(model).impl == "reference"
    assert Tracer(model, impl="eager").impl == "eager"
    monkeypatch.setenv("IFR_FAST_IMPL", "eager")
    assert Tracer(model).impl == "eager"
    monkeypatch.setenv("IFR_FAST_IMPL", "nonsense")
    with pytest.raises(ValueError, match="'nonsense'"):
        Tracer(model)
    monkeypatch.setenv("IFR_FAST_IMPL", "")
    assert Tracer(model).impl in ("eager", "cpu", "triton")


def test_the_implementation_chosen_is_the_one_that_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    own = reference.score_attention
    monkeypatch.setattr(reference, "score_attention", lambda *args: calls.append(1) or own(*args))
    model = tiny_tracer("llama").model
    Tracer(model, impl="eager").trace(tiny_text(9), threshold=0.0)
    assert calls == []
    Tracer(model, impl="reference").trace(tiny_text(9), threshold=0.0)
    assert len(calls) == 3


@pytest.mark.parametrize("mode", ["full", "lean"])
def test_float64_models_are_scored_in_float64(mode: str) -> None:
    """GPT-2 rounds nothing, so its own eager run is float64 throughout."""
    tracer, text = tiny_tracer("gpt2", torch.float64), tiny_text(12)
    layers = [importances(layer) for layer in account(tracer.model, text)]
    recording = tracer.record(text, mode=mode)
    for i, expected in enumerate(layers):
        with recording.replaying():
            inputs = layer_inputs(recording, i, torch.arange(len(text))).inputs
        got = tracer.kernel.score_attention(inputs, 0.0)
        assert got.residual.dtype == torch.float64
        heads = torch.zeros_like(expected.heads)
        heads[:, got.edges.row, got.edges.source] = got.edges.head_weight.T
        for mine, theirs in (
            (heads, expected.heads),
            (got.head_total, expected.heads.sum(-1).T),
            (got.residual, expected.residual),
        ):
            assert float((mine - theirs).abs().max()) < 1e-9
