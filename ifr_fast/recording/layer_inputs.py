"""Rows of a layer, as the kernels take them: read off a recording, or replayed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.contract import LayerInputs
from ..kernels.rows import on_device
from ..model.attention import AttentionCall
from ..model.block import Block
from ..model.node_parts import PostParts, mid_parts, post_parts
from ..model.replay import gate_rows, passing_error, post_norm_inputs, replay_rows
from .recording import LayerRecording, Recording

_BLOCK_ROWS = {"cpu": 512, "cuda": 8192}  # rows that are replayed and scored at once


class LayerRows(NamedTuple):
    """R rows of a layer, with everything that they are the sum of."""

    inputs: LayerInputs
    post: PostParts | None  # None in a parallel block
    bias: Tensor  # [D] or [R, D] the constant in `inputs.y` that belongs to no part


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
        None if recorded.recurrence is None else recorded.recurrence.on(k.device),
    )


@torch.inference_mode()
def layer_inputs(recording: Recording, layer: int, rows: Tensor) -> LayerRows:
    """The kernels' inputs for `rows` [R] (int64, CPU, ascending) of a layer, and what they lack.

    If the recording `is_replayed`, call this within `Decoder.attention_through`.
    """
    block, recorded = recording.decoder.blocks[layer], recording.layers[layer]
    everything = len(rows) == len(recording)
    device = block.W_O.device  # recorded tensors may lie elsewhere

    def take(x: Tensor) -> Tensor:
        return (x if everything else x[on_device(rows, x.device)]).to(device)

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
        value_gate = gate_rows(block, recorded.call, recorded.resid_pre, rows, z)
    resid_pre = take(recorded.resid_pre)
    following = recording.resid_post(layer)
    resid_post = take(following)
    of_mid = mid_parts(block, resid_pre, mid, z, value_gate)
    inputs = LayerInputs(
        rows=rows,
        resid_pre=of_mid.residual,
        y=resid_post if block.parallel else mid,
        q=q,
        k=k,
        v=v,
        W_O=block.W_O,
        scale=recorded.scale,
        row_scale=of_mid.row_scale,
        value_gate=value_gate,
        window=recorded.window,
        softcap=recorded.softcap,
        sinks=recorded.sinks,
        alibi_slopes=recorded.alibi_slopes,
        log_sum_exp=log_sum_exp,
        ffn=resid_post - mid if block.parallel else None,
        pattern=None if recorded.recurrence is None else recorded.recurrence.on(device).pattern(),
    )
    if block.parallel:
        return LayerRows(inputs, None, of_mid.bias)
    normed = None
    if block.residual is not None and block.residual.post_norm is not None:
        assert z is not None
        normed = post_norm_inputs(block, recorded.call, recorded.resid_pre, z, rows)
    error = passing_error(block, recorded.call, recorded.resid_pre, rows)
    return LayerRows(inputs, post_parts(block, mid, resid_post, normed, error), of_mid.bias)


def block_rows(device: torch.device) -> int:
    """The number of rows that are replayed and scored at once, for a model on `device`."""
    return _BLOCK_ROWS.get(device.type, _BLOCK_ROWS["cpu"])
