"""Layers that mix no positions: an FFN alone beside the residual stream, as in Nemotron-H.

Such a layer's `resid_mid` is `resid_pre`. Its one head has no part: W_O and all weights are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UnsupportedArchitectureError
from ..kernels.recurrences.nothing import Nothing
from .attention import AttentionCall, Recurrence
from .block import TOLERANCE, Block, Branch, relative_error, rounding_tolerance
from .hooks import LayerCall, hooked, on_input, on_output
from .recurrences import call_of


def no_attention(layer: nn.Module, stream: Tensor) -> AttentionCall:
    """The call of attention that a layer would make on a stream [B, T, D], if it read nothing."""
    z = stream.new_zeros(*stream.shape[:2], 1, 1)
    return call_of(layer, z, Recurrence((z[..., 0],), Nothing, z))


def open_unmixed(
    index: int, name: str, layer: nn.Module, call: LayerCall, stream: Tensor, n_outputs: int | None
) -> Block:
    """The block of a layer that is called on a stream [T, D] on the probe. Raises
    UnsupportedArchitectureError unless its output is the stream plus the output of one submodule
    times a constant, each row of that row alone.
    """

    def refuse(why: str) -> UnsupportedArchitectureError:
        return UnsupportedArchitectureError(f"model: layer {name} is not supported: {why}")

    T, D = stream.shape
    read: list[nn.Module] = []
    made: list[tuple[nn.Module, Tensor]] = []
    width = D

    def keep_input(module: nn.Module, x: Tensor) -> None:
        if x.numel() == stream.numel() and torch.equal(x.reshape(T, D), stream):
            read.append(module)

    def keep_output(module: nn.Module, x: Tensor) -> None:
        nonlocal width
        width = max(width, x.numel() // T)
        if x.numel() == stream.numel():
            made.append((module, x.reshape(T, D).clone()))

    handles = []
    for module in layer.modules():
        if module is not layer:
            handles.append(on_input(module, lambda x, m=module: keep_input(m, x)))  # type: ignore[misc]
            handles.append(on_output(module, lambda x, m=module: keep_output(m, x)))  # type: ignore[misc]
    with hooked(*handles):
        output = call(layer, stream[None])[0]
    if not read:
        raise refuse("no submodule reads its residual stream")
    added, found = output - stream, None
    modules = [module for module, _ in made]
    for module, x in made:
        factor = (added * x).sum() / x.square().sum().clamp(min=1e-30)
        error = relative_error(factor * x, added, output)
        if error <= max(TOLERANCE, rounding_tolerance(stream.dtype)) and modules.count(module) == 1:
            found = Branch(module, float(factor))
    if found is None:
        raise refuse("what it adds to its stream is no submodule's output")
    for rows in (torch.arange(0, T, 2), torch.arange(T - 1, T)):
        alone = call.at(rows)(layer, stream[rows][None])[0]
        if relative_error(alone, output[rows]) > rounding_tolerance(stream.dtype):
            raise refuse("a row of its output depends on other rows")
    return Block(
        index,
        name,
        layer,
        layer,
        read[0],
        stream.new_zeros(1, 1, D),
        stream.new_zeros(D),
        None,
        row_scaled=False,
        gate_site=None,
        kv_heads=1,
        d_key=0,
        width=width,
        n_outputs=n_outputs,
        branches=(found,),
        stream_scale=1.0,
        recurrence_size=1,
    )
