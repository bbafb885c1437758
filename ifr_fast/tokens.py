"""Text in every form that a Tracer takes -> token ids, and their strings."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Text: TypeAlias = (
    "str | Sequence[SupportsIndex] | Tensor | np.ndarray[Any, Any] | Sequence[dict[str, str]]"
)
# Tokenizers return mappings.
Batch: TypeAlias = (
    "list[str] | list[list[int]] | list[Tensor] | list[np.ndarray[Any, Any]] "
    "| list[list[dict[str, str]]] | Mapping[str, Any]"
)


def is_batch(text: Any) -> TypeIs[Batch]:
    """True for several texts: a list or tuple of strings, of token-id sequences or of
    conversations, or the result of a tokenizer for several texts. A list of ints is one text, and
    so is a list of chat messages.
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


def encode(
    text: Text, tokenizer: PreTrainedTokenizerBase | None, add_special_tokens: bool | None
) -> Tensor:
    """Encodes a string, ids or chat messages as token ids [T], int64 on the CPU.

    Raises ValueError for other objects and for empty ones.
    """
    ids = _ids(text, tokenizer, add_special_tokens)
    if ids.ndim != 1 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise ValueError(
            f"text: expected token ids of shape [T], got {tuple(ids.shape)} {ids.dtype}"
        )
    if len(ids) == 0:
        raise ValueError("text: is empty; expected at least one token")
    return ids.detach().to("cpu", torch.int64)


def _ids(
    text: Text, tokenizer: PreTrainedTokenizerBase | None, add_special_tokens: bool | None
) -> Tensor:
    if isinstance(text, Tensor):
        return text
    special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
    if isinstance(text, np.ndarray):
        if text.dtype.kind not in "iu":
            raise ValueError(
                f"text: expected token ids of shape [T], got {text.shape} {text.dtype}"
            )
        return torch.from_numpy(text.astype(np.int64))
    if isinstance(text, str):
        if not text:  # a tokenizer may add a special token
            raise ValueError("text: is empty; expected at least one token")
        return torch.tensor(_need(tokenizer)(text, **special)["input_ids"], dtype=torch.int64)
    if isinstance(text, bytes) or not isinstance(text, Iterable):
        raise ValueError(f"text: expected a string, token ids or messages, got {text!r}")
    items: list[Any] = list(text)
    if items and all(isinstance(item, dict) for item in items):
        return _chat(items, _need(tokenizer))
    try:
        if any(isinstance(item, bool) for item in items):
            raise TypeError
        ids = [operator.index(item) for item in items]
    except TypeError:
        raise ValueError(
            "text: expected a string, token ids, or chat messages "
            f"(a list of dicts with role and content), got {type(text).__name__} of "
            f"{', '.join(sorted({type(item).__name__ for item in items}))}"
        ) from None
    if any(abs(i) >= 1 << 63 for i in ids):
        raise ValueError("text: token ids must be from 0 to the size of the vocabulary")
    return torch.tensor(ids, dtype=torch.int64)


def _need(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ValueError("text: this Tracer has no tokenizer; pass token ids")
    return tokenizer


def _chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(f"text: expected messages with role and content, got {message}")
    if tokenizer.chat_template is None:
        raise ValueError("text: this tokenizer has no chat template; pass a string")
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def token_strings(ids: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Text of each token by itself; a piece of a UTF-8 character becomes U+FFFD."""
    if tokenizer is None:
        return [f"<{i}>" for i in ids.tolist()]
    strings = []
    for i in ids.tolist():
        string = tokenizer.decode([i], clean_up_tokenization_spaces=False)
        piece = tokenizer.convert_ids_to_tokens(i)
        if isinstance(piece, str) and piece.startswith("\u2581") and not string.startswith(" "):
            string = " " + string  # SentencePiece drops the space before a first piece
        strings.append(string)
    return strings
