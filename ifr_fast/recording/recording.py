"""Recording: one forward pass, holding what the scores of any row of any layer need.

Lean: the residual stream at every layer, keys and values; q and `resid_mid` of a row come from
replaying its layer on that row alone. Full: q and `resid_mid` too, which saves the replays. The
two give the same graphs; `Tracer.plan` chooses by memory. Nothing is copied: the tensors are the
forward pass's own, held instead of freed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor

from ..arguments import check_path
from ..model.attention import Recurrence
from ..model.decoder import Decoder
from ..model.hooks import LayerCall
from ..model.interface import check_autocast
from ..model.masks import LazyMask
from . import mapped_file


class RecordingMode(StrEnum):
    """The tensors that a recording holds of each layer."""

    LEAN = "lean"  # resid_pre, k, v
    FULL = "full"  # also q, resid_mid, log_sum_exp if there is one, z where `Block.fits_rows`


@dataclass(eq=False)
class LayerRecording:
    """One layer's share of a Recording; T positions, on the layer's device."""

    resid_pre: Tensor  # [T, D]
    k: Tensor  # [T, H_kv, K]
    v: Tensor  # [T, H_kv, V]
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None  # [H]
    alibi_slopes: Tensor | None  # [H]
    mask: LazyMask
    call: LayerCall
    q: Tensor | None = None  # [T, H, K]
    resid_mid: Tensor | None = None  # [T, D]; parallel blocks: resid_pre + attention
    z: Tensor | None = None  # [T, H, V] attention output
    log_sum_exp: Tensor | None = None  # [T, H] of the scores, where the forward pass gave it
    checked_mid: Tensor | None = None  # [C, D] lean: resid_mid at Recording.checked_rows
    recurrence: Recurrence | None = None  # linear attention: of this text


@dataclass(eq=False)
class Recording:
    """One text's forward pass, ready to be traced at any position and threshold."""

    token_ids: Tensor  # [T] int64, on the CPU
    tokens: list[str]
    mode: RecordingMode
    layers: Sequence[LayerRecording]
    resid_final: Tensor  # [T, D] resid_post of the last layer
    states: Tensor  # [T, D] what the head reads
    position: int  # the forward pass predicted the token after this one
    logits: Tensor  # [vocab] at `position`
    checked_rows: Tensor  # [C] int64, on the CPU: rows whose resid_mid a lean recording holds
    decoder: Decoder  # the model that was recorded

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_replayed(self) -> bool:
        """True if scoring it runs layers again, for tensors that it does not hold."""
        again = any(block.runs_again for block in self.decoder.blocks)
        return again or self.mode is RecordingMode.LEAN

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Within, layers can be replayed where the recording needs it. Raises IfrError where
        autocast is active: it would round the scores too.
        """
        check_autocast(self.decoder.model)
        with self.decoder.replaying() if self.is_replayed else nullcontext():
            yield

    def resid_post(self, layer: int) -> Tensor:
        """The residual stream [T, D] after a layer."""
        return (
            self.layers[layer + 1].resid_pre if layer + 1 < len(self.layers) else self.resid_final
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves it as safetensors, for `Tracer.load_recording` with the same model.

        Raises UnsupportedArchitectureError where the model has linear attention.
        """
        self.decoder.refuse_recurrences("its recordings are kept in memory alone")
        mapped_file.write(check_path("path", path), _tensors(self), _fields(self))

    @property
    def nbytes(self) -> int:
        """Bytes that are held; a storage that several tensors share is counted once.

        Recordings of one batch share their storages: each counts all of them. The few rows in
        `checked_mid` are left out, as in `Plan`.
        """
        storages = {}
        for layer in self.layers:
            of_layer = (layer.resid_pre, layer.k, layer.v, layer.q, layer.resid_mid, layer.z)
            made_of = layer.recurrence
            of_recurrence = () if made_of is None else (*made_of.parts, made_of.z)
            for x in (*of_layer, layer.log_sum_exp, *of_recurrence):
                if x is not None:
                    storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        for x in (self.resid_final, self.states):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return sum(storages.values())


def _tensors(recording: Recording) -> dict[str, Tensor]:
    """The recording's tensors by their names in a file."""
    found: dict[str, Tensor | None] = {
        "token_ids": recording.token_ids,
        "checked_rows": recording.checked_rows,
        "states": recording.states,
        "logits": recording.logits,
        f"resid.{len(recording.layers)}": recording.resid_final,
    }
    for i, (layer, block) in enumerate(
        zip(recording.layers, recording.decoder.blocks, strict=True)
    ):
        if block.value_layer is None:
            found |= {f"k.{i}": layer.k, f"v.{i}": layer.v}
        found |= {
            f"resid.{i}": layer.resid_pre,
            f"q.{i}": layer.q,
            f"mid.{i}": layer.resid_mid,
            f"z.{i}": layer.z,
            f"log_sum_exp.{i}": layer.log_sum_exp,
            f"checked_mid.{i}": layer.checked_mid,
            f"alibi_slopes.{i}": layer.alibi_slopes,
        }
    return {name: x for name, x in found.items() if x is not None}


def _fields(recording: Recording) -> dict[str, Any]:
    return {
        "mode": recording.mode.value,
        "model": recording.decoder.fingerprint(),
        "tokens": recording.tokens,
        "position": recording.position,
        "windows": [layer.window for layer in recording.layers],
    }
