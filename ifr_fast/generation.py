"""Generation, token by token, each with the route graph of the prediction that chose it.

1. Record the prompt's forward pass. Its keys and values begin a store that grows with the text.
2. A new token is run through the model alone, its attention reading the store: a decode step. As
   the pass leaves a layer, the new row of that layer is scored, its keys and values still at
   hand, and what it was scored from is forgotten.
3. What a node (layer, position) is made of never changes once it is scored, so it is scored once
   in all of a generation. A step's graph is what its last-layer node reaches over the nodes
   known; rows of the prompt that none has reached before are scored from the recording.

So a route costs a row of each layer, not a pass. Between two tokens the model is as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from . import capture
from .decoding import Decoding, NewRows
from .errors import IfrError, UnsupportedArchitectureError
from .graph import Granularity, LayerTable, Prediction, RouteGraph, in_order
from .lens import most_probable
from .model import HALF, probe_tokens
from .nodes import Nodes
from .recording import Recording
from .scoring import (
    check_closed,
    check_closure,
    closure_rows,
    load_kernel,
    score_layer,
)
from .tokens import token_strings

if TYPE_CHECKING:
    from .tracer import Tracer

_ROOM = 1024  # tokens that a store has room for at first, at most, beyond the prompt

ChooseToken = Callable[[Tensor, Tensor], int]  # token ids [T], logits [vocab] -> the next


class GenerationStep(NamedTuple):
    """A token that was generated."""

    token_id: int
    token: str
    probability: float  # that the model gave it, before temperature, top_k, top_p
    graph: RouteGraph  # of the prediction that chose it, made at the position before it


def chooser(
    *,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    logits_processor: LogitsProcessorList | None,
    generator: torch.Generator | None,
) -> ChooseToken:
    """How the next token is chosen, in transformers' terms and order. Raises ValueError."""
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


class Generation:
    """A text that grows, and the nodes of it that have been scored."""

    def __init__(
        self,
        tracer: Tracer,
        recording: Recording,
        threshold: float,
        granularity: Granularity,
        n_ahead: int,
    ) -> None:
        self._tracer, self._decoder = tracer, tracer.decoder
        self._kernel = load_kernel(tracer.impl)
        self._room = min(n_ahead, _ROOM)
        self._threshold, self._granularity = threshold, granularity
        self.token_ids = recording.token_ids
        self.tokens = list(recording.tokens)
        self._begin(recording)

    def _begin(self, recording: Recording) -> None:
        decoder = self._decoder
        self._nodes = Nodes(decoder.n_layers, self._threshold, self._granularity)
        self._device = decoder.blocks[-1].W_O.device  # a recording may lie elsewhere
        self._decoding = Decoding(
            decoder, recording.layers, self._room, self._tracer.impl, self._threshold, self._device
        )
        self._recording = dataclasses.replace(recording, layers=[])
        self._rotary = decoder.rotary_regime(len(recording))

    @torch.inference_mode()
    def first_logits(self) -> Tensor:
        """[vocab] of the prompt's next token."""
        recording = self._recording
        if recording.position == len(recording) - 1:
            return recording.logits
        return self._decoder.head(recording.states[-1:])[0]

    @torch.inference_mode()
    def append(self, token_id: int) -> Tensor:
        """Adds a token to the text: a decode step, in which its row of each layer is scored.

        Returns the logits [vocab] of the token after it.
        """
        position = len(self.token_ids)
        self.token_ids = torch.cat([self.token_ids, torch.tensor([token_id])])
        self.tokens += token_strings(self.token_ids[-1:], self._tracer.tokenizer)
        if self._decoder.rotary_regime(position + 1) != self._rotary:
            # Every key would be another in a text of this length.
            self._begin(self._tracer.record(self.token_ids))
            return self.first_logits()
        logits, rows_of_alike = self._decoding.step(token_id, position)
        for rows in rows_of_alike:
            self._keep_rows(rows, position)
        return logits

    def _keep_rows(self, rows: NewRows, position: int) -> None:
        """Makes nodes of the rows that were scored last."""
        numbers, scores = rows.layers, rows.scores
        of_ffn, ffn_residual, ffn_unattributed = scores.ffn, None, None
        if rows.resid_post is not None:
            ffn_residual, of_ffn, ffn_unattributed = self._kernel.score_ffn(rows.y, rows.resid_post)
            ffn_residual = ffn_residual.float()
        assert of_ffn is not None
        closure = closure_rows(rows.y, rows.resid_pre, rows.ffn, rows.bias, scores.linear)
        check_closed(closure, numbers)
        table = LayerTable(
            torch.arange(len(numbers), device=rows.y.device),
            scores.residual.float(),
            of_ffn.float(),
            ffn_residual,
            scores.edges,
            scores.unattributed,
            ffn_unattributed,
        )
        self._nodes.add(table, numbers, [position] * len(numbers))

    @torch.inference_mode()
    def graph(self, predictions: list[Prediction]) -> RouteGraph:
        """Of the predictions made at the end of the text so far."""
        decoder, end = self._decoder, len(self.token_ids)
        reached, closures, nodes = {end - 1}, {}, self._nodes
        found: list[int] = []
        with ExitStack() as stack:
            recording: Recording | None = None
            for layer in reversed(range(decoder.n_layers)):
                at = nodes.at[layer]
                missing = sorted(t for t in reached if t not in at)
                if missing:
                    if recording is None:
                        recording = dataclasses.replace(
                            self._recording, layers=self._decoding.recorded
                        )
                        stack.enter_context(self._tracer._replaying(recording))
                    rows = torch.tensor(missing)
                    scores = score_layer(recording, layer, rows, self._threshold, self._tracer.impl)
                    closures[layer] = scores.closure
                    nodes.add(scores.table(self._device), [layer] * len(missing), missing)
                here = [at[t] for t in reached]
                found += here
                reached = set().union(*[nodes.below[i] for i in here])
        if closures:
            check_closure(closures)
        at_all = np.array(found)
        return in_order(
            torch.from_numpy(nodes.edges.of(at_all)).T,
            torch.from_numpy(nodes.heads.of(at_all)).T,
            nodes.flags(found),
            [block.parallel for block in decoder.blocks],
            tokens=list(self.tokens),
            token_ids=self.token_ids,
            position=end - 1,
            threshold=self._threshold,
            granularity=self._granularity,
            n_layers=decoder.n_layers,
            n_heads=decoder.n_heads,
            predictions=predictions,
        )


