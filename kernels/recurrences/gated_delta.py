"""Attention weights of the gated delta rule (Gated Delta Networks, arXiv 2412.06464, section 3.1),
and of Kimi delta attention, whose decays differ between channels (arXiv 2510.26692, section 3).

A head keeps a state S [K, V]. At each position it forgets, corrects what it holds at the key, and
is read by the query. With a decay g_t for all channels, or one for each,

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t

This is linear in the values: o_t = sum over j <= t of M[t, j] v_j, with one signed number M[t, j] a
head. With w_t = q_t, read backwards,

    M[t, i] = beta_i k_i . w_i,    w_{i-1} = exp(g_i) * (w_i - beta_i k_i (k_i . w_i)).

`weights` does this for a block of rows, chunk of keys by chunk of keys. Within a chunk that ends at
e, with c the sums of g from its first key on, x_i = k_i . w_i solves the triangular system

    x_i + sum over j > i of beta_j (k_i . (exp(c_j - c_i) * k_j)) x_j = k_i . (exp(c_e - c_i) * w_e)

and w at its start is exp(c_e) * w_e - sum_j exp(c_j) * beta_j x_j k_j. A row of the chunk itself
begins with its own q and c in place of w_e and c_e. All exponents are at most 0.

Shapes: R rows, T positions, H heads, K key width, G decays a head (1 or K), C keys of a chunk.
Largest intermediates: [H, R, n_keys] (the result), [H, C, C, G].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK, CHANNEL_CHUNK = 64, 16  # keys


class GatedDelta(NamedTuple):
    """One text's recurrence; float32 or float64, on one device."""

    q: Tensor  # [T, H, K] as the state is read: normalized and scaled
    k: Tensor  # [T, H, K] as it is written
    g: Tensor  # [T, H, G] logarithms of the decay, at most 0
    beta: Tensor  # [T, H]

    def weights(self, rows: Tensor, n_keys: int) -> Tensor:
        """M [H, R, n_keys] of `rows` [R] (int64, CPU, ascending, below `n_keys`), 0 where a key is
        later than its row.
        """
        device, H, R = self.k.device, self.k.shape[1], len(rows)
        at = rows.to(device)
        w = self.q[at].transpose(0, 1)  # [H, R, K]
        found = self.k.new_zeros(H, R, n_keys)
        size = CHUNK if self.g.shape[-1] == 1 else CHANNEL_CHUNK
        for begin in range((n_keys - 1) // size * size, -1, -size):
            end = min(begin + size, n_keys)
            # Rows before `first` see none of these keys; those from `after` on see them all.
            first, after = torch.searchsorted(rows, torch.tensor([begin, end])).tolist()
            if first == R:
                continue
            k, beta, c = (x[begin:end].transpose(0, 1) for x in (self.k, self.beta, self.g))
            c = c.cumsum(1)  # [H, C, G]
            within = at[first:after] - begin
            x = _solved(k, beta, c, w[:, first:after], w[:, after:], within)  # [H, C, rows]
            found[:, first:, begin:end] = x.transpose(1, 2)
            written = (k * c.exp()).transpose(1, 2)  # [H, K, C]
            decay = torch.cat([c[:, within], c[:, -1:].expand(-1, R - after, -1)], 1)
            left = w[:, first:] * decay.exp() - (written @ x).transpose(1, 2)
            w = torch.cat([w[:, :first], left], 1)
        return found

    def head(self, head: int) -> GatedDelta:
        """The recurrence of one head alone."""
        return GatedDelta(*(x[:, head : head + 1] for x in self))

    def to(self, dtype: torch.dtype) -> GatedDelta:
        """The same in another dtype."""
        return GatedDelta(*(x.to(dtype) for x in self))


def _solved(
    k: Tensor,  # [H, C, K]
    beta: Tensor,  # [H, C]
    c: Tensor,  # [H, C, G]
    inside: Tensor,  # [H, R, K] w of rows of the chunk, at `within` [R] of its keys
    behind: Tensor,  # [H, R', K] w of rows behind the chunk
    within: Tensor,
) -> Tensor:
    """beta_i x_i [H, C, R + R'] of the keys of a chunk and its rows, and of those behind it."""
    later = torch.arange(k.shape[1], device=k.device)[:, None] > within  # [C, R]
    decay = (c[:, None, within] - c[:, :, None]).masked_fill_(later[..., None], float("-inf"))
    right = torch.cat(
        [
            _decayed(k, inside, decay.exp_()),
            (k * (c[:, -1:] - c).exp()) @ behind.transpose(1, 2),
        ],
        -1,
    )
    between = (c[:, None] - c[:, :, None]).masked_fill_(
        torch.ones(k.shape[1], k.shape[1], dtype=torch.bool, device=k.device).tril()[..., None], 0
    )
    system = _decayed(k, k * beta[..., None], between.exp_())
    x = torch.linalg.solve_triangular(system, right, upper=True, unitriangular=True)
    return x.mul_(beta[..., None])


def _decayed(k: Tensor, w: Tensor, decay: Tensor) -> Tensor:
    """k_i . (decay_ir * w_r): k [H, C, K], w [H, R, K], decay [H, C, R, G] -> [H, C, R]."""
    if decay.shape[-1] == 1:
        return (k @ w.transpose(1, 2)).mul_(decay[..., 0])
    return torch.einsum("hck,hrk,hcrk->hcr", k, w, decay)
