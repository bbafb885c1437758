"""Stores of keys and values that grow with the text, and the scores of rows added one by one."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor, nn

from ..kernels.contract import AttentionScores, EdgeList, LayerInputs
from ..model.attention import AttentionCall, attend_rows
from ..model.masks import causal_mask
from ..scoring.closure import cat_on
from ..scoring.implementations import Kernel


class StepScores(Protocol):
    """Scores of rows that are added one by one, each by its own layer."""

    def take(self) -> AttentionScores: ...  # removes all rows added so far


class StepLayer(Protocol):
    """A layer in decode steps: each adds a key and a value, attends to all, and scores its row."""

    def attend(
        self,
        q: Tensor,  # [1, H, 1, K]
        k: Tensor,  # [1, H_kv, 1, K]
        v: Tensor,  # [1, H_kv, 1, V]
        scale: float,
        *,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor: ...  # [1, 1, H, V]

    def score(
        self,
        resid_pre: Tensor,  # [1, D]
        y: Tensor,  # [1, D]
        keep: float,
        *,
        row_scale: Tensor | None,  # [1]
        value_gate: Tensor | None,  # [1, H, V]
        ffn: Tensor | None,  # [1, D]
    ) -> None: ...  # adds to the `StepScores` that the layer was made with


class TensorScores:
    """`StepScores` on `device`, for rows scored by any kernel."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._added: list[AttentionScores] = []

    def add(self, scores: AttentionScores) -> None:
        self._added.append(scores)

    def take(self) -> AttentionScores:
        added, self._added = self._added, []
        cat = functools.partial(cat_on, self._device)
        lists = [x.edges for x in added]
        counts = torch.tensor([len(x.source) for x in lists], device=self._device)
        source = cat([x.source for x in lists])
        rows = torch.arange(len(added), device=self._device)
        return AttentionScores(
            cat([x.residual for x in added]),
            None if added[0].ffn is None else cat([x.ffn for x in added if x.ffn is not None]),
            cat([x.head_total for x in added]),
            EdgeList(
                rows.repeat_interleave(counts, output_size=len(source)),
                source,
                cat([x.weight for x in lists]),
                cat([x.head_weight for x in lists]),
            ),
            cat([x.unattributed for x in added]),
            cat([x.linear for x in added]),
            cat([x.total for x in added]),
        )


class TensorLayer:
    """`StepLayer` for any kernel. k, v: stores [room, H_kv, K] and [room, H_kv, V], whose first
    `n_keys` are filled; W_O: [H, V, D].
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        n_keys: int,
        W_O: Tensor,
        alibi_slopes: Tensor | None,
        kernel: Kernel,
        scores: TensorScores,
    ) -> None:
        self._k, self._v, self._n_keys, self._W_O = k, v, n_keys, W_O
        self._alibi_slopes = alibi_slopes
        self._kernel, self._scores = kernel, scores

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        *,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        for store, new in ((self._k, k), (self._v, v)):
            store.narrow(0, self._n_keys, 1).copy_(new.squeeze(2))
        self._n_keys += 1
        self._q, self._scale = q, scale
        self._window, self._softcap, self._sinks = window, softcap, sinks
        k, v = (x[: self._n_keys].transpose(0, 1)[None] for x in (self._k, self._v))
        if softcap is None and sinks is None and self._alibi_slopes is None:
            begin = 0 if window is None else max(0, self._n_keys - window)
            # Heads that share a key become rows of one head, without a mask.
            grouped = q.reshape(1, k.shape[1], -1, q.shape[-1])
            z = nn.functional.scaled_dot_product_attention(
                grouped, k[:, :, begin:], v[:, :, begin:], scale=scale
            )
            return z.reshape(1, 1, q.shape[1], -1)
        mask = causal_mask(window, k.device)
        call = AttentionCall(
            nn.Identity(), q, k, v, mask, scale, softcap, sinks, self._alibi_slopes
        )
        return attend_rows(call, q, torch.tensor([self._n_keys - 1], device=k.device))

    def score(
        self,
        resid_pre: Tensor,
        y: Tensor,
        keep: float,
        *,
        row_scale: Tensor | None,
        value_gate: Tensor | None,
        ffn: Tensor | None,
    ) -> None:
        inputs = LayerInputs(
            rows=torch.tensor([self._n_keys - 1]),
            resid_pre=resid_pre,
            y=y,
            q=self._q.squeeze(2),
            k=self._k[: self._n_keys],
            v=self._v[: self._n_keys],
            W_O=self._W_O,
            scale=self._scale,
            row_scale=row_scale,
            value_gate=value_gate,
            window=self._window,
            softcap=self._softcap,
            sinks=self._sinks,
            alibi_slopes=self._alibi_slopes,
            ffn=ffn,
        )
        self._scores.add(self._kernel.score_attention(inputs, keep))


def with_room(x: Tensor, room: int) -> Tensor:
    """A copy of keys or values [T, H_kv, K] in a store with `room`, contiguous for each head."""
    out = x.new_empty(x.shape[1], room, x.shape[2]).transpose(0, 1)
    out[: len(x)] = x
    return out
