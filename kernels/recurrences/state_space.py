"""Attention weights of Mamba-2's state spaces (arXiv 2405.21060, sections 3 and 6: the dual form).

A head keeps a state S [N, V] that forgets by one number, and reads its own value besides:

    S_t = exp(a_t) S_{t-1} + dt_t B_t v_t^T,    o_t = S_t^T C_t + D v_t

So o_t = sum over j <= t of M[t, j] v_j with one signed number a head,

    M[t, j] = exp(a_{j+1} + ... + a_t) dt_j (C_t . B_j),  and D more where j = t.

Shapes: R rows, T positions, H heads, G groups of heads, N numbers of a state. Largest
intermediates: [H, R, n_keys].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StateSpace(NamedTuple):
    """One text's recurrence; float32 or float64, on one device."""

    C: Tensor  # [T, G, N] reads the state
    B: Tensor  # [T, G, N] writes it
    a: Tensor  # [T, H] logarithms of the decay, at most 0
    dt: Tensor  # [T, H]
    D: Tensor  # [T, H] the same at each position

    def weights(self, rows: Tensor, n_keys: int) -> Tensor:
        """M [H, R, n_keys] of `rows` [R] (int64, CPU, ascending, below `n_keys`), 0 where a key is
        later than its row.
        """
        at, H, G = rows.to(self.a.device), self.a.shape[1], self.C.shape[1]
        read = self.C[at].transpose(0, 1) @ self.B[:n_keys].permute(1, 2, 0)  # [G, R, n_keys]
        # Sums over long texts are large, and their differences are what counts.
        sums = self.a[:n_keys].double().cumsum(0).T.contiguous()  # [H, n_keys]
        keys = torch.arange(n_keys, device=at.device)
        decay = (sums[:, at, None] - sums[:, None]).masked_fill_(keys > at[:, None], float("-inf"))
        weights = decay.exp_().to(read.dtype).view(G, H // G, len(at), n_keys).mul_(read[:, None])
        weights = weights.view(H, len(at), n_keys).mul_(self.dt[:n_keys].T[:, None])
        own = torch.arange(len(at), device=at.device)
        weights[:, own, at] += self.D[at].T
        return weights

    def head(self, head: int) -> StateSpace:
        """The recurrence of one head alone."""
        group = head // (self.a.shape[1] // self.C.shape[1])
        of_group = (x[:, group : group + 1] for x in (self.C, self.B))
        return StateSpace(*of_group, *(x[:, head : head + 1] for x in (self.a, self.dt, self.D)))

    def to(self, dtype: torch.dtype) -> StateSpace:
        """The same in another dtype."""
        return StateSpace(*(x.to(dtype) for x in self))
