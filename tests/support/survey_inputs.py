"""A tiny model with a tokenizer in a directory, and text for it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ifr_fast.survey import Survey

# Parts of a few documents, so that there are several.
SMALL: dict[str, Any] = {"window_tokens": 100, "batch_tokens": 64, "thresholds": (0.02, 0.05)}

_TEXT = "the cat sat on a mat and unbelievable rivers ran past it , then stopped . why ?"
WORDS = _TEXT.split()
MERGES = [("t", "h"), ("th", "e"), ("a", "t"), ("i", "v"), ("Ġ", "the"), ("Ġ", "c"), ("r", "iv")]


def byte_tokenizer(
    merges: list[tuple[str, str]], *, first: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and of some merges; first: it begins texts with `<s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", *alphabet])}
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if first:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def save_tiny(folder: Path, *, seed: int = 0, first: bool = False) -> Path:
    """A random Llama over a byte-level tokenizer; first: one that begins texts with `<s>`."""
    fast = byte_tokenizer(MERGES, first=first)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=36,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=50,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(20 if "embed" in name else 8)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def sentence(seed: int, n_words: int = 12) -> str:
    """Words, the same for the same seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def write_records(path: Path, n: int, n_words: int = 12) -> Path:
    """A JSONL file of n documents, of unequal length."""
    lines = [{"text": sentence(i, 4 + (7 * i) % n_words), "kind": "ab"[i % 2]} for i in range(n)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def assert_same_rows(a: Survey, b: Survey) -> None:
    """Bit for bit, in all tables, and problems."""
    for table in ("predictions", "heads", "corpora"):
        mine, theirs = (getattr(x, table).read() for x in (a, b))
        assert list(mine) == list(theirs)
        for name in mine:
            assert_same(mine[name], theirs[name], name)
    assert a.problems == b.problems
    assert a.part_numbers == b.part_numbers


def assert_same(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], name: str) -> None:
    if x.dtype == object:
        assert x.tolist() == y.tolist(), name
    else:
        assert x.dtype == y.dtype, name
        assert x.tobytes() == y.tobytes(), name
