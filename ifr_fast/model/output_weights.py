"""W_O read off a projection's own weight, where it is proven to be the derivative.

The derivative in as many directions as W_O has rows costs most of what opening a model costs. It is
a linear map of the direction. If a weight gives in a few random directions what the derivative
gives, the two are the same map: any other map differs from it there, by an amount that is in
proportion to their difference, with probability 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .block import relative_error

_DIRECTIONS = 8


def output_map(
    attention: nn.Module, z: Tensor, derivatives_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """W_O [H, V, D] of an attention module with outputs like z [T, H, V]. derivatives_of: gives the
    derivatives [N, D] in the directions [N, H, V] of value space.
    """
    _, H, V = z.shape
    generator = torch.Generator().manual_seed(H * V)
    few = torch.randn(_DIRECTIONS, H, V, generator=generator).to(z)
    known = weight_of(attention, few, derivatives_of(few))
    if known is not None:
        return known
    eye = torch.eye(H * V, dtype=z.dtype, device=z.device).view(H * V, H, V)
    return derivatives_of(eye).view(H, V, -1)


def weight_of(attention: nn.Module, tangents: Tensor, derivatives: Tensor) -> Tensor | None:
    """A copy [H, V, D], contiguous in V, of the weight in an attention module that maps `tangents`
    [N, H, V] to `derivatives` [N, D], as far as rounding lets see; None if there is none.
    """
    _, H, V = tangents.shape
    for weight in _candidates(attention, H * V, derivatives):
        mapped = torch.nn.functional.linear(tangents.flatten(1), weight)
        if relative_error(mapped, derivatives) <= 4 * torch.finfo(derivatives.dtype).eps:
            of_heads = weight.reshape(-1, H, V).transpose(0, 1)
            return of_heads.clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return None


def _candidates(attention: nn.Module, width: int, like: Tensor) -> Iterator[Tensor]:
    """Weights [D, width] of an attention module, those that are used last first."""
    D = like.shape[-1]
    for weight in reversed(list(attention.parameters())):
        plain = type(weight) is nn.Parameter and weight.is_floating_point()
        if not plain or weight.device != like.device:
            continue
        wide = weight.detach().to(like.dtype)
        if weight.shape == (D, width):
            yield wide
        if weight.shape == (width, D):  # Conv1D
            yield wide.T
