"""Neurons of FFN blocks."""

from __future__ import annotations

import pytest
import torch
from transparency_cases import close, ran


@pytest.mark.parametrize("family", ["llama", "llama-bias", "gpt2", "granite", "gpt_neox", "phi3"])
def test_neurons_add_up_to_the_ffn(family: str) -> None:
    ours = ran(family, 12)
    for i in range(3):
        neurons = ours.decomposed_ffn_out(0, i, 5)
        activations = ours.neuron_activations(0, i, 5)
        assert neurons.shape == (len(activations), 36)
        close(activations[3] * ours.neuron_output(i, 3), neurons[3])
        difference = ours.ffn_out(i)[0, 5] - neurons.sum(0)
        other = ours.ffn_out(i)[0, 8] - ours.decomposed_ffn_out(0, i, 8).sum(0)
        close(difference, other)  # the projection's bias
        if family in ("llama", "phi3"):
            close(difference, torch.zeros(36))


@pytest.mark.parametrize("parity", [False, True])
def test_neurons_behind_a_norm(parity: bool) -> None:
    ours = ran("gemma2", 12, parity=parity)
    for pos in (0, 5):
        neurons = ours.decomposed_ffn_out(0, 1, pos)
        close(neurons.sum(0), ours.ffn_out(1)[0, pos])
        assert len(neurons) == len(ours.neuron_activations(0, 1, pos))
    with pytest.raises(ValueError, match=r"^layer: a norm after the FFN of layer 1 "):
        ours.neuron_output(1, 3)


def test_neurons_count_from_the_end() -> None:
    ours = ran("llama", 5)
    F = len(ours.neuron_activations(0, 1, 2))
    assert torch.equal(ours.neuron_output(1, -1), ours.neuron_output(1, F - 1))
    with pytest.raises(ValueError, match=f"^neuron: expected {-F} to {F - 1}, got {F}$"):
        ours.neuron_output(1, F)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_neuron_activations_in_parity_are_those_before_the_function(family: str) -> None:
    models = {parity: ran(family, 12, parity) for parity in (False, True)}
    made = models[True].tracer.model
    before, after = (models[parity].neuron_activations(0, 1, 5) for parity in (True, False))
    x = models[True].residual_after_attn(1)[0, 5]
    block = made.transformer.h[1] if family == "gpt2" else made.model.layers[1]
    with torch.no_grad():
        if family == "gpt2":
            expected = block.mlp.c_fc(block.ln_2(x))
            of_function = block.mlp.act(expected)
        else:
            read = block.post_attention_layernorm(x)
            expected = block.mlp.gate_proj(read)
            of_function = block.mlp.act_fn(expected) * block.mlp.up_proj(read)
    close(before, expected)
    close(after, of_function)


def test_a_mixture_of_experts_has_no_neurons_to_tell_apart() -> None:
    ours = ran("mixtral", 12)
    with pytest.raises(ValueError, match=r"^layer: .*no separate neurons"):
        ours.neuron_activations(0, 1, 5)
