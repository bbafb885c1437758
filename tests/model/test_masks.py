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
