"""The output of one head or one FFN at a position, and the map of a head over all positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..graph.tables import plain_tensor
from ..kernels.contract import LayerInputs, visible
from ..model.held import wide
from ..model.node_parts import passage_to_mid
from ..recording.layer_inputs import layer_inputs
from ..recording.recording import Recording
from ..scoring.closure import check_closure
from ..scoring.implementations import Kernel
from ..scoring.layer import score_layer

_MAP_ELEMENTS = 1 << 22  # limit on [R, S, H] that is scored at once


@torch.inference_mode()
def contribution_map(recording: Recording, layer: int, head: int | None, kernel: Kernel) -> Tensor:
    """[T, T] float32: importance of each source (column) in each target (row), of one head or of
    all together; computed in row blocks.
    """
    T, H = len(recording), recording.decoder.n_heads
    out = torch.zeros(T, T)
    step = max(1, _MAP_ELEMENTS // (T * H))
    with recording.decoder.replaying():
        for rows in torch.arange(T).split(step):
            scores = score_layer(recording, layer, rows, 0.0, kernel)
            check_closure({layer: scores.closure})
            row, source, weight, of_heads = (x.cpu() for x in scores.edges)
            values = weight if head is None else of_heads[:, head]
            kept = weight > 0  # padding has arbitrary sources
            out[rows[row[kept]], source[kept]] = values[kept].float()
    return plain_tensor(out)


@torch.inference_mode()
def head_output(
    recording: Recording, layer: int, head: int, position: int, source: int | None = None
) -> Tensor:
    """[D] the output of a head at a position, or only its part from `source`, in float32 or
    wider.
    """
    from ..kernels.rows import attention_pattern

    with recording.decoder.replaying():
        inputs = layer_inputs(recording, layer, torch.tensor([position])).inputs
    one = _one_head(inputs, head, position + 1)
    mask = visible(one.rows, position + 1, one.window).to(one.v.device)
    alpha = attention_pattern(one, mask)[0, 0]  # [S]
    values = one.v[:, 0]
    z = alpha @ values if source is None else alpha[source] * values[source]
    if one.value_gate is not None:
        z = z * one.value_gate[0, 0]
    part = z @ one.W_O[0]
    return part if one.row_scale is None else part * one.row_scale[0]


def _one_head(inputs: LayerInputs, head: int, n_keys: int) -> LayerInputs:
    """The inputs of a single head and the keys before `n_keys`, in float32 or wider."""
    of_kv = head // (inputs.q.shape[1] // inputs.k.shape[1])

    def cut(x: Tensor | None, dim: int) -> Tensor | None:
        return None if x is None else x.narrow(dim, head, 1)

    one = inputs._replace(
        q=inputs.q[:, head : head + 1],
        k=inputs.k[:n_keys, of_kv : of_kv + 1],
        v=inputs.v[:n_keys, of_kv : of_kv + 1],
        W_O=inputs.W_O[head : head + 1],
        value_gate=cut(inputs.value_gate, 1),
        sinks=cut(inputs.sinks, 0),
        alibi_slopes=cut(inputs.alibi_slopes, 0),
        log_sum_exp=cut(inputs.log_sum_exp, 1),
        pattern=None if inputs.pattern is None else inputs.pattern.head(head),
    )
    return one.to(torch.promote_types(inputs.y.dtype, torch.float32))


@torch.inference_mode()
def carried(
    recording: Recording, part: Tensor, layer: int, position: int, *, by_head: bool
) -> Tensor:
    """[D] what is left of a part of a layer's output at the end of the stream: the residual
    connections above pass it on, with their norms held. by_head: whether it is a part of resid_mid.
    """
    decoder, row = recording.decoder, torch.tensor([position])
    part = part[None]
    for block in decoder.blocks[layer:]:
        if block.residual is not None:
            with decoder.replaying():
                inputs, post, _ = layer_inputs(recording, block.layer, row)
            if block.layer > layer:
                recorded = recording.layers[block.layer].resid_pre[position][None]
                to_mid = passage_to_mid(block, recorded.to(inputs.y.device), inputs.row_scale)
                part = to_mid(part.to(inputs.y.device))
            if post is not None and (by_head or block.layer > layer):
                part = post.passage(part.to(inputs.y.device))
        part = part * block.stream_scale
    return part[0]


@torch.inference_mode()
def ffn_output(recording: Recording, layer: int, position: int) -> Tensor:
    """[D] the output of the FFN block at a position, in float32 or wider."""
    return ffn_rows(recording, layer, torch.tensor([position])).added[0]


class FFNRows(NamedTuple):
    """R rows of an FFN block, in float32 or wider."""

    before: Tensor  # [R, D] the part of `resid_mid`; in a parallel block that of `resid_pre`
    added: Tensor  # [R, D]
    post: Tensor  # [R, D] unscaled (`Block.unscaled`)
    inputs: LayerInputs


def ffn_rows(recording: Recording, layer: int, rows: Tensor) -> FFNRows:
    """An FFN block at `rows` [R], int64 on the CPU."""
    with torch.inference_mode(), recording.decoder.replaying():
        inputs, post, _ = layer_inputs(recording, layer, rows)
    if post is None:
        assert inputs.ffn is not None
        return FFNRows(wide(inputs.resid_pre), wide(inputs.ffn), wide(inputs.y), inputs)
    return FFNRows(wide(post.residual), post.ffn, wide(post.y), inputs)
