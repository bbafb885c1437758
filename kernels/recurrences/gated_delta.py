"""Attention weights of the gated delta rule (Gated Delta Networks, arXiv 2412.06464, section 3.1).

A head keeps a state S [K, V]. At each position it forgets, corrects what it holds at the key, and
is read by the query:

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t

This is linear in the values: o_t = sum over j <= t of M[t, j] v_j, with one signed number M[t, j] a
head. With w_t = q_t, read backwards,

    M[t, i] = beta_i k_i . w_i,    w_{i-1} = exp(g_i) (w_i - beta_i k_i (k_i . w_i)).

`weights` does this for a block of rows, chunk of keys by chunk of keys. Within a chunk that ends at
e, with c the sums of g from its first key on, x_i = k_i . w_i solves the triangular system

    x_i + sum over j > i of exp(c_j - c_i) beta_j (k_i . k_j) x_j = exp(c_e - c_i) k_i . w_e

and w at its start is exp(c_e) w_e - sum_j exp(c_j) beta_j x_j k_j. A row of the chunk itself begins
with its own q and c in place of w_e and c_e. All exponents are at most 0.

Shapes: R rows, T positions, H heads, K key width, C keys of a chunk. Largest intermediates:
[H, R, n_keys] (the result), [H, C, C].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64  # keys


class GatedDelta(NamedTuple):
    """One text's recurrence; float32 or float64, on one device."""

    q: Tensor  # [T, H, K] as the state is read: normalized and scaled
    k: Tensor  # [T, H, K] as it is written
    g: Tensor  # [T, H] logarithms of the decay, at most 0
    beta: Tensor  # [T, H]

    def weights(self, rows: Tensor, n_keys: int) -> Tensor:
        """M [H, R, n_keys] of `rows` [R] (int64, ascending, below `n_keys`), 0 where a key is
        later than its row.
        """
        device, H, R = self.k.device, self.k.shape[1], len(rows)
        at = rows.to(device)
        w = self.q[at].transpose(0, 1)  # [H, R, K]
        found = self.k.new_zeros(H, R, n_keys)
        for begin in range((n_keys - 1) // CHUNK * CHUNK, -1, -CHUNK):
            end = min(begin + CHUNK, n_keys)
            first = int(torch.searchsorted(rows, begin))  # rows before it see none of these keys
            if first == R:
                continue
            some = at[first:]
            k, beta = (x[begin:end].transpose(0, 1) for x in (self.k, self.beta))  # [H, C, K]
            c = self.g[begin:end].cumsum(0).T  # [H, C]
            keys = torch.arange(begin, end, device=device)
            last = c[:, (some - begin).clamp(max=end - 1 - begin)]  # [H, R]: c of e, or of the row
            later = keys[:, None] > some  # [C, R]
            decay = (last[:, None, :] - c[..., None]).masked_fill_(later, float("-inf")).exp_()
            right = (k @ w[:, first:].transpose(1, 2)).mul_(decay)  # [H, C, R]
            between = (c[:, None, :] - c[..., None]).triu_(1).exp_()
            system = (k @ (k * beta[..., None]).transpose(1, 2)).mul_(between)
            x = torch.linalg.solve_triangular(system, right, upper=True, unitriangular=True)
            x.mul_(beta[..., None])
            found[:, first:, begin:end] = x.transpose(1, 2)
            written = (k * c.exp()[..., None]).transpose(1, 2)  # [H, K, C]
            left = w[:, first:] * last.exp()[..., None] - (written @ x).transpose(1, 2)
            w = torch.cat([w[:, :first], left], 1)
        return found

    def head(self, head: int) -> GatedDelta:
        """The recurrence of one head alone."""
        return GatedDelta(*(x[:, head : head + 1] for x in self))

    def to(self, dtype: torch.dtype) -> GatedDelta:
        """The same in another dtype."""
        return GatedDelta(*(x.to(dtype) for x in self))
