"""The next tokens that a model makes most probable, at any position of a recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..arguments import index_within, listed, shown
from ..characters import next_tokens
from ..graph.tables import Prediction
from .recording import Recording

_SHOWN = 5  # tokens of each position
_HEAD_ROWS = 64  # rows whose logits are formed at once


class Predictor:
    """The likeliest next tokens of one text, formed at the positions that are asked for.

    Pickled, it becomes the list of all predictions: neither a model nor its states go along.

    logits_at: gives the logits [R, vocab] at R positions; token_ids: of the text, [T].
    """

    def __init__(
        self,
        logits_at: Callable[[list[int]], Tensor],
        token_ids: Tensor,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self._logits_at, self._token_ids, self._tokenizer = logits_at, token_ids, tokenizer

    @staticmethod
    def of(recording: Recording, tokenizer: PreTrainedTokenizerBase | None) -> Predictor:
        """The predictions of a recording. Only what the head reads is kept of it, so that the rest
        can be freed.
        """
        decoder, states = recording.decoder, recording.states
        position, logits = recording.position, recording.logits

        def logits_at(positions: list[int]) -> Tensor:
            if positions == [position]:
                return logits[None]
            return decoder.head(states[positions].to(decoder.device))

        return Predictor(logits_at, recording.token_ids, tokenizer)

    @torch.inference_mode()
    def __call__(self, positions: list[int]) -> list[list[Prediction]]:
        """The likeliest tokens after each of `positions`, most probable first."""
        T, found = len(self._token_ids), []
        positions = [index_within("positions", t, T) for t in listed("positions", positions)]
        for begin in range(0, len(positions), _HEAD_ROWS):
            some = positions[begin : begin + _HEAD_ROWS]
            before = [self._token_ids[: t + 1] for t in some]
            found += likeliest(self._logits_at(some), self._tokenizer, before)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return KnownPredictions, (self(list(range(len(self._token_ids)))),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Predictor:
        return self


class KnownPredictions:
    """The likeliest next tokens of a text, of every position."""

    def __init__(self, of_each: list[list[Prediction]]) -> None:
        self._of_each = of_each

    def __call__(self, positions: list[int]) -> list[list[Prediction]]:
        """The likeliest tokens after each of `positions`, most probable first."""
        T = len(self._of_each)
        given = listed("positions", positions)
        return [self._of_each[index_within("positions", t, T)] for t in given]


def likeliest(
    logits: Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    before: Sequence[Tensor] | None = None,
) -> list[list[Prediction]]:
    """The tokens that each row of `logits` [R, vocab] makes most probable.

    before: for each row, the ids [T] of the text that its tokens would follow, if known.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits: expected floats [R, vocab], got {shown(logits)}")
    return most_probable(logits.float().softmax(-1), tokenizer, before)


def most_probable(
    probabilities: Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    before: Sequence[Tensor] | None = None,
) -> list[list[Prediction]]:
    """The tokens with the highest of each row of `probabilities` [R, vocab]; before: as above."""
    found = []
    top = probabilities.topk(min(_SHOWN, probabilities.shape[-1]))
    for i, (ids, values) in enumerate(zip(top.indices.cpu(), top.values.tolist(), strict=True)):
        text = ids[:0] if before is None else before[i]
        strings = next_tokens(ids, text, tokenizer)
        found.append([Prediction(*p) for p in zip(strings, ids.tolist(), values, strict=True)])
    return found
