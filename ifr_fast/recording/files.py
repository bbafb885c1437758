"""Recordings read back from files, mapped into memory; checked against checksums and the model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, overload

from torch import Tensor

from ..arguments import check_path, holds_integers
from ..errors import FormatError
from ..model.decoder import Decoder
from ..model.masks import causal_mask
from . import mapped_file, prefill
from .mapped_file import MappedFile
from .model_check import check_recording
from .recording import LayerRecording, Recording, RecordingMode
from .shapes import check_shapes

_OF_LAYER = ("resid", "q", "mid", "z", "log_sum_exp", "checked_mid", "alibi_slopes")


class CheckedLayers(Sequence[LayerRecording]):
    """The layers of a file's recording. A layer's tensors are compared with their checksums when it
    is first used; FormatError is raised where they differ.
    """

    def __init__(
        self, file: MappedFile, layers: list[LayerRecording], value_layers: list[int] | None
    ) -> None:
        """value_layers: as `Decoder.value_layers`."""
        self._file, self._layers = file, layers
        self._read = value_layers or list(range(len(layers)))
        self._unchecked = set(range(len(layers)))

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> LayerRecording: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerRecording]: ...
    def __getitem__(self, index: int | slice) -> LayerRecording | list[LayerRecording]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        found = self._layers[index]
        i = index % len(self)
        if i in self._unchecked:
            read = self._read[i]
            names = [f"k.{read}", f"v.{read}", *(f"{name}.{i}" for name in _OF_LAYER)]
            names = [name for name in names if name in self._file.tensors]
            self._file.check(names)
            self._unchecked.discard(i)
        return found


def check_fingerprint(file: MappedFile, model: str) -> None:
    """Raises FormatError for the file of another model. Files without checksums have fingerprints
    of another kind.
    """
    path = file.path
    if file.is_checked and file.fields.get("model") != model:
        raise FormatError(
            f"{path}: was recorded from another model, or with other weights, settings or hooks"
        )


def load(
    path: str | os.PathLike[str], decoder: Decoder, fingerprint: str | None = None
) -> Recording:
    """The recording in a file, mapped into memory. fingerprint: the model's, where it was made
    before the text was run: hooks that keep what they see change it.

    Raises FormatError for a file that is truncated, foreign, unfinished, or of another model.
    """
    file = mapped_file.open_file(check_path("path", path))
    check_fingerprint(file, decoder.fingerprint() if fingerprint is None else fingerprint)
    if file.done < file.total:
        raise FormatError(
            f"{path}: is unfinished, {file.done} of {file.total} steps are recorded; record the "
            "same text with this path to go on"
        )
    try:
        file.check(["token_ids", "checked_rows", "states", "logits"])
        file.check([f"resid.{decoder.n_layers}"])
        token_ids = file.tensors["token_ids"]
        known = (token_ids >= 0) & (token_ids < decoder.vocab_size)
        if token_ids.ndim != 1 or not holds_integers(token_ids) or not bool(known.all()):
            raise ValueError("token ids")
        around = prefill.frame(decoder, token_ids.clone())
        recording = recording_of(decoder, file.tensors, file.fields, around)
        check_shapes(recording)
        try:
            check_recording(path, recording, around.embeddings)
        except FormatError:
            file.check(file.tensors)  # a damaged file is refused as such
            raise
        recording.layers = CheckedLayers(file, list(recording.layers), decoder.value_layers)
        return recording
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise FormatError(f"{path}: not a whole recording ({error!r})") from error


def recording_of(
    decoder: Decoder, tensors: Mapping[str, Tensor], fields: dict[str, Any], around: prefill.Frame
) -> Recording:
    """Makes a recording of tensors by name, and of what only the model knows."""
    layers = []
    for i, (block, facts, call) in enumerate(
        zip(decoder.blocks, around.facts, around.calls, strict=True)
    ):
        window = fields["windows"][i]
        made_by = i if block.value_layer is None else block.value_layer
        layers.append(
            LayerRecording(
                resid_pre=tensors[f"resid.{i}"],
                k=tensors[f"k.{made_by}"],
                v=tensors[f"v.{made_by}"],
                scale=facts.scale,
                window=window,
                softcap=facts.softcap,
                sinks=facts.sinks,
                alibi_slopes=tensors.get(f"alibi_slopes.{i}"),
                mask=causal_mask(window, block.W_O.device),
                call=call,
                q=tensors.get(f"q.{i}"),
                resid_mid=tensors.get(f"mid.{i}"),
                z=tensors.get(f"z.{i}"),
                log_sum_exp=tensors.get(f"log_sum_exp.{i}"),
                checked_mid=tensors.get(f"checked_mid.{i}"),
            )
        )
    return Recording(
        token_ids=tensors["token_ids"].cpu(),
        tokens=list(fields["tokens"]),
        mode=RecordingMode(fields["mode"]),
        layers=layers,
        resid_final=tensors[f"resid.{decoder.n_layers}"],
        states=tensors["states"],
        position=int(fields["position"]),
        logits=tensors["logits"],
        checked_rows=tensors["checked_rows"].cpu(),
        decoder=decoder,
    )
