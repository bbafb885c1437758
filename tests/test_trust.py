"""Wrong decompositions, changed weights and foreign recordings are refused; threads are safe."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opened import tiny_tracer
from random_inputs import random_inputs
from tiny import tiny_model, tiny_text
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifr_fast import IfrError, Tracer, UnsupportedArchitectureError
from ifr_fast.kernels import eager
from ifr_fast.model.pretrained import load


def _with_forward(
    model: PreTrainedModel, change: Callable[[nn.Module], Callable[..., Tensor]]
) -> PreTrainedModel:
    """The model with `change(layer)` in place of each layer's forward."""
    for layer in model.model.layers:
        layer.forward = change(layer)
    return model


def _scaled_stream(scale: float) -> Callable[[nn.Module], Callable[..., Tensor]]:
    def change(layer: nn.Module) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            normed = layer.input_layernorm(hidden_states)
            attended, _ = layer.self_attn(hidden_states=normed, **kwargs)
            mid = scale * hidden_states + attended
            return mid + layer.mlp(layer.post_attention_layernorm(mid))

        return forward

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scaled_stream_is_noticed_in_any_dtype(dtype: torch.dtype) -> None:
    for scale in (0.97, 0.8):
        tracer = Tracer(_with_forward(tiny_model("llama", dtype=dtype), _scaled_stream(scale)))
        for block in tracer.decoder.blocks:
            assert block.residual is not None
            assert block.residual.pre_weight is not None
            expected = torch.full((36,), scale)
            torch.testing.assert_close(block.residual.pre_weight, expected, rtol=0, atol=1e-5)
        tracer.trace_all(tiny_text(12))
    plain = Tracer(_with_forward(tiny_model("llama", dtype=dtype), _scaled_stream(1)))
    assert all(block.residual is None for block in plain.decoder.blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [1.02, "column"])
def test_a_wrong_output_map_does_not_close(
    dtype: torch.dtype, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ifr_fast.model.probing as module

    probed = module._probe_output_map

    def spoil(*args: Any) -> Tensor:
        W_O = probed(*args)
        if wrong == "column":
            W_O[:, :, 0] = 0
            return W_O
        return W_O * wrong

    monkeypatch.setattr(module, "_probe_output_map", spoil)
    with pytest.raises(UnsupportedArchitectureError, match="do not add up"):
        Tracer(tiny_model("gpt2", dtype=dtype))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    kept = {k: v for k, v in model.state_dict().items() if ".layers.1.mlp" not in k}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ValueError, match=r"model: .*lacks 3 weights, model\.layers\.1\.mlp"):
        load(tmp_path)


@pytest.mark.parametrize("mode", ["full", "lean"])
def test_weights_changed_after_opening_are_noticed(mode: str) -> None:
    model = tiny_model("llama")
    tracer = Tracer(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(-3)
    for position in (-1, 5, 0):
        with pytest.raises(IfrError, match="at layer 1 the parts"):
            tracer.trace(tracer.record(tiny_text(20), mode=mode), position=position, threshold=0.0)
    Tracer(model).trace(tiny_text(20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_closure_check_is_tight_from_both_sides(dtype: torch.dtype) -> None:
    """Errors of rounding are far below the limit; a layer that moves nothing is above it."""
    for family in ("llama", "mistral", "gpt2", "gpt_neox", "gemma2"):
        tracer = tiny_tracer(family, dtype)
        for mode in ("full", "lean"):
            recording = tracer.record(tiny_text(25), mode=mode)
            for scores in tracer.contributions(recording):
                assert float(scores.closure.max()) < 0.3, family
    model = tiny_model("llama", dtype=dtype)
    tracer = Tracer(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    with pytest.raises(IfrError, match="at layer 1 the parts"):
        tracer.trace_all(tiny_text(20))


def test_threads_that_score_leave_the_warnings_alone() -> None:
    inputs = random_inputs(9, 41, 4, 2, 8, 6, 19)
    before = list(warnings.filters)

    def work() -> None:
        for _ in range(30):
            eager.score_attention(inputs, 0.01)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_a_recording_of_another_model_is_refused() -> None:
    recording = Tracer(tiny_model("llama", seed=1)).record(tiny_text(5))
    tracer = tiny_tracer("llama")
    for act in (tracer.trace, tracer.trace_all, tracer.contributions):
        with pytest.raises(ValueError, match=r"text: .*another Tracer"):
            act(recording)


def test_threads_take_turns_with_a_model() -> None:
    model = tiny_model("llama")
    tracer = Tracer(model)
    before = model.config._attn_implementation
    expected = tracer.trace(tiny_text(12), threshold=0.02)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                graph = tracer.trace(tiny_text(12), position=-1, threshold=0.02)
                assert torch.equal(graph.edges.source, expected.edges.source)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert model.config._attn_implementation == before
    assert torch.isfinite(model(tiny_text(4)[None]).logits).all()
