"""A recording of one text, or of several in one pass, held in memory."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ..model.decoder import Decoder
from .layer_pass import WatchedLayer, WatchedPass, kept_rows, not_finite, pad
from .recording import LayerRecording, Recording, RecordingMode


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
        if layer.block.value_layer is not None:
            made_by = layers[layer.block.value_layer].attention
            layer.attention = layer.attention._replace(k=made_by.k, v=made_by.v)
        made_of = layer.attention.recurrence
        if made_of is not None:
            layer.z = _own(made_of.z)
            layer.attention = layer.attention._replace(recurrence=made_of._replace(z=layer.z))
        if not (full and layer.block.fits_rows):
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
                    z=layer.z[b, :n] if full and layer.block.fits_rows else None,
                    log_sum_exp=None if sums is None else sums[b, :n],
                    checked_mid=None if full else checked_mid[b],
                    recurrence=None if call.recurrence is None else call.recurrence.of_text(b, n),
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


def _own(x: Tensor) -> Tensor:
    """`x` itself, or a copy where its storage holds more than `x`."""
    return x if x.untyped_storage().nbytes() <= x.nbytes else x.clone()
