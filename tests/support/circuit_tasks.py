"""Small tasks, and a tokenizer and a model for the words of the real ones."""

from __future__ import annotations

from functools import cache

import torch
from tiny import tiny_text
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ifr_fast import Tracer
from ifr_fast.circuits import Prompt, Task
from ifr_fast.circuits.tasks import EVENTS, IOI_TEMPLATES, NAMES, OBJECTS, PLACES


@cache
def word_tokenizer(digits: str = r"\d{2}", but: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token for each word; numbers in pieces of `digits`; names in `but` are two tokens."""
    words = [*NAMES, *PLACES, *OBJECTS, *EVENTS]
    words += " ".join([*IOI_TEMPLATES, "The with lasted from the year to"]).split()
    words = [w.strip(".,") for w in words if "{" not in w] + [".", ","]
    words += [f"{i:02}" for i in range(100)] + [str(i) for i in range(10)]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(["?", *words])) if w not in but}
    for name in but:
        for half in (name[:2], name[2:]):
            vocabulary.setdefault(half, len(vocabulary) + len(but))
    ids = {w: i for i, w in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    pieces = "|".join([*(f"{n[:2]}(?={n[2:]})|(?<={n[:2]}){n[2:]}" for n in but)])
    pattern = Regex("|".join(filter(None, [pieces, digits, r"[A-Za-z]+", r"[.,]"])))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pattern, "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


@cache
def word_tracer() -> Tracer:
    """The model of the words, opened once for all tests."""
    tokenizer = word_tokenizer()
    return Tracer(word_model(tokenizer), tokenizer)


def word_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def small_task(n: int = 3, shortest: int = 7) -> Task:
    """Texts of several lengths; each differs from its corrupted text from another position on."""
    prompts = []
    for i in range(n):
        ids = tiny_text(shortest + 2 * i, seed=i).tolist()
        corrupted = [x if t < 2 + i else (x + 5) % 97 for t, x in enumerate(ids)]
        prompts.append(Prompt("", "", ids, corrupted, [7, 8], [3], [], "", {}))
    return Task("small", 0, prompts)
