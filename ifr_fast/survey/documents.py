"""Items -> documents: token ids in pieces that the model can read, with facts about each token.

A piece consists of the tokens that the model reads at once, at most `max_tokens`, and of the token
that follows. A longer item is cut so that each of its tokens is predicted exactly once. The special
tokens at the beginning of the item are repeated at the beginning of every piece. Without special
tokens, the last token of a piece is only predicted there, and is the first that the next piece
reads.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..characters import labelled
from ..tokens import token_strings
from .columns import Tokens
from .inputs import Item, Reading
from .readers import as_unicode
from .schema import Problem

Array: TypeAlias = "np.ndarray[Any, Any]"
Labels: TypeAlias = "list[str | None]"

# Scripts without spaces between words: a run of their letters is not one word.
_UNSPACED = frozenset(
    {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI"}
)


@dataclass(frozen=True)
class Document:
    """A piece of an item, as it is scored and written."""

    context: str
    corpus: str
    tokens: Tokens
    strings: list[str]  # [T + 1]
    labels: dict[str, Labels]  # [T] each


class _Encoded(NamedTuple):
    """Tokens of an item."""

    ids: list[int]
    n_first: int  # special tokens at the beginning
    spans: list[tuple[int, int]] | None  # characters of each token, if requested
    text: str | None


class Vocabulary:
    """Facts about single tokens, looked up once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size
        self._known = np.zeros(size, bool)
        self._strings: dict[int, str] = {}
        self._begins, self._ends, self._punctuation = np.zeros((3, size), bool)

    def strings(self, ids: Array) -> list[str]:
        """Text of each token by itself."""
        self._learn(ids)
        return [self._strings[i] for i in ids.tolist()]

    def tokens(self, ids: Array) -> Tokens:
        """A document of token ids [T + 1].

        A token is a later piece of a word if it begins with a letter and the token before it ends
        with one.
        """
        self._learn(ids)
        read = ids[:-1]
        later = np.zeros(len(read), bool)
        later[1:] = self._begins[read[1:]] & self._ends[read[:-1]]
        word = np.cumsum(~later, dtype=np.int32)
        return Tokens(ids.astype(np.int32), self._punctuation[read], word, later)

    def _learn(self, ids: Array) -> None:
        new = np.unique(ids[~self._known[ids]])
        if len(new) == 0:
            return
        for i, string in zip(
            new.tolist(), token_strings(torch.from_numpy(new), self.tokenizer), strict=True
        ):
            self._strings[i] = string
            if self.tokenizer is None:
                continue
            self._begins[i] = bool(string) and _is_letter(string[0])
            self._ends[i] = bool(string) and _is_letter(string[-1])
            marks = string.strip()
            self._punctuation[i] = bool(marks) and all(
                unicodedata.category(c)[0] in "PS" and c != "\ufffd" for c in marks
            )
        self._known[new] = True


def _is_letter(c: str) -> bool:
    """True for letters of scripts with spaces, and for a piece of a UTF-8 character."""
    if c == "\ufffd":
        return True
    if unicodedata.category(c)[0] not in "LM":
        return False
    return unicodedata.name(c, "").partition(" ")[0].partition("-")[0] not in _UNSPACED


