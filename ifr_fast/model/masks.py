"""Masks that are functions of two positions, and the sliding windows that they hide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LazyMask:
    """The model's own mask as a function of rows and keys; no [T, T] tensor exists.

    The mask interface passes it to the attention function in place of a tensor. n_rows: the number
    of rows and keys that the function covers, if it reads a tensor; else None.
    """

    def __init__(
        self,
        mask_function: Callable[..., Tensor],
        device: torch.device,
        n_rows: int | None = None,
    ) -> None:
        self._function = mask_function
        self._device = device
        self.n_rows = n_rows

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Bool [R, S]: true where a row may read a key; rows [R], keys [S]: absolute positions."""
        return self._at(rows[:, None], keys).expand(len(rows), len(keys))

    def _at(self, rows: Tensor, keys: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.long, device=self._device)
        return self._function(zero, zero, rows.to(self._device), keys.to(self._device))

    def window(self, n_keys: int) -> int | None:
        """The number of keys that a row sees, itself included, if less than `n_keys`; else None.

        The row at `n_keys - 1` decides; it need not exist unless the mask has an end.
        """
        n_keys = n_keys if self.n_rows is None else min(n_keys, self.n_rows)
        seen = self.visible(torch.tensor([n_keys - 1]), torch.arange(n_keys))
        width = int(seen.sum())
        return None if width >= n_keys else width

    def is_causal(self, n_keys: int, window: int | None) -> Tensor:
        """0-d bool: true if each row t sees exactly itself and the past, at most `window` keys.

        Only the edges of each row's visible keys are checked; the device is not synchronized.
        """
        rows = torch.arange(n_keys, device=self._device)
        first = torch.zeros_like(rows) if window is None else (rows - window + 1).clamp(min=0)
        fine = self._at(rows, rows) & ~self._at(rows, rows + 1) & self._at(rows, first)
        if window is not None:
            fine &= ~(self._at(rows, (first - 1).clamp(min=0)) & (first > 0))
        return fine.all()


def causal_mask(window: int | None, device: torch.device) -> LazyMask:
    """The mask that shows a row all past keys and its own, or the last `window` of them."""

    def function(_: Any, __: Any, rows: Tensor, keys: Tensor) -> Tensor:
        past = keys <= rows
        return past if window is None else past & (keys > rows - window)

    return LazyMask(function, device)
