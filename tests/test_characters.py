"""Tokens that hold parts of characters: their labels, and the text that they join to."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from survey_inputs import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from ifr_fast.characters import Piece, append_token, joined, next_tokens, text_tokens
from ifr_fast.export.labels import visible


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Bytes, and merges across characters: of " " with a first byte, and of a last with a first."""
    return byte_tokenizer([("Ġ", "ç"), ("«", "ç")])  # 0x20 0xE7, 0xAB 0xE7


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """As in SentencePiece: letters, and a token for each other byte."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback])
def test_every_piece_carries_its_character(tokenizer) -> None:  # type: ignore[no-untyped-def]
    ids = encode(tokenizer(), "a犬🎉é")
    assert text_tokens(ids, tokenizer()) == [
        *("a", "犬 1/3", "犬 2/3", "犬 3/3"),
        *("🎉 1/4", "🎉 2/4", "🎉 3/4", "🎉 4/4", "é 1/2", "é 2/2"),
    ]


def test_tokens_across_characters_carry_all_that_they_spell() -> None:
    tokenizer = byte_level()
    assert text_tokens(encode(tokenizer, "a 猫"), tokenizer) == [
        "a",
        " 猫 1/3",
        " 猫 2/3",
        " 猫 3/3",
    ]
    # The last byte of 猫 and the first of 笫 are one token here.
    ids = encode(tokenizer, "猫笫")
    assert len(ids) < 6
    assert text_tokens(ids, tokenizer) == [f"猫笫 {i + 1}/{len(ids)}" for i in range(len(ids))]


@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback])
@pytest.mark.parametrize("text", ["猫", "a猫🎉 b犬犬猫笫", "no piece", "é", "猫 1/3"])
def test_joined_tokens_are_the_decoded_text(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    ids = encode(tokenizer(), text)
    assert tokenizer().decode(ids.tolist(), clean_up_tokenization_spaces=False) == text
    assert joined(text_tokens(ids, tokenizer())) == text


def test_what_no_text_completes_stays_as_it_is() -> None:
    tokenizer = byte_level()
    ids = encode(tokenizer, "猫日")
    cut = "\ufffd"
    assert text_tokens(ids[:2], tokenizer) == [cut, cut]
    assert text_tokens(ids[1:], tokenizer) == [cut, cut, "日 1/3", "日 2/3", "日 3/3"]
    assert joined(["猫 2/3", "猫 3/3", "a"]) == "猫 2/3猫 3/3a"
    assert text_tokens(ids, None) == [f"<{i}>" for i in ids.tolist()]


def test_tokens_one_by_one_have_the_labels_of_the_whole() -> None:
    tokenizer = byte_level()
    ids = encode(tokenizer, "a 猫🎉!")
    tokens: list[str] = []
    for n in range(1, len(ids) + 1):
        append_token(tokens, ids[:n], tokenizer)
        assert tokens == text_tokens(ids[:n], tokenizer)


def test_candidates_are_read_behind_their_text() -> None:
    tokenizer = byte_level()
    ids = encode(tokenizer, "犬猫")
    a = encode(tokenizer, "a")
    assert next_tokens(torch.cat([ids[5:], a]), ids[:5], tokenizer) == ["猫 3/3", "a"]
    # Three candidates for one place are no character.
    assert next_tokens(ids[:3], a, tokenizer) == ["\ufffd"] * 3


def test_labels_are_shown_with_their_space() -> None:
    assert visible("猫 1/3") == "猫 1/3"
    assert visible(" 猫 2/3") == "·猫 2/3"
    for other in (" 1/3", "猫 3/1", "猫 0/3", "猫 1/1", "猫1/3", "of 4/3"):
        assert Piece.read(other) is None
        assert visible(other) == other.replace(" ", "·")
