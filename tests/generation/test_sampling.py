"""Choice of the next token, against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generating import NEW, OPTIONS, PROMPT, whole
from opened import tiny_tracer
from tiny import tiny_text
from torch import Tensor


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 7}, {"temperature": 1.7, "top_p": 0.8}]
)
def test_sampling_is_that_of_transformers(options: dict[str, Any]) -> None:
    tracer = tiny_tracer("llama")
    model = tracer.model
    prompt = tiny_text(PROMPT)
    theirs = {"top_k": 0, **options}

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return whole(prompt, list(tracer.generate(prompt, do_sample=True, **OPTIONS, **options)))

    list(tracer.generate(prompt, max_new_tokens=1))
    torch.manual_seed(3)
    with torch.no_grad():
        expected = model.generate(
            prompt[None], attention_mask=torch.ones(1, PROMPT, dtype=torch.long), do_sample=True,
            max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, **theirs,
        )[0]  # fmt: skip
    assert torch.equal(seeded(3), expected)
    assert any(not torch.equal(seeded(s), expected) for s in range(4, 8))
    mine = [
        whole(
            prompt,
            list(
                tracer.generate(
                    prompt, do_sample=True, generator=torch.Generator().manual_seed(5),
                    **OPTIONS, **options,
                )
            ),
        )
        for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(*mine)


def test_a_processor_sees_what_was_generated() -> None:
    tracer = tiny_tracer("llama")

    def never_again(token_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, token_ids[0], float("-inf"))

    steps = list(tracer.generate(tiny_text(PROMPT), logits_processor=[never_again], **OPTIONS))
    text = whole(tiny_text(PROMPT), steps).tolist()
    assert len(set(text)) == len(set(text[:PROMPT])) + NEW