def stop_tokens(model: Any, given: int | Iterable[int] | None) -> set[int]:
    """The ids that end a generation: those given, or the model's own."""
    if given is None:
        config = getattr(model, "generation_config", None)
        given = getattr(config, "eos_token_id", None)
    if given is None:
        return set()
    return set(given) if isinstance(given, Iterable) else {int(given)}


def steps(
    tracer: Tracer,
    text: Tensor | Recording,
    choose: ChooseToken,
    stop: set[int],
    max_new_tokens: int,
    threshold: float,
    granularity: Granularity,
) -> Iterator[GenerationStep]:
    """Token after token, until one of `stop`, as many as asked for, or the context's end.

    text: token ids [T], or their recording.
    """
    decoder = tracer.decoder
    _check_steps(tracer)
    recording = _record_ahead(tracer, text, max_new_tokens)
    generation = Generation(tracer, recording, threshold, granularity, max_new_tokens)
    del text, recording  # whose keys and values the generation has in its own store
    logits = generation.first_logits()
    for i in range(max_new_tokens):
        probabilities = logits.float().softmax(-1)
        if not bool(probabilities[0].isfinite()):  # one logit that is not makes all of these NaN
            raise IfrError("text: the model's logits are not finite; try a wider torch_dtype")
        token_id = choose(generation.token_ids, logits)
        (token,) = token_strings(torch.tensor([token_id]), tracer.tokenizer)
        (predictions,) = most_probable(probabilities[None], tracer.tokenizer)
        graph = generation.graph(predictions)
        yield GenerationStep(token_id, token, float(probabilities[token_id]), graph)
        full = decoder.max_length is not None and len(generation.token_ids) >= decoder.max_length
        if token_id in stop or i + 1 == max_new_tokens or full:
            return
        logits = generation.append(token_id)


def _record_ahead(tracer: Tracer, text: Tensor | Recording, n_ahead: int) -> Recording:
    """A recording of a text that `n_ahead` tokens will follow.

    Where masks are tensors they show nothing of rows that do not exist yet, so the text is
    recorded with that many more tokens behind it, which change nothing before them, and cut.
    """
    if tracer.decoder.attention_through is capture.attention_through:
        return tracer.record(text)
    token_ids = text.token_ids if isinstance(text, Recording) else text
    T, limit = len(token_ids), tracer.decoder.max_length
    n_ahead = n_ahead if limit is None else min(n_ahead, limit - T)
    longer = tracer.record(torch.cat([token_ids, token_ids[-1:].expand(n_ahead)]))

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


def _check_steps(tracer: Tracer) -> None:
    """Raises UnsupportedArchitectureError where a decode step gives other logits than a whole
    pass; once for each model, on a short probe.
    """
    decoder = tracer.decoder
    token_ids = probe_tokens(decoder)
    if decoder.steps_checked or len(token_ids) < 2:
        return

    def error_of_step(T: int) -> float:
        expected = tracer.record(token_ids[:T]).logits.float()
        begun = Generation(tracer, _record_ahead(tracer, token_ids[: T - 1], 1), 1.0, "token", 1)
        got = begun.append(int(token_ids[T - 1])).float()
        norm = torch.linalg.vector_norm
        return float(norm(got - expected) / norm(expected))

    T, tolerance = len(token_ids), max(1e-3, 8 * torch.finfo(decoder.dtype).eps)
    errors = [error_of_step(T)]
    if not errors[0] <= tolerance and decoder.dtype in HALF and T > 3:
        # Rounding can flip a choice of experts at one step; hardly at the two before, too.
        errors = [error_of_step(T - 1), error_of_step(T - 2)]
    if not all(error <= tolerance for error in errors):
        raise UnsupportedArchitectureError(
            f"model: {type(decoder.model).__name__} cannot generate here: one token run on its "
            f"own gives other logits than the whole text (relative error {max(errors):.1e})"
        )
    decoder.steps_checked = True