@dataclass(frozen=True)
class Cutter:
    """Makes documents from items. max_tokens: most tokens that the model reads at once."""

    vocabulary: Vocabulary
    reading: Reading
    max_tokens: int

    def documents(self, item: Item) -> Iterator[Document | Problem]:
        """Pieces of an item, or the Problem that it has."""
        try:
            encoded = self._encode(item)
            labels = self._labels(item, encoded)
        except ValueError as error:
            yield Problem(item.context, str(error))
            return
        ids = np.array(encoded.ids, np.int64)
        if len(ids) < 2:
            yield Problem(
                item.context, f"has {len(ids)} tokens; it takes two to predict one of them"
            )
            return
        first, n = encoded.n_first, len(ids)
        step = self.max_tokens + (1 - first if first else 0)
        if step < 1:
            raise ValueError(f"max_tokens: the {first} special tokens of a text leave no room")
        starts = list(range(first, n if first else n - 1, step)) or [first]
        prefix, tokenizer = np.arange(first), self.vocabulary.tokenizer
        for number, start in enumerate(starts):
            chosen = np.concatenate([prefix, np.arange(start, min(n, start + step + (not first)))])
            piece = ids[chosen]
            if len(piece) < 2:
                continue
            yield Document(
                item.context if len(starts) == 1 else f"{item.context}/{number}",
                item.corpus,
                self.vocabulary.tokens(piece),
                labelled(self.vocabulary.strings(piece), torch.from_numpy(piece), tokenizer),
                {name: [of[i] for i in chosen[:-1]] for name, of in labels.items()},
            )

    def _encode(self, item: Item) -> _Encoded:
        tokenizer, text = self.vocabulary.tokenizer, item.text
        if item.token_ids is not None:
            ids, first, spans = item.token_ids, 0, None
        else:
            if tokenizer is None:
                raise ValueError("the model has no tokenizer; expected token_ids")
            text = " ".join(item.words or []) if text is None else text
            by_word = any(_is_list(of) for of in item.labels.values())
            if by_word and not tokenizer.is_fast:
                raise ValueError("labels of words need a fast tokenizer")
            found = tokenizer(
                text,
                return_special_tokens_mask=True,
                return_offsets_mapping=by_word,
                verbose=False,
            )
            ids, special = found["input_ids"], found["special_tokens_mask"]
            first = next((i for i, flag in enumerate(special) if not flag), len(ids))
            spans = found["offset_mapping"] if by_word else None
        if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary.size:
            raise ValueError(f"token ids must be from 0 to {self.vocabulary.size - 1}")
        return _Encoded(list(ids), first, spans, text)

    def _labels(self, item: Item, encoded: _Encoded) -> dict[str, Labels]:
        """Values of each label, one per token."""
        n = len(encoded.ids)
        found: dict[str, Labels] = {}
        word_of: list[int | None] | None = None
        for name in self.reading.labels:
            value: Any = item.labels.get(name)
            if not _is_list(value):
                found[name] = [_label(value)] * n
            elif item.token_ids is not None:
                if len(value) != n:
                    raise ValueError(f"label {name!r}: has {len(value)} values for {n} token ids")
                found[name] = [_label(x) for x in value]
            else:
                if item.words is None:
                    raise ValueError(f"label {name!r}: is a list, and there are no 'words'")
                if len(value) != len(item.words):
                    raise ValueError(
                        f"label {name!r}: has {len(value)} values for {len(item.words)} words"
                    )
                if word_of is None:
                    word_of = _words_of(item.words, encoded)
                of_word = [_label(x) for x in value]
                found[name] = [None if i is None else of_word[i] for i in word_of]
        return found


def _words_of(words: list[str], encoded: _Encoded) -> list[int | None]:
    """Index of the word that holds each token's last character; None outside of words."""
    assert encoded.text is not None
    assert encoded.spans is not None
    text = encoded.text
    of_character = np.full(len(text) + 1, -1)
    at = 0
    for i, word in enumerate(words):
        begin = text.find(word, at)
        if begin < 0:
            raise ValueError(f"word {i}, {word[:40]!r}, is not found in the text")
        at = begin + len(word)
        of_character[begin:at] = i
    found: list[int | None] = []
    for begin, end in encoded.spans:
        while end > begin and text[end - 1].isspace():
            end -= 1
        number = int(of_character[end - 1]) if end > begin else -1
        found.append(None if number < 0 else number)
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _label(value: Any) -> str | None:
    if value is None:
        return None
    return as_unicode(json.dumps(value) if isinstance(value, bool | dict) else str(value))


def update(digest: Any, item: Item | Problem) -> None:
    """Adds an item to the digest of the text."""
    if isinstance(item, Problem):
        parts: list[Any] = [item.where, item.why]
    else:
        parts = [item.context, item.corpus, item.text, item.words, item.token_ids]
        parts.append({name: str(value) for name, value in item.labels.items()})
    digest.update(json.dumps(parts).encode())


def new_digest() -> Any:
    """An empty digest."""
    return hashlib.sha256()
