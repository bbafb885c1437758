"""Text in every form that a Tracer takes -> token ids, and their strings."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .arguments import check_unicode, holds_integers, shown

if TYPE_CHECKING:
    from typing_extensions import TypeIs

# A mapping is what a tokenizer returns, or a conversation: messages, tools.
Text: TypeAlias = (
    "str | Sequence[SupportsIndex] | Tensor | np.ndarray[Any, Any] | Sequence[Mapping[str, Any]] "
    "| Mapping[str, Any]"
)
Batch: TypeAlias = (
    "list[str] | list[list[int]] | list[Tensor] | list[np.ndarray[Any, Any]] "
    "| list[list[Mapping[str, Any]]] | Mapping[str, Any]"
)
_CONVERSATION = ("messages", "tools", "continue_final_message")


def is_batch(text: Any) -> TypeIs[Batch]:
    """True for several texts: a list or tuple of strings, of token-id sequences, of conversations
    or of tokenizers' results, or the result of a tokenizer for several texts. A list of ints is one
    text, and so are a list of chat messages, and a tensor of one row, alone or in a tokenizer's
    result.
    """
    if isinstance(text, Mapping):
        return "messages" not in text and not _is_one(text.get("input_ids"))
    if not isinstance(text, list | tuple) or not text:
        return False
    return all(
        isinstance(item, str | list | tuple)
        or (isinstance(item, Mapping) and ("messages" in item or "input_ids" in item))
        or (isinstance(item, Tensor | np.ndarray) and item.ndim > 0)
        for item in text
    )


def _is_one(ids: Any) -> bool:
    """True for the token ids of one text, False for a sequence of texts' ids."""
    if isinstance(ids, Tensor | np.ndarray):
        return ids.ndim == 1 or (ids.ndim == 2 and len(ids) == 1)
    return isinstance(ids, Sequence) and all(
        isinstance(item, SupportsIndex)
        and not isinstance(item, bool)
        and getattr(item, "ndim", 0) == 0
        for item in ids
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
        if any(x.ndim != 1 or not holds_integers(x) for x in ids):
            raise ValueError
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "text: expected input_ids and attention_mask as a tokenizer gives them, integers for "
            "one text or several"
        ) from error
    return [_unpadded(x, m) for x, m in zip(ids, masks, strict=True)]


def _from_tokenizer(encoded: Mapping[str, Any]) -> Tensor:
    """The token ids of a tokenizer's result for one text, without padding."""
    if "input_ids" not in encoded:
        raise ValueError(
            "text: expected a mapping with input_ids, as a tokenizer gives it, or with messages, "
            f"got one with {', '.join(map(str, encoded)) or 'nothing'}"
        )
    if _is_one(encoded["input_ids"]):
        if len(encoded["input_ids"]) == 0:
            return torch.empty(0, dtype=torch.int64)
        mask = encoded.get("attention_mask")
        one = {"input_ids": _rows(encoded["input_ids"])}
        return as_texts(one if mask is None else one | {"attention_mask": _rows(mask)})[0]
    texts = as_texts(encoded)
    if len(texts) != 1:
        raise ValueError(f"text: expected a single text, got a tokenizer's result for {len(texts)}")
    return texts[0]


