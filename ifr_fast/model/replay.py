"""Single rows of one layer, computed again from what was recorded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..kernels.rows import on_device
from .attention import AttentionCall, AttentionHandler, attend_rows
from .block import Block, rounding_tolerance
from .held import fit_heads, wide
from .hooks import LayerCall, StopForward, change_output, hooked, on_input
from .interface import overriding


def replay_rows(
    block: Block,
    layer_call: LayerCall,
    resid_pre: Tensor,
    recorded: AttentionCall,
    rows: Tensor,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one layer again on some rows alone, its attention reading recorded keys and values.

    resid_pre [T, D]; recorded: a call whose keys, values, mask and slopes are used; rows [R]:
    ascending, on the CPU; window: keys visible to a row. Returns q [R, H, K], `resid_mid` [R, D]
    (in a parallel block: resid_pre plus the attention module's output) and the attention output z
    [R, H, V]. The caller must have overridden the model's attention, by
    `Decoder.attention_through`.
    """
    if block.unmixed:
        hidden = resid_pre[on_device(rows, resid_pre.device)].to(block.W_O.device)
        return hidden.new_empty(len(rows), 1, 0), hidden, hidden.new_zeros(len(rows), 1, 1)
    queries: list[Tensor] = []
    attended: list[Tensor] = []

    def answer(call: AttentionCall) -> Tensor:
        queries.append(call.q)
        past = recorded._replace(q=call.q)
        attended.append(attend_rows(past, call.q, rows, window))
        return attended[0]

    hidden = resid_pre[on_device(rows, resid_pre.device)].to(block.W_O.device)
    found = stopped_at(block.module, layer_call.at(rows), hidden, answer, block.on_mid)
    mid = found.reshape(hidden.shape)
    return (
        queries[0][0].transpose(0, 1),
        hidden + mid if block.parallel else mid,
        attended[0][0],
    )


def post_norm_inputs(
    block: Block, layer_call: LayerCall, resid_pre: Tensor, z: Tensor, rows: Tensor
) -> Tensor:
    """The rows [R, D] that the norm of a layer's output reads, where the layer is run on some rows
    alone with the attention output z [R, H, V]. Other arguments, and the caller's duty, are those
    of `replay_rows`.
    """
    assert block.residual is not None
    assert block.residual.post_norm is not None
    hidden = resid_pre[on_device(rows, resid_pre.device)].to(block.W_O.device)
    found: list[Tensor] = []
    norm = block.residual.post_norm.site
    with overriding(lambda _: z[None]), hooked(on_input(norm, found.append)):
        layer_call.at(rows)(block.module, hidden[None])
    return found[-1].reshape(hidden.shape)


def passing_error(
    block: Block, layer_call: LayerCall, resid_pre: Tensor, rows: Tensor
) -> Tensor | None:
    """The relative error of what a layer passes on of `resid_mid` where its FFN gives 0, against
    what was found when it was opened; in units of what rounding explains, 0-d. The layer is run on
    the last of `rows` alone, without attention. None where no number could change it.

    Other arguments, and the caller's duty, are those of `replay_rows`.
    """
    if not block.weighs_stream:
        return None
    last, of = rows[-1:], block.residual
    hidden = resid_pre[on_device(last, resid_pre.device)].to(block.W_O.device)
    z = hidden.new_zeros(1, 1, *block.W_O.shape[:2])
    mids: list[Tensor] = []
    normed: list[Tensor] = []
    handles = [change_output(branch.site, torch.zeros_like) for branch in block.branches]
    handles.append(block.on_mid(mids.append))
    if of is not None and of.post_norm is not None:
        handles.append(on_input(of.post_norm.site, normed.append))
    with overriding(lambda _: z), hooked(*handles):
        output = layer_call.at(last)(block.module, hidden[None])
    passed = wide(mids[0].reshape(hidden.shape)) * block.stream_scale
    if of is not None and of.mid_weight is not None:
        passed = passed * of.mid_weight
    got = wide((normed[-1] if normed else output).reshape(hidden.shape))
    norm = torch.linalg.vector_norm
    granted = rounding_tolerance(resid_pre.dtype) * norm(passed).clamp(min=1e-30)
    return norm(got - passed) / granted


def gate_rows(
    block: Block, layer_call: LayerCall, resid_pre: Tensor, rows: Tensor, z: Tensor | None
) -> Tensor:
    """The gates [R, H, V] of some rows of a gated block: the input of its gate site when attention
    gives 1. Where a norm before it scales each head, they are scaled to what the site reads when
    attention gives z [R, H, V]. Other arguments, and the caller's duty, are those of `replay_rows`.
    """
    assert block.gate_site is not None
    H, V, _ = block.W_O.shape
    hidden = resid_pre[on_device(rows, resid_pre.device)].to(block.W_O.device)
    at = (block.module, block.gate_site, layer_call.at(rows), hidden)
    gates = gates_at(*at, torch.Size((len(rows), H, V)))
    if not block.head_scaled:
        return gates
    assert z is not None
    return wide(gates) * fit_heads(wide(gates) * wide(z), wide(read_at(*at, z)))[..., None]


def gates_at(
    layer: nn.Module, site: nn.Module, layer_call: LayerCall, hidden: Tensor, shape: torch.Size
) -> Tensor:
    """What `site` reads [R, H, V] where attention gives 1."""
    return read_at(layer, site, layer_call, hidden, hidden.new_ones(shape))


def read_at(
    layer: nn.Module, site: nn.Module, layer_call: LayerCall, hidden: Tensor, z: Tensor
) -> Tensor:
    """What `site` reads [R, H, V] where attention gives z [R, H, V]."""
    given = z[None]
    found = stopped_at(
        layer, layer_call, hidden, lambda _: given, lambda stop: on_input(site, stop)
    )
    return found.reshape(z.shape)


def stopped_at(
    layer: nn.Module,
    layer_call: LayerCall,
    hidden: Tensor,
    answer: AttentionHandler,
    watch: Callable[[Callable[[Tensor], None]], torch.utils.hooks.RemovableHandle],
) -> Tensor:
    """The tensor that `watch` passes on in a run of the layer on `hidden` [R, D], which it ends."""
    found: list[Tensor] = []

    def stop(x: Tensor) -> None:
        found.append(x)
        raise StopForward

    with suppress(StopForward), overriding(answer), hooked(watch(stop)):
        layer_call(layer, hidden[None])
    return found[0]
