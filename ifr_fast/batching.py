"""Batches: several texts in one forward pass.

Texts are padded on the right, and nothing is masked: in a causal decoder a token does not depend on
later ones. Every text's rows are thus the same as when it runs alone, whatever positions, windows
and biases the model has. Texts that come with padding, on either side, are cut to their own tokens
first.

Texts of similar length run together, if they share a rotary regime (where frequencies depend on
the length of the text, the longest would decide for all). Models outside of transformers' attention
interface merge heads with the batch, each in its own way: their texts run one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from . import capture
from .model import Decoder

if TYPE_CHECKING:
    from typing_extensions import TypeIs

# Tokenizers return mappings.
Batch: TypeAlias = (
    "list[str] | list[list[int]] | list[Tensor] | list[np.ndarray[Any, Any]] "
    "| list[list[dict[str, str]]] | Mapping[str, Any]"
)

_BATCH_TOKENS = 8192  # tokens of one pass, padding included, unless a batch size is given


def is_batch(text: Any) -> TypeIs[Batch]:
    """True for several texts: a list or tuple of strings, of token-id sequences or of
    conversations, or what a tokenizer returns for several texts. A list of ints is one text, and so
    is a list of chat messages.
    """
    if isinstance(text, Mapping):
        return True
    if not isinstance(text, list | tuple) or not text:
        return False
    return all(
        isinstance(item, str | list | tuple)
        or (isinstance(item, Tensor | np.ndarray) and item.ndim > 0)
        for item in text
    )


def as_texts(batch: Batch) -> list[Any]:
    """The single texts of a batch, without padding. Raises ValueError for an invalid mask."""
    if not isinstance(batch, Mapping):
        return list(batch)
    try:
        ids = [torch.as_tensor(row) for row in batch["input_ids"]]
        mask = batch.get("attention_mask")
        masks = [torch.ones_like(x) if mask is None else mask[i] for i, x in enumerate(ids)]
        masks = [torch.as_tensor(x) for x in masks]
    except (LookupError, TypeError, RuntimeError) as error:
        raise ValueError(
            "text: expected several texts' input_ids and attention_mask, as a tokenizer gives them"
        ) from error
    return [_unpadded(x, m) for x, m in zip(ids, masks, strict=True)]


def _unpadded(token_ids: Tensor, mask: Tensor) -> Tensor:
    kept = mask.to(torch.bool).nonzero().flatten()
    if mask.shape != token_ids.shape or mask.ndim != 1 or len(kept) == 0:
        raise ValueError(
            f"text: expected an attention_mask of shape {list(token_ids.shape)} that keeps a token"
        )
    first, last = int(kept[0]), int(kept[-1])
    if last - first + 1 != len(kept):
        raise ValueError("text: its attention_mask hides tokens between others")
    return token_ids[first : last + 1]


def can_batch(decoder: Decoder) -> bool:
    """True if several texts can go through this model at once."""
    return decoder.attention_through is capture.attention_through


def batches(
    decoder: Decoder,
    lengths: list[int],
    batch_size: int | None = None,
    batch_tokens: int = _BATCH_TOKENS,
) -> Iterator[list[int]]:
    """Groups texts of these lengths to run together: indices, longest first, each once.

    batch_size: texts of a pass; None: as many as fit into `batch_tokens`, padding included.
    """
    if not can_batch(decoder):
        batch_size = 1
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[int] = []
    for i in order:
        longest = lengths[found[0]] if found else lengths[i]
        limit = batch_size or max(1, batch_tokens // longest)
        alike = decoder.rotary_regime(longest) == decoder.rotary_regime(lengths[i])
        if found and (len(found) >= limit or not alike):
            yield found
            found = []
        found.append(i)
    if found:
        yield found
