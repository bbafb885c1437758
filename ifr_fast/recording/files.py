"""Recordings read back from files, mapped into memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import FormatError
from ..model.decoder import Decoder
from ..model.masks import causal_mask
from . import mapped_file, prefill
from .recording import LayerRecording, Recording, RecordingMode


def check_model(path: str | os.PathLike[str], fields: dict[str, Any], model: str) -> None:
    if fields.get("model") != model:
        raise FormatError(f"{path}: was recorded from another model, or with other weights")


def load(path: str | os.PathLike[str], decoder: Decoder) -> Recording:
    """The recording in a file, mapped into memory.

    Raises FormatError for a file that is truncated, foreign, unfinished, or of another model.
    """
    file = mapped_file.open_file(path)
    check_model(path, file.fields, decoder.fingerprint())
    if file.done < file.total:
        raise FormatError(
            f"{path}: is unfinished, {file.done} of {file.total} steps are recorded; record the "
            "same text with this path to go on"
        )
    try:
        token_ids = file.tensors["token_ids"]
        if not bool(((token_ids >= 0) & (token_ids < decoder.vocab_size)).all()):
            raise ValueError("token ids")
        return recording_of(
            decoder, file.tensors, file.fields, prefill.frame(decoder, token_ids.clone())
        )
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
        layers.append(
            LayerRecording(
                resid_pre=tensors[f"resid.{i}"],
                k=tensors[f"k.{i}"],
                v=tensors[f"v.{i}"],
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
