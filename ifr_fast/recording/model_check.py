"""A recording that was read from a file is compared with the model that is at hand.

A fingerprint tells models apart by what they hold. What a hook reads from elsewhere, and files
older than this fingerprint, need more: the first rows are computed again, layer by layer, each from
the recorded input of the layer. They read no later position, so that this costs no pass over the
text.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..errors import FormatError
from ..model.attention import AttentionCall, attend_rows
from ..model.block import Block, error_of_runs, rounding_tolerance
from ..model.hooks import LayerCall, hooked
from ..model.interface import overriding
from .layer_inputs import past_of
from .recording import LayerRecording, Recording

_ROWS = 8


@torch.inference_mode()
def check_recording(path: str | os.PathLike[str], recording: Recording, embeddings: Tensor) -> None:
    """Raises FormatError where the recording's model computes other states than the file holds.

    embeddings [T, D]: the model's own, of the recorded text.
    """
    rows = torch.arange(min(_ROWS, len(recording)))
    decoder = recording.decoder
    _compare(path, "the embeddings", embeddings, recording.layers[0].resid_pre)
    with decoder.replaying():
        for i, block in enumerate(decoder.blocks):
            name = f"layer {block.name}"
            layer = recording.layers[i]
            found = _run(block, layer, rows)
            if layer.resid_mid is not None:
                _compare(path, name, found["resid_mid"], layer.resid_mid)
            elif layer.checked_mid is not None:
                known = recording.checked_rows[recording.checked_rows < len(rows)]
                _compare(path, name, found["resid_mid"][known], layer.checked_mid[: len(known)])
            if layer.q is not None:
                _compare(path, name, found["q"], layer.q)
            if block.value_layer is None:
                _compare(path, name, found["k"], layer.k)
                _compare(path, name, found["v"], layer.v)
            _compare(path, name, found["resid_post"], recording.resid_post(i))
    at = [recording.position]
    _compare(path, "the head", decoder.head(recording.states[at]), recording.logits[None])
    given = recording.resid_final[: len(rows)][None]

    def answer(block: Block, hidden: Tensor, _: LayerCall) -> Tensor:
        return given.to(hidden.device) if block is decoder.blocks[-1] else hidden

    with decoder.replaying(), decoder.overriding_layers(answer):
        states, _ = decoder.forward(recording.token_ids[: len(rows)])
    _compare(path, "the final norm", states, recording.states)


def _run(block: Block, recorded: LayerRecording, rows: Tensor) -> dict[str, Tensor]:
    """The rows of a layer, run again on its recorded input and the recorded keys before them."""
    n = len(rows)
    device = block.W_O.device
    past = past_of(block, recorded, recorded.k[:n].to(device), recorded.v[:n].to(device))
    found: dict[str, Tensor] = {}
    mids: list[Tensor] = []

    def answer(call: AttentionCall) -> Tensor:
        found.update({name: getattr(call, name)[0].transpose(0, 1) for name in ("q", "k", "v")})
        return attend_rows(past._replace(q=call.q), call.q, rows, recorded.window)

    hidden = recorded.resid_pre[:n].to(device)
    with overriding(answer), hooked(block.on_mid(mids.append)):
        output = recorded.call.at(rows)(block.module, hidden[None])
    mid = mids[0].reshape(hidden.shape)
    found["resid_mid"] = hidden + mid if block.parallel else mid
    found["resid_post"] = output.reshape(hidden.shape)
    return found


def _compare(path: str | os.PathLike[str], what: str, found: Tensor, recorded: Tensor) -> None:
    """Compares the leading rows of what was recorded."""
    recorded = recorded[: len(found)].to(found.device)
    if not len(found):
        return
    same = found.shape == recorded.shape and error_of_runs(
        found.flatten(1), recorded.flatten(1)
    ) <= rounding_tolerance(recorded.dtype)
    if not same:
        raise FormatError(
            f"{path}: was recorded from another model, or with other weights or hooks: {what} now "
            "gives other values"
        )
