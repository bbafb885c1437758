"""Models as people load and wrap them: opened with the same graphs, or refused by what is so."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from opened import tiny_importances, tiny_tracer
from oracle import assert_graph_agrees, importances
from same_graph import assert_same_bits
from tiny import FAMILIES, VOCAB, account, tiny_model, tiny_text
from torch import nn
from transformers import AutoModelForCausalLM, XLNetConfig

from ifr_fast import IfrError, Tracer, UnsupportedArchitectureError

T = 12


def test_a_model_without_weights() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["llama"].config())
    with pytest.raises(IfrError, match=r"model.embed_tokens.weight is on the meta device"):
        Tracer(model)
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.to("meta")
    with pytest.raises(IfrError, match=r"layers.2.mlp.up_proj.weight is on the meta device"):
        Tracer(model)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"], "init_lora_weights": False},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_adapters_of_the_embedding(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
                assert "lora" in name or "embed" in name or "lm_head" in name
    tracer, text = Tracer(model), tiny_text(T).clamp(max=5)
    assert tracer.decoder.vocab_size == VOCAB
    graph = tracer.trace(text, threshold=0.02)
    (step,) = tracer.generate(text, max_new_tokens=1, threshold=0.02)
    merged = copy.deepcopy(model).merge_and_unload()
    layers = [importances(layer) for layer in account(merged, text)]
    for got in (graph, step.graph):
        assert_graph_agrees(got, layers)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("replaced", [False, True])
def test_layers_that_are_compiled_one_by_one(replaced: bool, family: str) -> None:
    text = tiny_text(T)
    model = copy.deepcopy(tiny_model(family))
    stack = model.get_submodule(FAMILIES[family].layers)
    for i, layer in enumerate(stack):
        if replaced:
            stack[i] = torch.compile(layer, backend="eager")
        else:
            layer.compile(backend="eager")
    with torch.no_grad():
        expected = model(text[None]).logits
    tracer = Tracer(model)
    for mode in ("full", "lean"):
        assert_same_bits(
            tracer.trace(tracer.record(text, mode=mode), threshold=0.02),
            tiny_tracer(family).trace(tiny_tracer(family).record(text, mode=mode), threshold=0.02),
        )
    before = torch._dynamo.utils.counters["frames"]["total"]
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(model(text[None]).logits, expected)
    assert torch._dynamo.utils.counters["frames"]["total"] > before  # it compiles again


@pytest.mark.parametrize("impl", ["cpu", "eager"])
def test_autocast_is_named(impl: str) -> None:
    text = tiny_text(T)
    tracer = tiny_tracer("llama", impl=impl)
    full, lean = (tracer.record(text, mode=mode) for mode in ("full", "lean"))
    for use in (
        lambda: Tracer(tracer.model),
        lambda: tracer.trace(text),
        lambda: tracer.trace(full),
        lambda: tracer.trace_all(lean),
        lambda: tracer.trace([text, text]),
        lambda: list(tracer.generate(text, max_new_tokens=2)),
        lambda: list(tracer.contributions(full)),
    ):
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(IfrError, match=r"torch.autocast is active and rounds products"),
        ):
            use()
    with torch.autocast("cpu", enabled=False):
        assert_graph_agrees(tracer.trace(full), tiny_importances("llama", T))


class Head(nn.Module):
    """A norm in float32 that casts what it reads."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.float())


@pytest.mark.parametrize("cast_before", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_head_in_float32_on_a_body_in_bfloat16(family: str, cast_before: bool) -> None:
    text, plain = tiny_text(T), tiny_tracer(family, torch.bfloat16)
    model = copy.deepcopy(plain.model)
    model.model.norm = Head(model.model.norm) if cast_before else model.model.norm.float()
    if cast_before:
        model.model.norm.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    model.lm_head.float()
    tracer = Tracer(model)
    assert tracer.decoder.dtype == torch.bfloat16
    assert tracer.record(text).logits.dtype == torch.float32
    for got, expected in zip(tracer.trace_all(text), plain.trace_all(text), strict=True):
        assert torch.equal(got.edges.weight, expected.edges.weight)
    assert len(list(tracer.generate(text, max_new_tokens=2, eos_token_id=[]))) == 2


def test_attention_that_is_no_softmax_of_one_product_is_refused() -> None:
    config = XLNetConfig(vocab_size=VOCAB, d_model=36, n_layer=2, n_head=6, d_inner=50)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedArchitectureError, match="no softmax attention that could be"):
        Tracer(model)