def _rows(x: Any) -> Any:
    return x if isinstance(x, Tensor | np.ndarray) and x.ndim == 2 else [x]


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
    """Encodes a string, ids, a tokenizer's result or chat messages as token ids [T], int64 on the
    CPU.

    Raises ValueError for other objects and for empty ones.
    """
    ids = _ids(text, tokenizer, add_special_tokens)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or not holds_integers(ids):
        raise ValueError(f"text: expected token ids of shape [T], got {shown(ids)}")
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
        ids = _need(tokenizer)(check_unicode("text", text), **special)["input_ids"]
        _warn_of_two(ids, tokenizer)
        return torch.tensor(ids, dtype=torch.int64)
    if isinstance(text, Mapping):
        if "messages" in text:
            return _conversation(text, _need(tokenizer))
        return _from_tokenizer(text)
    if isinstance(text, bytes | bytearray | memoryview | Set) or not isinstance(text, Iterable):
        raise ValueError(f"text: expected a string, token ids or messages, got {shown(text)}")
    items: list[Any] = list(text)
    if items and all(isinstance(item, Mapping) for item in items):
        return _chat(items, None, False, _need(tokenizer))
    try:
        if any(isinstance(item, bool) for item in items):
            raise TypeError
        listed = [operator.index(item) for item in items]
    except TypeError:
        raise ValueError(
            "text: expected a string, token ids, or chat messages "
            f"(a list of dicts with role and content), got {type(text).__name__} of "
            f"{', '.join(sorted({type(item).__name__ for item in items}))}"
        ) from None
    if any(abs(i) >= 1 << 63 for i in listed):
        raise ValueError("text: token ids must be from 0 to the size of the vocabulary")
    return torch.tensor(listed, dtype=torch.int64)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises ValueError for what encodes no text and decodes no tokens."""
    if tokenizer is not None and not (
        callable(tokenizer)
        and hasattr(tokenizer, "decode")
        and hasattr(tokenizer, "convert_ids_to_tokens")
    ):
        raise ValueError(f"tokenizer: expected a transformers tokenizer, got {shown(tokenizer)}")


def _need(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ValueError("text: this Tracer has no tokenizer; pass token ids")
    return tokenizer


def _warn_of_two(ids: list[int], tokenizer: Any) -> None:
    """Warns where the tokenizer put its first token before a text that begins with it."""
    first = getattr(tokenizer, "bos_token_id", None)
    if first is not None and ids[:2] == [first, first]:
        warnings.warn(
            f"text: begins with two {tokenizer.bos_token}, its own and the tokenizer's; for a "
            "rendered chat template pass add_special_tokens=False (--no-special-tokens)",
            stacklevel=2,
        )


def _conversation(given: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids of {"messages": ..., "tools": ..., "continue_final_message": ...}."""
    unknown = [str(key) for key in given if key not in _CONVERSATION]
    if unknown:
        raise ValueError(
            f"text: a conversation holds {', '.join(_CONVERSATION)}; got {', '.join(unknown)}"
        )
    messages, tools = given["messages"], given.get("tools")
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError("text: messages: expected a list of {role, content}")
    if not messages:
        raise ValueError("text: is empty; expected at least one message")
    if tools is not None and not (
        isinstance(tools, Sequence) and all(isinstance(t, Mapping) or callable(t) for t in tools)
    ):
        raise ValueError("text: tools: expected a list of JSON schemas or functions")
    resume = given.get("continue_final_message", False)
    if not isinstance(resume, bool):
        raise ValueError(f"text: continue_final_message: expected True or False, got {resume!r}")
    return _chat(list(messages), tools, resume, tokenizer)


def _chat(
    messages: list[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    resume: bool,
    tokenizer: PreTrainedTokenizerBase,
) -> Tensor:
    """Token ids of messages in the tokenizer's template; `resume`: the last one is left open."""
    contents = [_content(i, message) for i, message in enumerate(messages)]
    if tokenizer.chat_template is None:
        raise ValueError("text: this tokenizer has no chat template; pass a string")
    if resume and not contents[-1]:
        raise ValueError("text: continue_final_message: the last message has no text to continue")

    def rendered(messages: list[dict[str, Any]], tokenize: bool, with_tools: bool = True) -> Any:
        return tokenizer.apply_chat_template(
            messages,
            tools=list(tools) if with_tools and tools is not None else None,
            add_generation_prompt=not resume,
            continue_final_message=resume,
            tokenize=tokenize,
            **({"return_dict": True} if tokenize else {}),
        )

    given = [dict(message) for message in messages]
    plain = [m | {"content": content} for m, content in zip(given, contents, strict=True)]
    in_parts = [c.strip() for m, c in zip(given, contents, strict=True) if m.get("content") != c]
    called = any(message.get("tool_calls") for message in given)
    try:
        if tools:
            _warn_if_same("the tools", lambda read: rendered(plain, False, with_tools=read))
        if called:
            bare = [m | {"tool_calls": None} for m in plain]
            _warn_if_same("tool_calls", lambda read: rendered(plain if read else bare, False))
        # Templates of text models know strings alone; some of others know lists of parts alone.
        for form in (plain, given) if in_parts else (plain,):
            shown = rendered(form, False) if in_parts else ""
            if all(text in shown for text in in_parts):
                return torch.tensor(rendered(form, True)["input_ids"], dtype=torch.int64)
    except Exception as error:  # a template raises what it likes
        raise ValueError(
            f"text: the chat template cannot render these messages ({error})"
        ) from error
    raise ValueError("text: the chat template leaves out content that is given in parts")


def _warn_if_same(what: str, rendered: Callable[[bool], Any]) -> None:
    """Warns where a template renders the same with (True) and without (False) `what`."""
    whole, without = rendered(True), None
    with suppress(Exception):  # the template cannot do without
        without = rendered(False)
    if without == whole:
        warnings.warn(
            f"text: the chat template leaves out {what}, so the text lacks them", stacklevel=2
        )


def _content(i: int, message: Mapping[str, Any]) -> str:
    """The text of message `i`; empty for a call of tools without any."""
    role, content = message.get("role"), message.get("content")
    for text in (role, content):
        if isinstance(text, str):
            check_unicode(f"text: message {i}", text)
    if isinstance(role, str) and isinstance(content, str):
        return content
    if isinstance(role, str) and content is None and message.get("tool_calls"):
        return ""
    if not isinstance(role, str) or not isinstance(content, list | tuple):
        raise ValueError(f"text: expected messages with role and content, got {dict(message)}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"text: message {i} has a part of type {kind!r}; expected parts "
                '{"type": "text", "text": ...} alone'
            )
    return "".join(check_unicode(f"text: message {i}", part["text"]) for part in content)


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
