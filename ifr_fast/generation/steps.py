"""The tokens of a generation, one after another, and the check that decode steps are exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..characters import next_tokens
from ..errors import IfrError, UnsupportedArchitectureError
from ..graph.tables import Granularity
from ..model.block import HALF
from ..model.interface import attention_through
from ..model.opening import probe_tokens
from ..recording.predictions import most_probable
from ..recording.recorder import Recorder
from ..recording.recording import Recording
from ..routes.route_graph import RouteGraph
from ..scoring.implementations import Kernel
from .generation import Generation
from .sampling import ChooseToken


class GenerationStep(NamedTuple):
    """A token that was generated."""

    token_id: int
    token: str
    probability: float  # the model's own, before temperature, top_k, top_p
    graph: RouteGraph  # routes of the prediction that chose it, at the position before it


def steps(
    recorder: Recorder,
    kernel: Kernel,
    text: Tensor | Recording,
    choose: ChooseToken,
    stop: set[int],
    max_new_tokens: int,
    threshold: float,
    granularity: Granularity,
) -> Iterator[GenerationStep]:
    """Yields tokens until one of `stop`, `max_new_tokens` of them, or the end of the context.

    text: token ids [T], or their recording.
    """
    decoder, tokenizer = recorder.decoder, recorder.tokenizer
    decoder.refuse_recurrences("its states are not carried from token to token here")
    _check_steps(recorder, kernel)
    recording = _record_ahead(recorder, text, max_new_tokens)
    generation = Generation(recorder, kernel, recording, threshold, granularity, max_new_tokens)
    del text, recording  # the generation has their keys and values in its own store
    logits = generation.first_logits()
    for i in range(max_new_tokens):
        probabilities = logits.float().softmax(-1)
        if not bool(probabilities[0].isfinite()):  # one logit that is not makes all of these NaN
            raise IfrError("text: the model's logits are not finite; try a wider torch_dtype")
        token_id = choose(generation.token_ids, logits)
        (token,) = next_tokens(torch.tensor([token_id]), generation.token_ids, tokenizer)
        (predictions,) = most_probable(probabilities[None], tokenizer, [generation.token_ids])
        graph = generation.graph(predictions)
        yield GenerationStep(token_id, token, float(probabilities[token_id]), graph)
        full = decoder.max_length is not None and len(generation.token_ids) >= decoder.max_length
        if token_id in stop or i + 1 == max_new_tokens or full:
            return
        logits = generation.append(token_id)


def _record_ahead(recorder: Recorder, text: Tensor | Recording, n_ahead: int) -> Recording:
    """A recording of a text that `n_ahead` tokens will follow.

    Where masks are tensors they show nothing of rows that do not exist yet, so the text is
    recorded with that many more tokens behind it, which change nothing before them, and cut.
    """
    if recorder.decoder.attention_through is attention_through:
        return recorder.record(text)
    token_ids = text.token_ids if isinstance(text, Recording) else text
    T, limit = len(token_ids), recorder.decoder.max_length
    n_ahead = n_ahead if limit is None else min(n_ahead, limit - T)
    longer = recorder.record(torch.cat([token_ids, token_ids[-1:].expand(n_ahead)]))

    def cut(x: Tensor | None) -> Any:
        return None if x is None else x[:T]

    layers = [
        dataclasses.replace(
            x,
            **{
                name: cut(getattr(x, name))
                for name in ("resid_pre", "k", "v", "q", "resid_mid", "z", "log_sum_exp")
            },
        )
        for x in longer.layers
    ]
    return dataclasses.replace(
        longer,
        token_ids=token_ids,
        tokens=longer.tokens[:T],
        layers=layers,
        resid_final=longer.resid_final[:T],
        states=longer.states[:T],
    )


def _check_steps(recorder: Recorder, kernel: Kernel) -> None:
    """Raises UnsupportedArchitectureError where a decode step gives other logits than a whole
    pass; once for each model, on a short probe.
    """
    decoder = recorder.decoder
    token_ids = probe_tokens(decoder)
    if decoder.steps_checked or len(token_ids) < 2:
        return

    def error_of_step(T: int) -> float:
        expected = recorder.record(token_ids[:T]).logits.float()
        recording = _record_ahead(recorder, token_ids[: T - 1], 1)
        begun = Generation(recorder, kernel, recording, 1.0, "token", 1)
        got = begun.append(int(token_ids[T - 1])).float()
        norm = torch.linalg.vector_norm
        return float(norm(got - expected) / norm(expected))

    T, tolerance = len(token_ids), max(1e-3, 8 * torch.finfo(decoder.dtype).eps)

    def errors_of_steps() -> list[float]:
        errors = [error_of_step(T)]
        if not errors[0] <= tolerance and decoder.dtype in HALF and T > 3:
            # Rounding can flip a choice of experts at one step; hardly at the two before, too.
            errors = [error_of_step(T - 1), error_of_step(T - 2)]
        return errors

    errors = errors_of_steps()
    if not max(errors) <= tolerance and decoder.takes_past:
        decoder.counts_past = True
        with suppress(Exception):  # the model's own code may take no such cache
            errors = errors_of_steps()
    if not max(errors) <= tolerance:
        decoder.counts_past = False
        raise UnsupportedArchitectureError(
            f"model: {type(decoder.model).__name__} cannot generate here: one token run on its "
            f"own gives other logits than the whole text (relative error {max(errors):.1e})"
        )
    decoder.steps_checked = True
