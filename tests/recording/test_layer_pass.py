"""The watched pass against the model's own run, and the models that all of its users refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from opened import tiny_tracer
from tiny import account, tiny_model, tiny_text
from torch import Tensor

from ifr_fast import IfrError, Tracer, UnsupportedArchitectureError
from ifr_fast.kernels import eager
from ifr_fast.model.masks import LazyMask
from ifr_fast.recording.chunked import record_in_chunks
from ifr_fast.recording.layer_pass import WatchedLayer, WatchedPass, kept_rows, pad
from ifr_fast.survey.sweep import sweep

TEXTS = [tiny_text(7), tiny_text(12, seed=1), tiny_text(1, seed=2)]
PROBE = 11  # tokens that a model is opened with
LENGTHS = [len(text) for text in TEXTS]
T = max(LENGTHS)


def watched(tracer: Tracer, **options: Any) -> tuple[WatchedPass, list[WatchedLayer]]:
    layers: list[WatchedLayer] = []
    found = WatchedPass(tracer.decoder, LENGTHS, **({"left": layers.append} | options))
    with torch.inference_mode(), found.watching():
        tracer.decoder.forward_batch(pad(TEXTS))
    return found, layers


def n_hooks(tracer: Tracer) -> int:
    modules = tracer.decoder.model.modules()
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in modules)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_neox", "cohere"])
def test_layers_are_those_of_the_models_own_run(family: str) -> None:
    model = tiny_model(family)
    tracer = Tracer(model)
    found, layers = watched(tracer)
    assert [layer.block for layer in layers] == tracer.decoder.blocks
    assert found.finite() == [True] * 3
    assert torch.equal(found.resid_final, layers[-1].resid_post)
    for b, text in enumerate(TEXTS):
        n = len(text)
        for layer, own in zip(layers, account(model, text), strict=True):
            mid = own.resid_post - own.ffn if own.resid_mid is None else own.resid_mid
            z = torch.einsum("htj,jhv->thv", own.pattern, own.v)
            for got, expected in (
                (layer.resid_pre, own.resid_pre),
                (layer.resid_mid, mid),
                (layer.resid_post, own.resid_post),
                (layer.z, z),
            ):
                torch.testing.assert_close(got[b, :n].double(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_resid_mid_is_noted_at_the_rows_that_are_wanted(family: str) -> None:
    tracer = tiny_tracer(family)
    rows = torch.tensor([0, 6, T + 11, 2 * T])
    _, whole = watched(tracer)
    _, few = watched(tracer, mid_rows=rows)
    for layer, expected in zip(few, whole, strict=True):
        assert torch.equal(layer.resid_mid, expected.resid_mid.flatten(0, 1)[rows])


def test_callbacks_may_run_layers_and_leave_no_hook_behind() -> None:
    tracer = tiny_tracer("llama")
    seen: list[int] = []

    def left(layer: WatchedLayer) -> None:
        again = layer.layer_call(layer.block.module, layer.resid_pre)
        assert torch.equal(again, layer.resid_post)
        seen.append(layer.block.layer)

    before = n_hooks(tracer)
    with pytest.raises(AssertionError):  # the layer's attention would be asked once more
        watched(tracer, left=left)
    assert n_hooks(tracer) == before

    def rerun(layer: WatchedLayer) -> None:
        with tracer.decoder.attention_through(tracer.decoder.model, lambda _: layer.z):
            left(layer)

    watched(tracer, left=rerun)
    assert seen == [0, 1, 2]
    assert n_hooks(tracer) == before


def in_chunks(tracer: Tracer) -> object:
    place = torch.device("cpu")
    return record_in_chunks(tracer.decoder, TEXTS[1], ["x"] * T, place=place)


def in_a_sweep(tracer: Tracer) -> object:
    return sweep(tracer.decoder, TEXTS[:2], 0.1, eager)


RUNS: dict[str, Callable[[Tracer], object]] = {
    "one": lambda tracer: tracer.record(TEXTS[1], mode="full"),
    "lean": lambda tracer: tracer.record(TEXTS[1], mode="lean"),
    "together": lambda tracer: tracer.record(TEXTS, mode="full"),
    "in chunks": in_chunks,
    "in a sweep": in_a_sweep,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_other_keys_are_refused(
    run: Callable[[Tracer], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracer = tiny_tracer("llama")
    monkeypatch.setattr(LazyMask, "is_causal", lambda *_: torch.tensor(False))
    with pytest.raises(
        UnsupportedArchitectureError, match=r"at 1[12] tokens its attention reads other keys"
    ):
        run(tracer)


def spoiled(tracer: Tracer, layer: int, *at: int) -> torch.utils.hooks.RemovableHandle:
    """Makes a layer return NaN at text and row `at` of a batch, until the handle is removed."""

    def spoil(_: Any, __: Any, output: Any) -> Any:
        hidden = (output if isinstance(output, Tensor) else output[0]).clone()
        if len(hidden) > at[0] and hidden.shape[1] > at[1] and hidden.shape[1] != PROBE:
            hidden[at] = torch.nan
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    return tracer.decoder.blocks[layer].module.register_forward_hook(spoil)


@pytest.mark.parametrize("run", [run for name, run in RUNS.items() if name != "in a sweep"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_states_that_are_not_finite_are_refused(run: Any, layer: int) -> None:
    tracer = tiny_tracer("llama")
    with (
        spoiled(tracer, layer, 0, 6),
        pytest.raises(IfrError, match=f"not finite after layer {layer} in torch.float32"),
    ):
        run(tracer)


def test_the_last_layer_may_leave_anything_in_the_padding() -> None:
    tracer = tiny_tracer("llama")
    expected = tracer.record(TEXTS, mode="full")
    with spoiled(tracer, 2, 1, LENGTHS[0]):  # after the first text, second to the longest one
        got = tracer.record(TEXTS, mode="full")
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine.resid_final, theirs.resid_final)


def test_rows_that_are_checked() -> None:
    assert kept_rows(9, -1).tolist() == [4, 8]
    assert kept_rows(9, 2).tolist() == [2, 4, 8]


def test_keys_that_are_shared_no_longer_are_refused() -> None:
    """A layer reads other values than its source's, in texts beyond the probe's length."""
    model = tiny_model("gemma4_shared")
    attention = model.model.layers[4].self_attn
    own = attention.forward

    def changed(*args: Any, shared_kv_states: Any, **kwargs: Any) -> Any:
        k, v = shared_kv_states["full_attention"]
        if v.shape[2] > 12:
            shared_kv_states = {"full_attention": (k, v.roll(1, 2))}
        return own(*args, shared_kv_states=shared_kv_states, **kwargs)

    attention.forward = changed
    tracer = Tracer(model)
    assert tracer.decoder.value_layers == [0, 1, 2, 1, 1]
    tracer.trace(tiny_text(12), threshold=0.1)
    for act in (tracer.trace, tracer.trace_all, tracer.record):
        with pytest.raises(UnsupportedArchitectureError, match="layer 4 reads other keys"):
            act(tiny_text(13))
