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

from ..arguments import as_index, check_count, check_flag, check_number, listed, shown

ChooseToken = Callable[[Tensor, Tensor], int]  # token ids [T], logits [vocab] -> the next


def chooser(
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
    do_sample = check_flag("do_sample", do_sample)
    temperature = check_number("temperature", temperature, "a number above 0", above=0)
    if top_k is not None:
        top_k = check_count("top_k", top_k)
    if top_p is not None:
        top_p = check_number("top_p", top_p, "a number above 0, at most 1", above=0, high=1)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator: expected a torch.Generator, got {shown(generator)}")
    given = [] if logits_processor is None else listed("logits_processor", logits_processor)
    if not all(callable(x) for x in given):
        raise ValueError(f"logits_processor: expected functions, got {shown(given)}")
    if not do_sample and (temperature != 1 or top_k is not None or top_p is not None):
        raise ValueError("do_sample: temperature, top_k and top_p need do_sample=True")
    processors = LogitsProcessorList(given)
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        processors.append(TopPLogitsWarper(top_p))

    def choose(token_ids: Tensor, logits: Tensor) -> int:
        scores = processors(token_ids[None].to(logits.device), logits[None].float())[0]
        if not do_sample:
            return int(scores.argmax())
        weights = scores.softmax(-1)
        if not bool(weights[0].isfinite()):
            raise ValueError(f"temperature: {temperature} leaves no finite scores to draw from")
        return int(torch.multinomial(weights, 1, generator=generator))

    return choose


def stop_tokens(model: Any, given: int | Iterable[int] | None, vocab_size: int) -> set[int]:
    """The ids that end a generation: those given, or the model's own. Raises ValueError for ids
    that are no ints, and for given ones that are outside of the model's vocabulary.
    """
    own = given is None
    if own:
        config = getattr(model, "generation_config", None)
        given = getattr(config, "eos_token_id", None)
    if given is None:
        return set()
    several = listed("eos_token_id", given) if isinstance(given, Iterable) else [given]
    if own:
        return {as_index("eos_token_id", i) for i in several}
    return {check_count("eos_token_id", i, 0, vocab_size - 1) for i in several}
