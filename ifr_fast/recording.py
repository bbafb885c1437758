"""A Recording holds what scoring any row of any layer needs, from one forward pass.

A lean recording holds the residual stream at every layer, keys and values; q and `resid_mid` of a
row come from replaying its layer on that row alone. A full one holds q and `resid_mid` too, which
saves the replays. The two give the same graphs; `Tracer.plan` chooses by memory. The tensors are
the forward pass's own, held instead of freed; only views of larger tensors are copied if lean.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import capture, prefill, recording_file
from .capture import AttentionCall, LayerCall, LazyMask
from .errors import FormatError
from .kernels.contract import LayerInputs
from .layer_pass import WatchedLayer, WatchedPass, checked_rows, kept_rows, not_finite, pad
from .model import Block, Decoder, gate_rows, replay_rows, row_scales
from .progress import progress
from .recording_file import MappedFile, Spec


class RecordingMode(StrEnum):
    """The tensors that a recording holds of each layer."""

    LEAN = "lean"  # resid_pre, k, v
    FULL = "full"  # also q, resid_mid, log_sum_exp if there is one, z of row-scaled blocks


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


@dataclass(eq=False)
class Recording:
    """One text's forward pass, ready to be traced at any position and threshold."""

    token_ids: Tensor  # [T] int64, on the CPU
    tokens: list[str]
    mode: RecordingMode
    layers: list[LayerRecording]
    resid_final: Tensor  # [T, D] resid_post of the last layer
    states: Tensor  # [T, D] what the head reads
    position: int  # the forward pass predicted the token after this one
    logits: Tensor  # [vocab] at `position`
    checked_rows: Tensor  # [C] int64, on the CPU: rows whose parts are checked against resid_mid
    decoder: Decoder  # the model that was recorded

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_replayed(self) -> bool:
        """True if scoring it runs layers again, for tensors that it does not hold."""
        gated = any(block.gate_site is not None for block in self.decoder.blocks)
        return gated or self.mode is RecordingMode.LEAN

    def sample(self, rows: Tensor) -> Tensor:
        """Indices of a few of `rows` [R] to check; if lean, of rows with a recorded resid_mid."""
        return checked_rows(rows, self.checked_rows if self.mode is RecordingMode.LEAN else None)

    def resid_post(self, layer: int) -> Tensor:
        """The residual stream [T, D] after a layer."""
        return (
            self.layers[layer + 1].resid_pre if layer + 1 < len(self.layers) else self.resid_final
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves it as safetensors, for `Tracer.load_recording` with the same model."""
        recording_file.write(path, _tensors(self), _fields(self))

    @property
    def nbytes(self) -> int:
        """Bytes that are held; a storage that several tensors share is counted once.

        Recordings of one batch share their storages: each counts all of them. The few rows in
        `checked_mid` are left out, as in `Plan`.
        """
        storages = {}
        for layer in self.layers:
            of_layer = (layer.resid_pre, layer.k, layer.v, layer.q, layer.resid_mid, layer.z)
            for x in (*of_layer, layer.log_sum_exp):
                if x is not None:
                    storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        for x in (self.resid_final, self.states):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return sum(storages.values())


@torch.inference_mode()
def record(
    decoder: Decoder, token_ids: Tensor, tokens: list[str], mode: RecordingMode, position: int = -1
) -> Recording:
    """Runs the model on `token_ids` [T] once, its head at `position` alone.

    Raises IfrError where the model's states are not finite.
    """
    (found,) = record_together(decoder, [token_ids], [tokens], mode, [position])
    return found


@torch.inference_mode()
def record_together(
    decoder: Decoder,
    texts: list[Tensor],
    tokens: list[list[str]],
    mode: RecordingMode,
    positions: list[int],
) -> list[Recording]:
    """One forward pass over B texts of token ids [T_b], their heads at `positions` alone.

    The recordings are views of the pass's own tensors. Raises IfrError where the model's states are
    not finite.
    """
    full = mode is RecordingMode.FULL
    lengths = [len(text) for text in texts]
    T = max(lengths)
    positions = [position % n for position, n in zip(positions, lengths, strict=True)]
    checked = [kept_rows(n, position) for position, n in zip(positions, lengths, strict=True)]
    layers: list[WatchedLayer] = []

    def attended(layer: WatchedLayer) -> None:
        if not full:  # a view of a fused q/k/v projection would hold q too
            call = layer.attention
            empty = call.q.new_empty(0)
            layer.attention = call._replace(q=empty, k=_own(call.k), v=_own(call.v))
        if not (full and layer.block.row_scaled):
            del layer.z

    def left(layer: WatchedLayer) -> None:
        del layer.resid_post  # the next layer's resid_pre
        layers.append(layer)

    mid_rows = None if full else torch.cat([b * T + rows for b, rows in enumerate(checked)])
    watched = WatchedPass(
        decoder, lengths, attended=attended, left=left, sums=full, mid_rows=mid_rows
    )
    with watched.watching():
        if len(texts) == 1:
            states, logits = (x[None] for x in decoder.forward(texts[0], positions[0]))
        else:
            states = decoder.forward_batch(pad(texts))
    for b, finite in enumerate(watched.finite()):
        if not finite:
            _refuse_states(layers, b, lengths[b], states.dtype)
    if len(texts) > 1:
        at = torch.arange(len(texts), device=states.device)
        logits = decoder.head(states[at, torch.tensor(positions, device=states.device)])

    n_checked = [len(rows) for rows in checked]
    checked_mids = [() if full else layer.resid_mid.split(n_checked) for layer in layers]

    def one(b: int) -> Recording:
        n = lengths[b]

        def heads(x: Tensor) -> Tensor:
            return x[b].transpose(0, 1)[:n]

        found = []
        for layer, checked_mid in zip(layers, checked_mids, strict=True):
            call, sums = layer.attention, layer.log_sum_exp
            found.append(
                LayerRecording(
                    resid_pre=layer.resid_pre[b, :n],
                    k=heads(call.k),
                    v=heads(call.v),
                    scale=call.scale,
                    window=layer.window_of(n),
                    softcap=call.softcap,
                    sinks=call.sinks,
                    alibi_slopes=call.alibi_slopes,
                    mask=call.mask,
                    call=layer.call_of(b),
                    q=heads(call.q) if full else None,
                    resid_mid=layer.resid_mid[b, :n] if full else None,
                    z=layer.z[b, :n] if full and layer.block.row_scaled else None,
                    log_sum_exp=None if sums is None else sums[b, :n],
                    checked_mid=None if full else checked_mid[b],
                )
            )
        return Recording(
            token_ids=texts[b],
            tokens=tokens[b],
            mode=mode,
            layers=found,
            resid_final=watched.resid_final[b, :n],
            states=states[b, :n],
            position=positions[b],
            logits=logits[b],
            checked_rows=checked[b],
            decoder=decoder,
        )

    return [one(b) for b in range(len(texts))]


def _refuse_states(layers: list[WatchedLayer], b: int, n: int, dtype: torch.dtype) -> NoReturn:
    """Raises the error for the first layer after which text `b` has states that are not finite."""
    entered = range(1, len(layers))
    bad = (i for i in entered if not layers[i].resid_pre[b, :n].isfinite().all())
    raise not_finite(next(bad, len(layers)) - 1, dtype)


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
            file = recording_file.create_nameless(specs, fields, total)
        elif os.path.lexists(path):
            file = _to_go_on_with(path, token_ids, fields)
            if file.done == file.total:
                return load(path, decoder)
        else:
            file = recording_file.create(path, specs, fields, total)
        tensors, fields = file.tensors, file.fields
    done = 0 if file is None else file.done
    if done == 0:
        tensors["token_ids"].copy_(token_ids)
        tensors["checked_rows"].copy_(checked_rows)
        tensors["resid.0"].copy_(around.embeddings)
    around = around._replace(embeddings=tensors["resid.0"])
    first_step, n_chunks = done, -(-T // n_rows)
    try:
        with progress("recording", total, done) as show:

            def on_step(n: int) -> None:
                nonlocal done
                done = n
                if file is not None and n % n_chunks == 0:
                    file.commit(n)
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
            file.commit(done)
    return _recording(decoder, tensors, fields, around)


def _to_go_on_with(
    path: str | os.PathLike[str], token_ids: Tensor, fields: dict[str, Any]
) -> MappedFile:
    """The file of a recording of this text, to be resumed; the position of its logits is kept."""
    file = recording_file.open_file(path, writable=True)
    _check_model(path, file.fields, fields["model"])
    if file.done and not torch.equal(file.tensors["token_ids"], token_ids):
        raise FormatError(f"{path}: holds a recording of another text; expected a new path")
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


def _check_model(path: str | os.PathLike[str], fields: dict[str, Any], model: str) -> None:
    if fields.get("model") != model:
        raise FormatError(f"{path}: was recorded from another model, or with other weights")


def load(path: str | os.PathLike[str], decoder: Decoder) -> Recording:
    """The recording in a file, mapped into memory.

    Raises FormatError for a file that is truncated, foreign, unfinished, or of another model.
    """
    file = recording_file.open_file(path)
    _check_model(path, file.fields, decoder.fingerprint())
    if file.done < file.total:
        raise FormatError(
            f"{path}: is unfinished, {file.done} of {file.total} steps are recorded; record the "
            "same text with this path to go on"
        )
    try:
        token_ids = file.tensors["token_ids"]
        if not bool(((token_ids >= 0) & (token_ids < decoder.vocab_size)).all()):
            raise ValueError("token ids")
        return _recording(
            decoder, file.tensors, file.fields, prefill.frame(decoder, token_ids.clone())
        )
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise FormatError(f"{path}: not a whole recording ({error!r})") from error


def _tensors(recording: Recording) -> dict[str, Tensor]:
    """The recording's tensors by their names in a file."""
    found: dict[str, Tensor | None] = {
        "token_ids": recording.token_ids,
        "checked_rows": recording.checked_rows,
        "states": recording.states,
        "logits": recording.logits,
        f"resid.{len(recording.layers)}": recording.resid_final,
    }
    for i, layer in enumerate(recording.layers):
        found |= {
            f"resid.{i}": layer.resid_pre,
            f"k.{i}": layer.k,
            f"v.{i}": layer.v,
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


def _recording(
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
                mask=capture.causal_mask(window, block.W_O.device),
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


def _own(x: Tensor) -> Tensor:
    """`x` itself, or a copy where its storage holds more than `x`."""
    return x if x.untyped_storage().nbytes() <= x.nbytes else x.clone()


def past_of(block: Block, recorded: LayerRecording, k: Tensor, v: Tensor) -> AttentionCall:
    """The keys and values [S, H_kv, K or V] that a replay's attention reads, and how it does."""
    return AttentionCall(
        block.attention,
        recorded.resid_pre.new_empty(0),
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        recorded.mask,
        recorded.scale,
        recorded.softcap,
        recorded.sinks,
        recorded.alibi_slopes,
    )


@torch.inference_mode()
def layer_inputs(
    recording: Recording, layer: int, rows: Tensor
) -> tuple[LayerInputs, Tensor | None]:
    """The kernels' inputs for `rows` [R] (int64, CPU, ascending) of a layer.

    If the block is sequential, `resid_post` [R, D] is returned too, so that its FFN can be scored.
    If the recording `is_replayed`, call this within `Decoder.attention_through`.
    """
    block, recorded = recording.decoder.blocks[layer], recording.layers[layer]
    everything = len(rows) == len(recording)
    on_device = rows.to(recorded.resid_pre.device)

    device = block.W_O.device  # recorded tensors may lie elsewhere

    def take(x: Tensor) -> Tensor:
        return (x if everything else x[on_device]).to(device)

    k, v = recorded.k.to(device), recorded.v.to(device)
    z = log_sum_exp = None
    if recorded.q is not None and recorded.resid_mid is not None:
        q, mid = take(recorded.q), take(recorded.resid_mid)
        z = None if recorded.z is None else take(recorded.z)
        if recorded.log_sum_exp is not None:
            log_sum_exp = take(recorded.log_sum_exp)
    else:
        past = past_of(block, recorded, k, v)
        q, mid, z = replay_rows(
            block, recorded.call, recorded.resid_pre, past, rows, recorded.window
        )
        if recorded.checked_mid is not None:  # preferred to the replay's own
            among = torch.isin(rows, recording.checked_rows)
            known = torch.isin(recording.checked_rows, rows)
            mid = mid.index_copy(
                0,
                among.nonzero().squeeze(1).to(mid.device),
                recorded.checked_mid[known.to(recorded.checked_mid.device)].to(mid.device),
            )
    value_gate = None
    if block.gate_site is not None:
        value_gate = gate_rows(block, recorded.call, recorded.resid_pre, rows)
    resid_pre = take(recorded.resid_pre)
    following = recording.resid_post(layer)
    resid_post = (following if everything else following[rows.to(following.device)]).to(device)
    row_scale = None
    if block.row_scaled:
        assert z is not None
        row_scale = row_scales(block, resid_pre, mid, z, value_gate)
    inputs = LayerInputs(
        rows=rows,
        resid_pre=resid_pre,
        y=resid_post if block.parallel else mid,
        q=q,
        k=k,
        v=v,
        W_O=block.W_O,
        scale=recorded.scale,
        row_scale=row_scale,
        value_gate=value_gate,
        window=recorded.window,
        softcap=recorded.softcap,
        sinks=recorded.sinks,
        alibi_slopes=recorded.alibi_slopes,
        log_sum_exp=log_sum_exp,
        ffn=resid_post - mid if block.parallel else None,
    )
    return inputs, None if block.parallel else resid_post
