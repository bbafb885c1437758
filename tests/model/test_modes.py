"""A model's modes, hooks and flags: left as they were, and without effect on its graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from same_graph import assert_same_bits
from tiny import WINDOW, tiny_model, tiny_text
from torch import nn
from transformers import PreTrainedModel

from ifr_fast import RouteGraph, Tracer, UnsupportedArchitectureError
from ifr_fast.kernels.precision import exact_products


def state(model: PreTrainedModel) -> Any:
    """Everything that opening and tracing change for a while."""
    return (
        model.config._attn_implementation,
        [
            (
                name,
                module.training,
                list(module._forward_hooks),
                list(module._forward_pre_hooks),
            )
            for name, module in model.named_modules()
        ],
        [
            (name, parameter.requires_grad, parameter.grad)
            for name, parameter in model.named_parameters()
        ],
    )


def mixed(family: str = "llama") -> PreTrainedModel:
    """A model with hooks and flags of its own, some modules in train mode, some not."""
    model = tiny_model(family).train()
    first = model.get_decoder().layers[0]
    first.eval()
    first.mlp.train()
    first.register_forward_hook(lambda *_: None)
    first.mlp.register_forward_pre_hook(lambda *_: None)
    for parameter in first.parameters():
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_is_left_as_it_was(implementation: str) -> None:
    model = mixed()
    model.set_attn_implementation(implementation)
    before = state(model)
    assert before[0] == implementation
    tracer = Tracer(model)
    assert state(model) == before
    for mode in ("full", "lean"):
        recording = tracer.record(tiny_text(9), mode=mode)
        assert state(model) == before
        tracer.trace(recording, position=3)
        assert state(model) == before
        tracer.trace_all(recording)[2]
        assert state(model) == before
        for _ in tracer.contributions(recording):
            assert state(model) == before  # between two layers, too
        assert state(model) == before
    # It can still be trained.
    model.get_decoder().layers[1].train()
    ids = tiny_text(9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert float(model.get_decoder().layers[1].mlp.up_proj.weight.grad.abs().sum()) > 0


def test_a_model_is_left_as_it_was_when_something_breaks() -> None:
    class BreakError(Exception):
        pass

    model = mixed()
    tracer = Tracer(model)
    lean = tracer.record(tiny_text(9), mode="lean")
    before = state(model)
    layer = model.model.layers[1]
    own = layer.self_attn.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise BreakError

    layer.self_attn.forward = broken
    with pytest.raises(UnsupportedArchitectureError, match="BreakError"):
        Tracer(model)
    assert state(model) == before
    for act in (
        lambda: tracer.record(tiny_text(9)),
        lambda: tracer.trace(tiny_text(9)),
        lambda: tracer.trace(lean, threshold=0.0),
        lambda: tracer.trace_all(lean),
        lambda: list(tracer.contributions(lean)),
    ):
        with pytest.raises(BreakError):
            act()
        assert state(model) == before
    layer.self_attn.forward = own
    assert len(tracer.trace(lean, threshold=0.0).edges.layer) > 0


def test_a_model_with_dropout_in_train_mode_gives_the_same_graph() -> None:
    text = tiny_text(9)

    def dropping() -> PreTrainedModel:
        model = tiny_model("gpt2")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        for block in model.transformer.h:
            block.attn.attn_dropout.p = 0.5
        return model

    training = dropping().train()
    ids = text[None]
    assert not torch.equal(training(input_ids=ids).logits, training(input_ids=ids).logits)
    of_training, of_eval = Tracer(training), Tracer(dropping().eval())
    for mode in ("full", "lean"):
        assert_same_bits(
            of_training.trace(of_training.record(text, mode=mode), threshold=0.02, position=7),
            of_eval.trace(of_eval.record(text, mode=mode), threshold=0.02, position=7),
        )
    assert training.training


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_grad_modes_make_no_difference(family: str) -> None:
    text = tiny_text(WINDOW + 2)
    expected: dict[str, RouteGraph] = {}
    for opened in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        model = tiny_model(family)
        with opened():
            tracer = Tracer(model)
        for traced in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            for mode in ("full", "lean"):
                with traced():
                    recording = tracer.record(text, mode=mode)
                    graph = tracer.trace(recording, threshold=0.02)
                    routes = tracer.trace_all(recording, threshold=0.02)
                assert not graph.edges.weight.requires_grad
                assert_same_bits(graph, expected.setdefault(mode, graph))
                assert torch.equal(routes[-1].edges.source, graph.edges.source)


@pytest.mark.parametrize("newer", [False, True], ids=["older interface", "newer interface"])
def test_products_are_exact_where_the_process_allows_less(newer: bool) -> None:
    """TF32, or bfloat16 on a CPU: parts would not add up. The setting is the process's again after,
    and between the passes.
    """
    matmul = torch.backends.cuda.matmul
    if newer and not hasattr(matmul, "fp32_precision"):
        pytest.skip("expected: this torch has one interface")
    before = torch.get_float32_matmul_precision()
    of_cuda = getattr(matmul, "fp32_precision", None)
    seen: list[Any] = []

    def precision() -> Any:
        return matmul.fp32_precision if newer else torch.get_float32_matmul_precision()

    try:
        if newer:
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        allowed = precision()
        model = tiny_model("llama")
        layer = model.model.layers[0]
        layer.register_forward_pre_hook(lambda *_: seen.append(precision()))
        tracer = Tracer(model, impl="eager")
        opened = len(seen)
        recording = tracer.record(tiny_text(9))
        assert precision() == allowed
        with exact_products(), exact_products():
            tracer.trace(recording)
        list(tracer.generate(tiny_text(9), max_new_tokens=2))
        assert 0 < opened < len(seen)
        assert set(seen) == {"ieee" if newer else "highest"}
        assert precision() == allowed
    finally:
        if newer:
            matmul.fp32_precision = of_cuda
        else:
            torch.set_float32_matmul_precision(before)
            if of_cuda is not None:
                matmul.fp32_precision = of_cuda
