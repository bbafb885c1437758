"""Bases of neurons: models that have none, changed weights, adapters."""

from __future__ import annotations

import peft
import pytest
import torch
from model_oracle import LAYER, T, assert_close
from opened import tiny_tracer
from tiny import tiny_model, tiny_text

from ifr_fast import Tracer
from ifr_fast.errors import IfrError, UnsupportedArchitectureError


def test_an_ffn_that_adds_nothing_has_no_neurons() -> None:
    model = tiny_model("llama").eval()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    with pytest.raises(UnsupportedArchitectureError, match="no basis of neurons"):
        Tracer(model, None).neurons(tiny_text(5), layer=0)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_experts_have_no_basis_of_neurons(family: str) -> None:
    tracer = tiny_tracer(family)
    message = r"model: the FFN of layer model\.layers\.1 has no basis of neurons.*experts"
    with pytest.raises(UnsupportedArchitectureError, match=message):
        tracer.neurons(tiny_text(T), layer=1)


def test_changed_weights_are_noticed() -> None:
    model = tiny_model("gemma2").eval()  # its basis is no view of the weights
    tracer = Tracer(model, None)
    tracer.neurons(tiny_text(T), layer=0)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.copy_(
            torch.randn_like(model.model.layers[0].mlp.down_proj.weight)
        )
    with pytest.raises(IfrError, match="at layer 0 the neurons do not add up"):
        tracer.neurons(tiny_text(T), layer=0)


def test_neurons_of_adapters() -> None:
    model = tiny_model("llama")
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    text = tiny_text(T)
    scores = Tracer(adapted, None).neurons(text, layer=LAYER)
    merged = Tracer(adapted.merge_and_unload().eval(), None).neurons(text, layer=LAYER)
    assert_close(scores.importance, merged.importance.double())
