"""The neurons of a layer's FFN at one position, and the input of their activation function."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...drilldown.neuron_basis import NeuronBases, NeuronBasis, activations
from ...errors import UnsupportedArchitectureError
from ...model.hooks import hooked, on_input
from ...recording.recording import Recording


class Neurons(NamedTuple):
    """Values that one row's FFN computed."""

    activations: Tensor  # [F] input of the down projection
    outputs: Tensor  # [F, D] added to the residual stream by activations of 1
    before: Tensor | None  # [F] input of the activation function, if that is a module


def basis_of(bases: NeuronBases, layer: int) -> NeuronBasis:
    """A layer's neurons. Raises ValueError if its FFN has no separate neurons."""
    try:
        return bases[layer]
    except UnsupportedArchitectureError as error:
        raise ValueError(
            f"layer: the FFN of layer {layer} has no separate neurons ({error})"
        ) from error


def find_neurons(
    recording: Recording, layer: int, position: int, bases: NeuronBases, ffn: Tensor
) -> Neurons:
    """Runs a layer again at one position. ffn [D]: the output of its FFN there.

    Raises ValueError if it has no separate neurons.
    """
    basis = basis_of(bases, layer)
    F, read = len(basis.W), []

    def keep(x: Tensor) -> None:
        if x.shape[-1] == x.numel() == F:
            read.append(x.reshape(F))

    block = recording.decoder.blocks[layer]
    within_attention = set(block.attention.modules())
    functions = [
        module
        for module in block.module.modules()
        if module not in within_attention and next(module.parameters(), None) is None
    ]
    rows = torch.tensor([position])
    with hooked(*(on_input(module, keep) for module in functions)):
        found = activations(recording, layer, rows, basis, ffn[None])
    scale = 1 if found.row_scale is None else found.row_scale[0]
    return Neurons(found.values[0], scale * basis.W, read[0] if read else None)
