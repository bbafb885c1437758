"""Masks that are causal or sliding windows, and others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ifr_fast.model.masks import LazyMask


@pytest.mark.parametrize("n_keys", range(1, 70))
def test_only_causal_and_sliding_masks_pass(n_keys: int) -> None:
    def chunked(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k // 16 == q // 16)

    def sliding(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k > q - 7)

    def plain(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    def accepted(function: Callable[..., Tensor], window: int | None) -> bool:
        mask = LazyMask(function, torch.device("cpu"))
        return bool(mask.is_causal(n_keys, window))

    assert accepted(plain, None)
    assert accepted(sliding, 7)
    assert accepted(sliding, None) == (n_keys <= 7)
    assert not accepted(lambda b, h, q, k: q >= 0, None)
    mask = LazyMask(chunked, torch.device("cpu"))
    assert accepted(chunked, mask.window(n_keys)) == (n_keys <= 16)
    assert LazyMask(sliding, torch.device("cpu")).window(100) == 7


@pytest.mark.parametrize("n_keys", [8, 64, 300])
@pytest.mark.parametrize("reads_tensor", [False, True])
def test_a_key_hidden_within_the_past_is_seen(reads_tensor: bool, n_keys: int) -> None:
    table = torch.ones(n_keys, n_keys, dtype=torch.bool).tril()
    table[6, 3] = False

    def looked_up(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return table[q, k]

    def dilated(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((q - k) % 5 != 3)

    device = torch.device("cpu")
    mask = LazyMask(looked_up, device, n_keys) if reads_tensor else LazyMask(dilated, device)
    assert not bool(mask.is_causal(n_keys, None))


def test_of_tensor_says_which_mask_a_tensor_is() -> None:
    plain = torch.ones(2, 3, 9, 9, dtype=torch.bool).tril()
    of_two_heads = plain.clone()
    of_two_heads[1, 2, 8, 4] = False
    windowed = plain.triu(-3)
    for seen, window, fits in (
        (plain, None, True),
        (of_two_heads, None, False),
        (windowed, 4, True),
        (windowed & (torch.arange(9) != 5), 3, False),
        (torch.ones_like(plain), None, False),
        (plain[..., 2:, :], None, False),
    ):
        mask = LazyMask.of_tensor(seen)
        assert mask.window(9) == window
        assert bool(mask.is_causal(9, window)) == fits
        assert not bool(mask.is_causal(9, 7))
        of_later = bool(mask.visible(torch.tensor([0]), torch.tensor([1])))
        assert of_later == (seen.shape[-2] == 9 and bool(seen[..., 0, 1].any()))
