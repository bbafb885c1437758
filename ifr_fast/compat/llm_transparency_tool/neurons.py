"""The neurons of a layer's FFN: what the projection reads that writes its output.

Found without knowing the family: the FFN's output is that of one linear submodule, or a multiple.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import capture
from ...capture import AttentionCall
from ...kernels.contract import LayerInputs
from ...model import evaluating
from ...recording import Recording

_ROWS = 512  # of the identity that are projected at once


class Neurons(NamedTuple):
    """What one row's FFN computed."""

    projection: nn.Module
    scale: float  # of what it adds, in what the layer adds to the residual stream
    activations: Tensor  # [hidden] what the projection reads
    before: Tensor | None  # [hidden] what the activation function reads, where that is a module

    @torch.inference_mode()
    def outputs(self, neurons: Tensor) -> Tensor:
        """[N, D]: what the neurons [N] add to the residual stream, each with activation 1."""
        hidden = len(self.activations)

        def moved() -> Iterator[Tensor]:
            nothing = self.projection(self.activations.new_zeros(1, 1, hidden))
            for some in neurons.split(_ROWS):
                ones = self.activations.new_zeros(1, len(some), hidden)
                ones[0, torch.arange(len(some)), some] = 1
                yield (self.projection(ones) - nothing)[0]

        return self.scale * torch.cat(list(moved()))


class _Call(NamedTuple):
    module: nn.Module
    read: Tensor
    wrote: Tensor


@torch.inference_mode()
def find_neurons(
    recording: Recording, inputs: LayerInputs, layer: int, position: int, z: Tensor, ffn: Tensor
) -> Neurons:
    """Runs a layer again at one position. z [H, V]: its attention output there; ffn [D]: what its
    FFN adds.

    Raises ValueError where no linear submodule writes that: in mixtures of experts, and before
    norms.
    """
    decoder = recording.decoder
    block, recorded = decoder.blocks[layer], recording.layers[layer]
    row = torch.tensor([position])
    hidden = recorded.resid_pre[row.to(recorded.resid_pre.device)].to(block.W_O.device)
    calls: list[_Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if len(args) == 1 and not kwargs and all(isinstance(x, Tensor) for x in (*args, output)):
            calls.append(_Call(module, args[0].reshape(-1, args[0].shape[-1])[0], output))

    within_attention = set(block.attention.modules())
    handles = [
        module.register_forward_hook(hook, with_kwargs=True)
        for module in block.module.modules()
        if module not in within_attention and module is not block.module
    ]

    def answer(_: AttentionCall) -> Tensor:
        return z[None, None].to(hidden.dtype)

    with (
        evaluating(decoder.model),
        decoder.attention_through(decoder.model, answer),
        capture.hooks(*handles),
    ):
        recorded.call.at(row)(block.module, hidden[None])
    wide = torch.promote_types(ffn.dtype, torch.float32)
    ffn = ffn.to(wide)
    norm, eps = torch.linalg.vector_norm, torch.finfo(hidden.dtype).eps
    granted = max(1e-3, 8 * eps) * norm(ffn) + 8 * eps * norm(inputs.y[position].to(wide))
    for call in calls:
        wrote = call.wrote.reshape(-1, call.wrote.shape[-1])[0].to(wide)
        if wrote.shape != ffn.shape or next(call.module.parameters(), None) is None:
            continue
        scale = (wrote @ ffn) / wrote.square().sum().clamp(min=torch.finfo(wide).tiny)
        if norm(scale * wrote - ffn) <= granted and _is_affine(call):
            before = next(
                (
                    other.read
                    for other in calls
                    if next(other.module.parameters(), None) is None
                    and other.read.shape == call.read.shape
                ),
                None,
            )
            return Neurons(call.module, _rounded(float(scale)), call.read, before)
    raise ValueError(
        f"layer: the FFN of layer {layer} has no neurons to tell apart: its output is that of no "
        "linear module (a mixture of experts, or a norm after it)"
    )


def _is_affine(call: _Call) -> bool:
    x = call.read[None, None]
    at_0, at_1, at_2 = (call.module(factor * x) for factor in (0.0, 1.0, 2.0))
    norm, eps = torch.linalg.vector_norm, torch.finfo(x.dtype).eps
    return bool(norm((at_2 - 2 * at_1 + at_0).float()) <= max(1e-3, 8 * eps) * norm(at_2.float()))


def _rounded(scale: float) -> float:
    """The scale without the rounding it was measured with, where it is 1."""
    return 1.0 if abs(scale - 1) < 1e-2 else scale
