"""A lean recording made chunk by chunk, in memory or in a file from which a run resumes."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from ..model.decoder import Decoder
from ..progress import progress
from . import mapped_file, prefill
from .files import check_fingerprint, load, recording_of
from .layer_pass import kept_rows
from .mapped_file import MappedFile, Spec
from .record import record
from .recording import Recording, RecordingMode


@torch.inference_mode()
def record_in_chunks(
    decoder: Decoder,
    token_ids: Tensor,
    tokens: list[str],
    position: int = -1,
    *,
    place: torch.device | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Recording:
    """A lean recording of `token_ids` [T], made chunk by chunk (prefill.py).

    place: the device that it lies on; None: a file mapped into memory, at `path` or without a
    name. A file from an interrupted run is resumed, and a complete one is read.

    Raises IfrError where the model's states are not finite or the file cannot be written, and
    FormatError where the file holds something else.
    """
    with nullcontext() if path is None else mapped_file.alone(path):
        return _record_in_chunks(decoder, token_ids, tokens, position, place, path)


def _record_in_chunks(
    decoder: Decoder,
    token_ids: Tensor,
    tokens: list[str],
    position: int,
    place: torch.device | None,
    path: str | os.PathLike[str] | None,
) -> Recording:
    T, n_rows = len(token_ids), prefill.chunk_rows(decoder.device)
    position %= T
    checked_rows = kept_rows(T, position)
    around = prefill.frame(decoder, token_ids)
    specs = prefill.specs(around, len(checked_rows))
    specs["token_ids"], specs["checked_rows"] = Spec.of(token_ids), Spec.of(checked_rows)
    total = prefill.n_steps(decoder, T, n_rows)
    fields: dict[str, Any] = {
        "mode": RecordingMode.LEAN.value,
        "model": decoder.fingerprint(),
        "tokens": tokens,
        "position": position,
        "chunk_rows": n_rows,
        "windows": [block.crossed_window(T) for block in decoder.blocks],
    }
    file = None
    if place is not None:
        tensors = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=place)
            for name, spec in specs.items()
            if name != "resid.0"
        }
        tensors["resid.0"] = around.embeddings.to(place)
    else:
        if path is None:
            file = mapped_file.create_nameless(specs, fields, total)
        elif os.path.lexists(path):
            file = _to_go_on_with(path, token_ids, fields)
            if file.done == file.total:
                return load(path, decoder, fields["model"])
        else:
            file = mapped_file.create(path, specs, fields, total)
        tensors, fields = file.tensors, file.fields
    done = 0 if file is None else file.done
    if done == 0:
        tensors["token_ids"].copy_(token_ids)
        tensors["checked_rows"].copy_(checked_rows)
        tensors["resid.0"].copy_(around.embeddings)
    around = around._replace(embeddings=tensors["resid.0"])
    first_step, n_chunks = done, -(-T // n_rows)

    def rows_done(n: int) -> dict[str, int]:
        return prefill.rows_done(around, n_rows, n, checked_rows, fields["position"])

    def commit(file: MappedFile, n: int) -> None:
        before = rows_done(file.done)
        file.commit(n, {name: x for name, x in rows_done(n).items() if x != before[name]})

    if file is not None and done:
        file.check_rows(_needed(rows_done(done), done // n_chunks))
    try:
        with progress("recording", total, done) as show:

            def on_step(n: int) -> None:
                nonlocal done
                done = n
                if file is not None and n % n_chunks == 0:
                    commit(file, n)
                show(n)

            prefill.prefill(
                decoder,
                token_ids,
                around,
                fields["windows"],
                tensors,
                position=fields["position"],
                checked_rows=tensors["checked_rows"].cpu(),
                n_rows=n_rows,
                first_step=first_step,
                on_step=on_step,
            )
    finally:
        if file is not None and done % n_chunks:
            commit(file, done)
    if first_step and path is not None:
        return load(path, decoder, fields["model"])  # what another process has written is checked
    return recording_of(decoder, tensors, fields, around)


def _needed(rows: dict[str, int], layer: int) -> dict[str, int]:
    """Of the rows that are done, those that a run reads which resumes in a layer."""
    names = {"token_ids", "checked_rows", f"resid.{layer}", f"resid.{layer + 1}"}
    names |= {f"{name}.{layer}" for name in ("k", "v", "checked_mid")}
    return {name: n for name, n in rows.items() if name in names}


def _to_go_on_with(
    path: str | os.PathLike[str], token_ids: Tensor, fields: dict[str, Any]
) -> MappedFile:
    """The file of a recording of this text, to be resumed; the position of its logits is kept."""
    file = mapped_file.open_file(path, writable=True)
    check_fingerprint(file, fields["model"])
    if file.done and not torch.equal(file.tensors["token_ids"], token_ids):
        raise FormatError(f"{path}: holds a recording of another text; expected a new path")
    if file.done < file.total and not file.is_checked:
        raise FormatError(
            f"{path}: is unfinished, and an older ifr_fast has begun it; delete it, or expected a "
            "new path"
        )
    started_so = file.fields | {"position": None} == fields | {"position": None}
    if file.done < file.total and not started_so:
        raise FormatError(
            f"{path}: is unfinished, and was begun in another way than this text would be now; "
            "delete it, or expected a new path"
        )
    return file


def record_to_file(
    decoder: Decoder,
    token_ids: Tensor,
    tokens: list[str],
    path: str | os.PathLike[str],
    position: int = -1,
) -> Recording:
    """Does as `record_in_chunks`, but in one pass, which cannot be resumed if interrupted."""
    if not os.path.lexists(path):
        record(decoder, token_ids, tokens, RecordingMode.LEAN, position).save(path)
    recording = load(path, decoder)
    if not torch.equal(recording.token_ids, token_ids):
        raise FormatError(f"{path}: holds a recording of another text; expected a new path")
    return recording
