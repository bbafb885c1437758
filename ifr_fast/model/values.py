"""The stream that the values of a layer's attention were made from: its own, row by row, or that of
a lower layer that it shares keys and values with.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from .attention import AttentionCall
from .block import relative_error, rounding_tolerance
from .hooks import StopForward
from .interface import overriding
from .probing import Probe, refuse
from .stream import same_bits

VALUE_SPAN = 8  # positions that a value may be made of


def value_layer(index: int, calls: list[AttentionCall], probe: Probe) -> int | None:
    """The layer whose keys and values a layer reads in place of its own: those of both are the same
    numbers, and do not depend on the stream that this layer reads. None where it has its own.
    """
    own = calls[index]
    if own.recurrence is not None:
        return None
    for i, call in enumerate(calls[:index]):
        if bool(same_bits(call.k, own.k) & same_bits(call.v, own.v)):
            other = _values(probe, probe.resid_pre.flip(0) + 1)
            return i if bool(same_bits(other, own.v[0].transpose(0, 1))) else None
    return None


def check_values(probe: Probe) -> None:
    """Refuses a layer whose values are not made of the stream that it reads, each of its position's
    row alone: an edge would name a position, or a layer, from which they do not come. With the rows
    of the stream in another order, and noise in place of some, the values of the others have to be
    the same in that order.
    """
    stream, T = probe.resid_pre, len(probe.resid_pre)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(T, generator=generator)
    expected = probe.call.v[0].transpose(0, 1).flatten(1)
    for noisy in torch.randperm(T, generator=generator).split((T + 1) // 2):
        mixed = stream[order]
        mixed[noisy] = torch.randn(mixed[noisy].shape, generator=generator).to(mixed) * mixed[noisy]
        kept = torch.ones(T, dtype=torch.bool)
        kept[noisy] = False
        error = 0.0
        if bool(kept.any()):
            found = _values(probe, mixed).flatten(1)
            error = relative_error(found[kept], expected[order][kept])
        if error > rounding_tolerance(stream.dtype):
            replayed = relative_error(_values(probe, stream).flatten(1), expected)
            if replayed > rounding_tolerance(stream.dtype):
                refuse(probe, f"a replay gives other values (relative error {replayed:.1e})")
            refuse(
                probe,
                "its values hold what other positions or other layers hold, so the source of what "
                f"attention reads is not known (relative error {error:.1e})",
            )


def value_span(probe: Probe) -> int:
    """How many positions a value is made of, its own and those just before it, where a short
    convolution makes the values of linear attention. Refuses a layer whose values hold others.
    """
    stream, T = probe.resid_pre, len(probe.resid_pre)
    expected = _values(probe, stream).flatten(1)
    span = 1
    for i in range(T):
        other = stream.clone()
        other[i] = other[i].flip(0) + 1
        moved = (_values(probe, other).flatten(1) != expected).any(-1).nonzero()
        reached = [j - i for j in moved.flatten().tolist()]
        if any(j < 0 or j >= VALUE_SPAN for j in reached):
            refuse(
                probe,
                "its values hold what later positions, or others far before them, hold, so the "
                "source of what it reads is not known",
            )
        span = max(span, *(j + 1 for j in reached), 1)
    return span


def _values(probe: Probe, stream: Tensor) -> Tensor:
    """The values [T, H_kv, V] of the layer where it reads `stream` [T, D]."""
    found: list[Tensor] = []

    def stop(call: AttentionCall) -> Tensor:
        found.append(call.v)
        raise StopForward

    with suppress(StopForward), overriding(stop):
        probe.layer_call(probe.module, stream[None])
    return found[0][0].transpose(0, 1)
