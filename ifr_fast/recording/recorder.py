"""Recorder: text -> Recording, with the mode and the place that memory allows."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..arguments import (
    Position,
    check_choice,
    check_count,
    check_flag,
    check_path,
    spanned,
)
from ..characters import text_tokens
from ..model.decoder import Decoder
from ..tokens import Batch, Text, as_texts, check_tokenizer, encode, is_batch
from .batches import batches
from .chunked import record_in_chunks, record_to_file
from .memory import parse_bytes
from .plan import Place, Plan, make_plan, room_now
from .prefill import is_chunkable
from .record import record, record_together
from .recording import Recording, RecordingMode
from .sizes import Sizes
from .speed import Speed, measure_speed

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Result = TypeVar("Result")


class Recorder:
    """Records texts with one model.

    max_memory: bytes of the model's device, its weights included; None: what is free.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase | None,
        max_memory: int | None,
    ) -> None:
        check_tokenizer(tokenizer)
        self.decoder, self.tokenizer, self.max_memory = decoder, tokenizer, max_memory

    def encode(self, text: Text, add_special_tokens: bool | None) -> Tensor:
        """Token ids [T] of a text, on the CPU. Raises ValueError for a text that does not fit."""
        if add_special_tokens is not None:
            check_flag("add_special_tokens", add_special_tokens)
        token_ids = encode(text, self.tokenizer, add_special_tokens)
        limit, vocab = self.decoder.max_length, self.decoder.vocab_size
        if limit is not None and len(token_ids) > limit:
            raise ValueError(
                f"text: has {len(token_ids)} tokens, the model's context holds {limit}"
            )
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= vocab:
            raise ValueError(f"text: token ids must be from 0 to {vocab - 1}")
        return token_ids

    def encoded(
        self, text: Text | Recording, add_special_tokens: bool | None
    ) -> Tensor | Recording:
        """Token ids [T] of a text; a Recording is returned as it is."""
        if isinstance(text, Recording):
            return self.own(text)
        return self.encode(text, add_special_tokens)

    def own(self, recording: Recording) -> Recording:
        """The recording itself. Raises ValueError where another model was recorded."""
        if recording.decoder is not self.decoder:
            raise ValueError("text: this Recording was made by another Tracer")
        return recording

    def record(
        self,
        text: Text | Recording,
        mode: RecordingMode | str | None = None,
        path: str | os.PathLike[str] | None = None,
        add_special_tokens: bool | None = None,
    ) -> Recording:
        """One forward pass over a text (`Tracer.record`); a Recording is returned as it is."""
        encoded = self.encoded(text, add_special_tokens)
        if isinstance(encoded, Recording):
            return encoded
        return self.record_tokens(encoded, -1, mode, path)

    def record_at(
        self,
        text: Text | Recording,
        position: Position,
        weights: Sequence[float] | Tensor | None,
        add_special_tokens: bool | None,
    ) -> Recording:
        """A recording of a text whose logits are those at the last position that `position` names.

        Raises ValueError, before the model runs, where `arguments.spanned` does.
        """
        encoded = self.encoded(text, add_special_tokens)
        starts = spanned(position, weights, len(encoded))
        if isinstance(encoded, Recording):
            return encoded
        return self.record_tokens(encoded, max(starts))

    def record_tokens(
        self,
        token_ids: Tensor,
        position: int,
        mode: RecordingMode | str | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> Recording:
        """One forward pass over `token_ids` [T] whose logits are those at `position`."""
        mode = check_mode(mode)
        if path is not None:
            path = check_path("path", path)
        if path is not None and mode == RecordingMode.FULL:
            raise ValueError("path: only lean recordings are made in a file; save a full one")
        strings = text_tokens(token_ids, self.tokenizer)
        decoder = self.decoder
        if path is not None:
            decoder.refuse_recurrences("its recordings are kept in memory alone")
        if path is not None and not is_chunkable(decoder):
            return record_to_file(decoder, token_ids, strings, path, position)
        plan = self._plan(len(token_ids), mode=mode, path=path)
        if plan.chunk_rows is None:
            return record(decoder, token_ids, strings, plan.mode, position)
        place = {Place.DEVICE: decoder.device, Place.HOST: torch.device("cpu"), Place.FILE: None}
        return record_in_chunks(
            decoder, token_ids, strings, position, place=place[plan.place], path=path
        )

    def is_batch(self, text: Any, batch_size: int | None) -> TypeIs[Batch]:
        """True for several texts (`tokens.is_batch`). Raises ValueError for a `batch_size` that is
        invalid, whether it is used or not.
        """
        if batch_size is not None:
            check_count("batch_size", batch_size)
        return is_batch(text)

    def each(
        self,
        batch: Batch,
        use: Callable[[Recording], Result],
        batch_size: int | None,
        position: Position,
        add_special_tokens: bool | None,
        mode: RecordingMode | str | None = None,
    ) -> list[Result]:
        """Results of `use` for the recording of each text of a batch, in order.

        position: one at which `use` will look, of each text.
        """
        texts = []
        for i, text in enumerate(as_texts(batch)):
            try:
                texts.append(self.encode(text, add_special_tokens))
            except ValueError as error:
                raise ValueError(f"text {i}: {str(error).removeprefix('text: ')}") from error
        positions = [max(spanned(position, None, len(text))) for text in texts]
        found: dict[int, Result] = {}
        for together in batches(self.decoder, [len(text) for text in texts], batch_size):
            recordings = self._record_together(
                [texts[i] for i in together], [positions[i] for i in together], mode
            )
            for i, recording in zip(together, recordings, strict=True):
                found[i] = use(recording)
        return [found[i] for i in range(len(texts))]

    def _record_together(
        self, texts: list[Tensor], positions: list[int], mode: RecordingMode | str | None
    ) -> list[Recording]:
        if len(texts) == 1:
            return [self.record_tokens(texts[0], positions[0], mode)]
        mode = check_mode(mode) or self._plan(len(texts) * len(texts[0])).mode
        strings = [text_tokens(text, self.tokenizer) for text in texts]
        return record_together(self.decoder, texts, strings, mode, positions)

    def plan(
        self,
        n_tokens: int,
        mode: RecordingMode | str | None = None,
        path: str | os.PathLike[str] | None = None,
        max_memory: int | str | None = None,
    ) -> Plan:
        """The plan for a text of `n_tokens`, with the time to expect, as `Tracer.plan` says."""
        n_tokens = check_count("n_tokens", n_tokens)
        plan = self._plan(
            n_tokens,
            mode=check_mode(mode),
            path=None if path is None else check_path("path", path),
            max_memory=None if max_memory is None else parse_bytes(max_memory),
        )
        return replace(plan, seconds=self._speed.seconds(self.decoder, n_tokens))

    @functools.cached_property
    def _speed(self) -> Speed:
        return measure_speed(self.decoder)

    @functools.cached_property
    def _sizes(self) -> Sizes:
        return Sizes.of(self.decoder)

    def _plan(
        self,
        n_tokens: int,
        *,
        mode: RecordingMode | None = None,
        path: str | os.PathLike[str] | None = None,
        max_memory: int | None = None,
    ) -> Plan:
        sizes = self._sizes
        room = room_now(
            sizes.device,
            sizes.weights_bytes + sizes.maps_bytes,
            self.max_memory if max_memory is None else max_memory,
            None if path is None else str(Path(path).absolute().parent),
        )
        if path is not None and Path(path).exists():  # its blocks are its own already
            room = room._replace(disk=None)
        place = None if path is None else Place.FILE
        return make_plan(sizes, n_tokens, room, mode=mode, place=place)


def check_mode(mode: RecordingMode | str | None) -> RecordingMode | None:
    """The mode as a RecordingMode. Raises ValueError for any other string."""
    if mode is None:
        return None
    return RecordingMode(check_choice("mode", mode, list(RecordingMode)))
