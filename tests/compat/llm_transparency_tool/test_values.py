"""Value biases, found by running attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_text
from torch import Tensor
from transparency_cases import opened

from ifr_fast.compat.llm_transparency_tool import TransparentLlm, values


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama", "llama-bias", "opt", "phi", "falcon"])
def test_value_biases_are_found(family: str) -> None:
    tracer = opened(family).tracer
    made = tracer.model
    found = values.biases(tracer.record(tiny_text(11), mode="full"))
    for bias, layer in zip(found, accounted_biases(family, made), strict=True):
        torch.testing.assert_close(bias, layer, atol=1e-6, rtol=0)


def accounted_biases(family: str, made: Any) -> list[Tensor]:
    """The value bias [H_kv, V] of each layer, read from the model's own parameters."""
    if family == "gpt2":
        return [x.attn.c_attn.bias.detach()[72:].view(6, 6) for x in made.transformer.h]
    if family == "falcon":
        return [torch.zeros(1, 6)] * 3
    if family == "opt":
        return [x.self_attn.v_proj.bias.detach().view(6, 6) for x in made.model.decoder.layers]
    projections = [x.self_attn.v_proj for x in made.model.layers]
    width = {"llama-bias": 10}.get(family, 6)
    return [
        torch.zeros(len(x.weight) // width, width)
        if x.bias is None
        else x.bias.detach().view(-1, width)
        for x in projections
    ]


def test_sinks_have_no_bias_to_fold() -> None:
    with pytest.raises(ValueError, match=r"^parity: .*sinks"):
        TransparentLlm(hf_model=tiny_model("gpt_oss").eval(), parity=True)
