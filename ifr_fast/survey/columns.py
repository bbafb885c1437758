"""Scores documents: the columns of each, for the tables of predictions and of heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from ..recording.batches import batches
from ..tracer import Tracer
from .schema import OFFSETS
from .sweep import Swept, sweep
from .walk import importances, membership

Array: TypeAlias = "np.ndarray[Any, Any]"


class Tokens(NamedTuple):
    """A document of T rows to score; the token after the last row is only predicted."""

    ids: Array  # [T + 1] int32
    punctuation: Array  # [T] bool: the token consists of punctuation
    word: Array  # [T] int32: running number of the token's word
    later_piece: Array  # [T] bool: the token is not the first piece of its word


class Columns(NamedTuple):
    """Values of a document by column of the tables (schema.py); bits are packed into bytes."""

    predictions: dict[str, Array]  # [T, ...]
    heads: dict[str, Array]  # [L * H, ...]


def score(
    tracer: Tracer, documents: Sequence[Tokens], thresholds: Sequence[float], batch_tokens: int
) -> list[Columns | None]:
    """Scores documents in batches of similar length; None if the model's states are not finite.

    thresholds: ascending. batch_tokens: tokens of a forward pass, padding included.
    """
    found: list[Columns | None] = [None] * len(documents)
    lengths = [len(document.ids) - 1 for document in documents]
    for together in batches(tracer.decoder, lengths, batch_tokens=batch_tokens):
        chosen = [documents[i] for i in together]
        for i, columns in zip(together, _score_together(tracer, chosen, thresholds), strict=True):
            found[i] = columns
    return found


def _score_together(
    tracer: Tracer, documents: list[Tokens], thresholds: Sequence[float]
) -> list[Columns | None]:
    keep = thresholds[0]
    ids = [torch.from_numpy(document.ids.astype(np.int64)) for document in documents]
    swept = sweep(tracer.decoder, ids, keep, tracer.kernel)
    B, T, L = len(documents), swept.n_rows, len(swept.parallel)
    head, ffn = importances(swept, keep)
    parallel = np.array(swept.parallel)[:, None]

    def by_position(x: Array) -> Array:
        return x.reshape(L, B, T).transpose(1, 2, 0)

    residual, ffn_residual = swept.residual.numpy(), swept.ffn_residual.numpy()
    columns: dict[str, Array] = {
        "logit": swept.logit.numpy().reshape(B, T),
        "probability": swept.probability.numpy().reshape(B, T),
        "head_importance": head.reshape(B, T, -1),
        "ffn_importance": ffn,
        "residual_mid": by_position(np.where(parallel, np.float32(np.nan), residual)),
        "residual_post": by_position(np.where(parallel, residual, ffn_residual)),
    }
    for k, within in enumerate(membership(swept, thresholds)):
        columns[f"head_in_{k}"] = _packed(within.head.reshape(B, T, -1))
        columns[f"ffn_in_{k}"] = _packed(within.ffn)
        columns[f"route_depth_{k}"] = within.depth
    heads = _head_sums(swept, documents, keep)
    return [
        Columns(
            {name: np.ascontiguousarray(x[b, :n]) for name, x in columns.items()},
            {name: np.ascontiguousarray(x[b]) for name, x in heads.items()},
        )
        if finite
        else None
        for b, (n, finite) in enumerate(zip(swept.lengths, swept.finite, strict=True))
    ]


def _packed(flags: Array) -> Array:
    return np.packbits(flags, axis=-1, bitorder="little")


def _head_sums(swept: Swept, documents: list[Tokens], keep: float) -> dict[str, Array]:
    """Columns of heads/ that are sums, [B, L * H, ...]."""
    B, T, L = len(documents), swept.n_rows, len(swept.parallel)
    H = swept.head_mass.shape[-1]
    punctuation, later_piece = np.zeros((2, B * T), bool)
    word = np.zeros(B * T, np.int64)
    for b, document in enumerate(documents):
        rows = slice(b * T, b * T + len(document.word))
        punctuation[rows], later_piece[rows] = document.punctuation, document.later_piece
        word[rows] = document.word

    target = np.concatenate([e.target.numpy() for e in swept.edges])
    source = np.concatenate([e.source.numpy() for e in swept.edges])
    weight = np.concatenate([e.head_weight.numpy() for e in swept.edges]).astype(np.float64)
    layer = np.repeat(np.arange(L), [len(e.target) for e in swept.edges])
    group: Array = target // T * L + layer
    offset = target - source
    earlier = offset > 0
    of_head = np.arange(H)

    def summed(values: Array, of: Array, chosen: Array | slice, n: int) -> Array:
        """[n, H] sums of the rows of `values` [E, H] by group."""
        index = of[chosen, None] * H + of_head
        sums = np.bincount(index.ravel(), values[chosen].ravel(), minlength=n * H)
        return sums.reshape(n, H)

    def by_layer(chosen: Array) -> Array:
        return summed(weight, group, chosen, B * L).reshape(B, L * H)

    bins = group * OFFSETS + offset.clip(max=OFFSETS - 1)
    by_offset = summed(weight, bins, slice(None), B * L * OFFSETS).reshape(B, L, OFFSETS, H)
    into_later = later_piece[target]
    above = weight.astype(np.float32) > np.float32(keep)
    n_rows = np.array(swept.lengths)
    word_targets = later_piece.reshape(B, T).sum(1)
    floats = {
        "mass": swept.head_mass.numpy().transpose(1, 0, 2).reshape(B, L * H),
        "edge_mass": by_offset.sum(2).reshape(B, L * H),
        "by_offset": by_offset.swapaxes(2, 3).reshape(B, L * H, OFFSETS),
        "first": by_layer((source % T == 0) & earlier),
        "punctuation": by_layer(punctuation[source] & earlier),
        "word_mass": by_layer(into_later),
        "same_word": by_layer(into_later & earlier & (word[source] == word[target])),
    }
    counts = {
        "rows": np.repeat(n_rows[:, None], L * H, 1),
        "word_targets": np.repeat(word_targets[:, None], L * H, 1),
        "edges": summed(above, group, slice(None), B * L).reshape(B, L * H),
    }
    return {
        **{name: x.astype(np.float32) for name, x in floats.items()},
        **{name: x.astype(np.int32) for name, x in counts.items()},
    }
