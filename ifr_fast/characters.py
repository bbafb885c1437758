"""Tokens that hold some of the bytes of a character, shown as what they belong to.

Tokenizers over bytes split many characters: a Chinese one may be three tokens, an emoji four. None
of them is text by itself, and each decodes to U+FFFD. In a text they are labelled with what they
spell together, their number and how many they are:

    猫 1/3    猫 2/3    猫 3/3

A token that also holds whole characters spells these too ("·猫 1/3", with the space before it). A
token whose character the text does not complete keeps its U+FFFD.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .tokens import token_strings

_CUT = "\ufffd"  # in the string of a token that holds a part of a character
_LONGEST = 16  # tokens that are looked at together; most characters have at most 4 bytes
_LABEL = re.compile(r"(.+) ([1-9]\d?)/([1-9]\d?)", re.DOTALL)


class Piece(NamedTuple):
    """A labelled token."""

    text: str  # of all the tokens that share it
    number: int  # from 1
    of: int  # 2 or more

    def __str__(self) -> str:
        return f"{self.text} {self.number}/{self.of}"

    @staticmethod
    def read(token: str) -> Piece | None:
        """The piece that a label names; None for another token."""
        found = _LABEL.fullmatch(token)
        if found is None:
            return None
        piece = Piece(found[1], int(found[2]), int(found[3]))
        return piece if piece.of > 1 and piece.number <= piece.of else None


def text_tokens(ids: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """The tokens of a text [T], each by itself (`token_strings`) or labelled."""
    return labelled(token_strings(ids, tokenizer), ids, tokenizer)


def labelled(
    strings: list[str], ids: Tensor, tokenizer: PreTrainedTokenizerBase | None
) -> list[str]:
    """The `token_strings` of a text [T], with labels in place of pieces of a character."""
    tokens: list[str] = []
    for i, string in enumerate(strings):
        tokens.append(string)
        if _CUT in string:
            _label_last(tokens, ids[: i + 1], tokenizer)
    return tokens


def append_token(tokens: list[str], ids: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Appends the last of the token ids [T] to the tokens of the others, and labels those whose
    character it completes.
    """
    tokens += token_strings(ids[-1:], tokenizer)
    _label_last(tokens, ids, tokenizer)


def next_tokens(
    candidates: Tensor, before: Tensor, tokenizer: PreTrainedTokenizerBase | None
) -> list[str]:
    """The strings of tokens [N] of which each may follow the text `before` [T]."""
    strings = token_strings(candidates, tokenizer)
    if not any(_CUT in string for string in strings):
        return strings
    before = before[1 - _LONGEST :]
    known = token_strings(before, tokenizer)
    for i, string in enumerate(strings):
        tokens = [*known, string]
        _label_last(tokens, torch.cat([before, candidates[i : i + 1].to(before)]), tokenizer)
        strings[i] = tokens[-1]
    return strings


def joined(tokens: Sequence[str]) -> str:
    """The text that tokens spell, with each character whose pieces are all there once."""
    out: list[str] = []
    i = 0
    while i < len(tokens):
        piece = Piece.read(tokens[i])
        whole = (
            [] if piece is None else [str(piece._replace(number=n + 1)) for n in range(piece.of)]
        )
        if piece is not None and list(tokens[i : i + piece.of]) == whole:
            out.append(piece.text)
            i += piece.of
            continue
        out.append(tokens[i])
        i += 1
    return "".join(out)


def _label_last(tokens: list[str], ids: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Labels the last of the tokens of `ids`, and those before it, if it completes a character."""
    if tokenizer is None:
        return
    for n in range(1, min(_LONGEST, len(tokens)) + 1):
        if _CUT not in tokens[-n]:
            return
        if n == 1:
            continue
        text = tokenizer.decode(ids[-n:].tolist(), clean_up_tokenization_spaces=False)
        if _CUT not in text:
            tokens[-n:] = [str(Piece(text, i + 1, n)) for i in range(n)]
            return
