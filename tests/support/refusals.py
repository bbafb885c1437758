"""Tiny Llamas with one layer that computes something else, and the refusal of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ifr_fast import Tracer, UnsupportedArchitectureError

Parts = Callable[[nn.Module, Tensor, Any], Tensor]


def assert_refused(model: PreTrainedModel, *words: str) -> None:
    with pytest.raises(UnsupportedArchitectureError) as caught:
        Tracer(model)
    message = str(caught.value)
    assert message.startswith("model: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def attend(layer: nn.Module, x: Tensor, kwargs: Any) -> Tensor:
    return layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)[0]


def feed(layer: nn.Module, mid: Tensor) -> Tensor:
    return layer.mlp(layer.post_attention_layernorm(mid))


def llama_with(parts: Parts) -> PreTrainedModel:
    """A tiny Llama whose layer 1 computes `parts` in place of its own."""
    model = tiny_model("llama")
    layer = model.model.layers[1]
    torch.manual_seed(1)
    layer.extra = nn.Linear(36, 36)
    layer.norm = nn.LayerNorm(36)
    layer.extra_2, layer.identity = nn.Linear(36, 36), nn.Identity()

    class Layer(type(layer)):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            return parts(self, hidden_states, kwargs)

    layer.__class__ = Layer
    return model
