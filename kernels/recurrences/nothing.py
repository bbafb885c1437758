"""The weights of a layer that mixes no positions: its one head reads nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Nothing(NamedTuple):
    """One text's."""

    zeros: Tensor  # [T, 1]

    def weights(self, rows: Tensor, n_keys: int) -> Tensor:
        """Zeros [1, R, n_keys]."""
        return self.zeros.new_zeros(1, len(rows), n_keys)

    def head(self, head: int) -> Nothing:
        """The same."""
        del head
        return self

    def to(self, dtype: torch.dtype) -> Nothing:
        """The same in another dtype."""
        return Nothing(self.zeros.to(dtype))
