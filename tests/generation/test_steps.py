"""The end of generation, and options that are refused before its first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generating import NEW, OPTIONS, PROMPT
from opened import tiny_tracer
from tiny import VOCAB, tiny_model, tiny_text

from ifr_fast import Tracer, UnsupportedArchitectureError


def test_it_ends_with_eos_and_with_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = tiny_tracer("llama")
    prompt = tiny_text(PROMPT)
    ids = [step.token_id for step in tracer.generate(prompt, **OPTIONS)]
    end = next(t for t in ids[2:] if t not in ids[:2])
    unused = next(t for t in range(VOCAB) if t not in ids)
    for eos in (end, [end, unused]):
        got = [s.token_id for s in tracer.generate(prompt, **OPTIONS | {"eos_token_id": eos})]
        assert got == ids[: ids.index(end) + 1]
    monkeypatch.setattr(tracer.model.generation_config, "eos_token_id", end)
    got = [s.token_id for s in tracer.generate(prompt, max_new_tokens=NEW)]
    assert got == ids[: ids.index(end) + 1]

    limit = tracer.decoder.max_length
    steps = list(tracer.generate(tiny_text(limit - 2), **OPTIONS))
    assert len(steps) == 3  # the last is predicted after the last position
    assert steps[-1].graph.position == limit - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_models_that_cannot_take_one_token_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    tracer = Tracer(tiny_model(name, dtype=dtype))  # a Tracer checks this once
    monkeypatch.setattr(tracer.decoder, "_takes_positions", False)
    monkeypatch.setattr(tracer.decoder, "takes_past", False)
    with pytest.raises(UnsupportedArchitectureError, match="cannot generate"):
        next(tracer.generate(tiny_text(PROMPT)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"threshold": 2}, "threshold"),
        ({"granularity": "both"}, "granularity"),
        ({"temperature": 0.5}, "do_sample"),
        ({"do_sample": True, "temperature": 0}, "temperature"),
        ({"do_sample": True, "top_k": 0}, "top_k"),
        ({"do_sample": True, "top_p": 0}, "top_p"),
        ({"do_sample": True, "top_p": 1.1}, "top_p"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_tracer("llama").generate(tiny_text(4), **options)


@pytest.mark.parametrize("prompt", [[], "text", [VOCAB], None])
def test_bad_prompts_are_refused_at_once(prompt: Any) -> None:
    with pytest.raises(ValueError, match="text"):
        tiny_tracer("llama").generate(prompt)
