"""W_O read off weights is that of derivatives in all directions, or is not read off at all."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn

from ifr_fast.model import output_weights
from ifr_fast.model.opening import open_decoder
from ifr_fast.model.output_weights import weight_of

H, V, D = 3, 5, 7


@pytest.fixture
def attention() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Module()
    made.q, made.o = nn.Linear(D, H * V), nn.Linear(H * V, D)
    return made


def tangents() -> Tensor:
    return torch.randn(8, H, V, generator=torch.Generator().manual_seed(1))


def test_the_weight_is_copied(attention: nn.Module) -> None:
    x = tangents()
    found = weight_of(attention, x, x.flatten(1) @ attention.o.weight.detach().T)
    assert found is not None
    assert torch.equal(found.reshape(H * V, D), attention.o.weight.detach().T)
    assert found.stride(1) == 1
    assert found.untyped_storage().data_ptr() != attention.o.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("row", range(0, D, 2))
@pytest.mark.parametrize("column", range(0, H * V, 4))
@pytest.mark.parametrize("change", [1e-3, 1.0])
def test_a_map_that_differs_in_one_number_is_another(
    attention: nn.Module, row: int, column: int, change: float
) -> None:
    x, other = tangents(), attention.o.weight.detach().clone()
    other[row, column] += change
    assert weight_of(attention, x, x.flatten(1) @ other.T) is None
    assert weight_of(attention, x, 1.001 * x.flatten(1) @ attention.o.weight.detach().T) is None


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gpt_neox", "gemma2", "olmo2", "bloom", "granite"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_that_of_all_derivatives(family: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny_model(family)).to(dtype)
    fast = open_decoder(model)
    with mock.patch.object(output_weights, "weight_of", return_value=None):
        slow = open_decoder(model)
    for got, expected in zip(fast.blocks, slow.blocks, strict=True):
        assert torch.equal(got.W_O, expected.W_O)
        assert got.W_O.stride() == expected.W_O.stride()
        assert got.facts() == expected.facts()


def test_plain_projections_are_read_off() -> None:
    found: list[Tensor | None] = []

    def noted(*given: Tensor) -> Tensor | None:
        found.append(weight_of(*given))  # type: ignore[arg-type]
        return found[-1]

    for family in ("llama", "gpt2", "gpt_neox"):
        with mock.patch.object(output_weights, "weight_of", noted):
            open_decoder(copy.deepcopy(tiny_model(family)))
    assert all(x is not None for x in found)
