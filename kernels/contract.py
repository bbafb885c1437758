"""The scoring contract: inputs and results of every kernel (docs/design.md, section 4).

For one layer and R of its rows, a kernel splits each node y into its parts

    y = resid_pre + sum over heads h and visible keys j of p[h, j]  (+ ffn)  (+ biases),
    p[h, j] = row_scale * alpha[h, j] * ((value_gate[h] * v[j]) @ W_O[h])

and returns the importance of each (paper section 2.2):

    proximity(p, y)  = max(|y|_1 - |y - p|_1, 0)
    importance(p, y) = proximity(p, y) / sum over parts k of proximity(p_k, y)

Where `pattern` is given, its weights take the place of alpha. They may be negative, and their sum
over keys need not be 1: linear attention and state spaces have such weights (recurrences/).

No importance, and no sum of a node's importances, is above 1: what rounding adds is cut off.
`linear` and `total` are left as they are summed.

Other tools' arithmetic may differ in two numbers: with `offset` and `floor` a proximity is
max(|y|_1 - |y - p|_1 + offset, floor). Even then, keys that a row does not see are not parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Pattern(Protocol):
    """Attention weights that are no softmax, made for a block of rows at a time."""

    def weights(self, rows: Tensor, n_keys: int) -> Tensor:
        """[H, R, n_keys], contiguous, of `rows` [R] (int64, CPU, ascending); 0 where a key is later
        than its row.
        """
        ...

    def to(self, dtype: torch.dtype, /) -> Pattern:
        """The same in another dtype."""
        ...

    def head(self, head: int) -> Pattern:
        """Those of one head alone."""
        ...


class LayerInputs(NamedTuple):
    """One layer's rows to score, and the keys they read.

    Floating tensors are float64, float32, bfloat16 or float16, on one device.
    """

    rows: Tensor  # [R] int64, on the CPU, strictly ascending: the rows' positions
    resid_pre: Tensor  # [R, D]
    y: Tensor  # [R, D] resid_mid, or resid_post in parallel blocks
    q: Tensor  # [R, H, K] as attention sees it: after bias, norm and RoPE
    k: Tensor  # [S, H_kv, K]
    v: Tensor  # [S, H_kv, V]
    W_O: Tensor  # [H, V, D] effective map from a head's value space to the residual stream
    scale: float  # scores are scale * (q . k)
    row_scale: Tensor | None = None  # [R] a post-norm's 1/rms
    value_gate: Tensor | None = None  # [R, H, V] an output gate
    window: int | None = None  # keys visible to a row, itself included
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: Tensor | None = None  # [H] extra logits that take weight and move nothing
    alibi_slopes: Tensor | None = None  # [H] scores get slope * (j - t)
    log_sum_exp: Tensor | None = None  # [R, H] of the scores, natural log, if the forward gave it
    ffn: Tensor | None = None  # [R, D] the FFN's output, a part of y in parallel blocks
    offset: Tensor | None = None  # [R] added to each part's |y|_1 - |y - p|_1
    floor: float = 0.0  # proximities are clipped from below here, at least 0
    pattern: Pattern | None = None  # weights; K is 0 then, and scores' parameters have no effect

    def to(self, dtype: torch.dtype) -> LayerInputs:
        """The same inputs with all floating tensors in `dtype`."""
        cast: dict[str, Any] = {
            name: x.to(dtype)
            for name, x in self._asdict().items()
            if isinstance(x, Tensor) and x.is_floating_point()
        }
        if self.pattern is not None:
            cast["pattern"] = self.pattern.to(torch.promote_types(dtype, torch.float32))
        return self._replace(**cast)


class EdgeList(NamedTuple):
    """Token edges above `keep`, one entry each. An entry of weight 0 is padding and is no edge."""

    row: Tensor  # [N] int64, index into `LayerInputs.rows`
    source: Tensor  # [N] int64, position of the key
    weight: Tensor  # [N] sum over heads of their importances
    head_weight: Tensor  # [N, H] each head's importance


class AttentionScores(NamedTuple):
    """Importances of the parts of one layer's nodes; for each row
    `residual + head_total.sum(-1)` (`+ ffn` in parallel blocks) is 1 within rounding.
    """

    residual: Tensor  # [R]
    ffn: Tensor | None  # [R], parallel blocks only
    head_total: Tensor  # [R, H] summed over all keys, kept or not
    edges: EdgeList
    unattributed: Tensor  # [R] bool: every proximity is 0, each of the n parts got 1/n
    linear: Tensor  # [R] sum of lin over all pairs: s . (sum of p[h, j])
    total: Tensor  # [R] sum of all proximities; where unattributed, n


class FFNScores(NamedTuple):
    """Importances of the two parts of `resid_post` in sequential blocks; they sum to 1."""

    residual: Tensor  # [R]
    ffn: Tensor  # [R]
    unattributed: Tensor  # [R] bool


def check_softmax(inputs: LayerInputs) -> None:
    """Raises ValueError where weights are given, which a kernel does not take."""
    if inputs.pattern is not None:
        raise ValueError("pattern: expected None; this kernel computes softmax weights alone")


def visible(rows: Tensor, n_keys: int, window: int | None) -> Tensor:
    """Mask of the keys that each row may read, its own included: bool [R, n_keys], on the device of
    `rows`.
    """
    keys = torch.arange(n_keys, device=rows.device)
    mask = keys <= rows[:, None]
    if window is not None:
        mask &= keys > rows[:, None] - window
    return mask
