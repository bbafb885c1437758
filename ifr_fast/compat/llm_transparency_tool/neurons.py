"""The neurons of a layer's FFN at one position, as the published tool shows them: those of
neurons.py, and what their activation function reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import capture
from ...errors import UnsupportedArchitectureError
from ...neurons import NeuronBases, NeuronBasis, activations
from ...recording import Recording


class Neurons(NamedTuple):
    """What one row's FFN computed."""

    activations: Tensor  # [F] what the down projection reads
    outputs: Tensor  # [F, D] what activations of 1 add to the residual stream there
    before: Tensor | None  # [F] what the activation function reads, where that is a module


def basis_of(bases: NeuronBases, layer: int) -> NeuronBasis:
    """Raises ValueError where a layer's FFN has no neurons to tell apart."""
    try:
        return bases[layer]
    except UnsupportedArchitectureError as error:
        raise ValueError(
            f"layer: the FFN of layer {layer} has no neurons to tell apart ({error})"
        ) from error


def find_neurons(
    recording: Recording, layer: int, position: int, bases: NeuronBases, ffn: Tensor
) -> Neurons:
    """Runs a layer again at one position. ffn [D]: what its FFN adds there.

    Raises ValueError where it has no neurons to tell apart.
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
    with capture.hooks(*(capture.on_input(module, keep) for module in functions)):
        found = activations(recording, layer, rows, basis, ffn[None])
    scale = 1 if found.row_scale is None else found.row_scale[0]
    return Neurons(found.values[0], scale * basis.W, read[0] if read else None)
