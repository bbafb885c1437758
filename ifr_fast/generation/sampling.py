"""The choice of the next token, and the tokens that end a generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

ChooseToken = Callable[[Tensor, Tensor], int]  # token ids [T], logits [vocab] -> the next


def chooser(
    *,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    logits_processor: LogitsProcessorList | None,
    generator: torch.Generator | None,
) -> ChooseToken:
    """The function that chooses the next token, in transformers' terms and order. Raises ValueError
    for options that do not fit together.
    """
    if not do_sample and (temperature != 1 or top_k is not None or top_p is not None):
        raise ValueError("do_sample: temperature, top_k and top_p need do_sample=True")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number above 0, at most 1, got {top_p}")
    processors = LogitsProcessorList(logits_processor or [])
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        processors.append(TopPLogitsWarper(float(top_p)))

    def choose(token_ids: Tensor, logits: Tensor) -> int:
        scores = processors(token_ids[None].to(logits.device), logits[None].float())[0]
        if not do_sample:
            return int(scores.argmax())
        weights = scores.softmax(-1)
        if not bool(weights[0].isfinite()):
            raise ValueError(f"temperature: {temperature} leaves no finite scores to draw from")
        return int(torch.multinomial(weights, 1, generator=generator))

    return choose


def stop_tokens(model: Any, given: int | Iterable[int] | None) -> set[int]:
    """The ids that end a generation: those given, or the model's own."""
    if given is None:
        config = getattr(model, "generation_config", None)
        given = getattr(config, "eos_token_id", None)
    if given is None:
        return set()
    return set(given) if isinstance(given, Iterable) else {int(given)}
