"""One forward pass -> Recording: what scoring any row of any layer needs.

Lean: the residual stream at every layer, keys and values; q and `resid_mid` of a row come from
replaying its layer on that row alone. Full: q and `resid_mid` too, which saves the replays. The
two give the same graphs; `Tracer.plan` chooses by memory. Nothing is copied: the tensors are the
forward pass's own, held instead of freed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from . import capture
from .capture import AttentionCall, LayerCall, LazyMask
from .errors import IfrError
from .kernels.contract import LayerInputs
from .model import Block, Decoder, evaluating, replay_rows

_CHECKED_ROWS = 4  # rows whose attention output is kept, to check the weights against


class RecordingMode(StrEnum):
    """What a recording holds of each layer."""

    LEAN = "lean"  # resid_pre, k, v
    FULL = "full"  # and q, resid_mid (in parallel blocks: the attention module's output)


@dataclass
class LayerRecording:
    """One layer's share of a Recording; T positions, on the layer's device."""

    resid_pre: Tensor  # [T, D]
    k: Tensor  # [T, H_kv, K]
    v: Tensor  # [T, H_kv, V]
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None  # [H]
    checked_z: Tensor  # [C, H, V] attention output at Recording.checked_rows
    mask: LazyMask
    call: LayerCall
    q: Tensor | None = None  # [T, H, K]
    resid_mid: Tensor | None = None  # [T, D]; parallel blocks: resid_pre + attention


@dataclass
class Recording:
    """One text's forward pass, ready to be traced at any position and threshold."""

    token_ids: Tensor  # [T] int64, on the CPU
    tokens: list[str]
    mode: RecordingMode
    layers: list[LayerRecording]
    resid_final: Tensor  # [T, D] resid_post of the last layer
    states: Tensor  # [T, D] what the head reads
    position: int  # whose next token the forward pass predicted
    logits: Tensor  # [vocab] there
    checked_rows: Tensor  # [C] int64, on the CPU

    def __len__(self) -> int:
        return len(self.token_ids)

    def resid_post(self, layer: int) -> Tensor:
        """[T, D]"""
        return (
            self.layers[layer + 1].resid_pre if layer + 1 < len(self.layers) else self.resid_final
        )

    @property
    def nbytes(self) -> int:
        """Bytes held, a storage shared by several tensors counted once."""
        storages = {}
        for layer in self.layers:
            for x in (layer.resid_pre, layer.k, layer.v, layer.q, layer.resid_mid, layer.checked_z):
                if x is not None:
                    storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        for x in (self.resid_final, self.states):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return sum(storages.values())


def checked_rows(n_tokens: int) -> Tensor:
    """The rows whose attention output is recorded, spread over the text and with its last."""
    n = min(_CHECKED_ROWS, n_tokens)
    return torch.tensor([(i + 1) * n_tokens // n - 1 for i in range(n)])


@torch.inference_mode()
def record(
    decoder: Decoder, token_ids: Tensor, tokens: list[str], mode: RecordingMode, position: int = -1
) -> Recording:
    """Runs the model on `token_ids` [T] once, its head at `position` alone.

    Raises IfrError where the model's states are not finite.
    """
    n_layers = decoder.n_layers
    rows = checked_rows(len(token_ids))
    of_layer = {block.attention: block.layer for block in decoder.blocks}
    calls: dict[int, AttentionCall] = {}
    z_rows: dict[int, Tensor] = {}
    windows: dict[int, int | None] = {}
    layer_calls: dict[int, LayerCall] = {}
    pre: dict[int, Tensor] = {}
    mid: dict[int, Tensor] = {}
    post: list[Tensor] = []

    def answer(call: AttentionCall) -> Tensor:
        layer = of_layer[call.module]
        if id(call.mask) not in windows:  # layers share few masks; they live as long as `calls`
            windows[id(call.mask)] = call.mask.window(len(token_ids))
        z = capture.attend(call, windows[id(call.mask)])
        z_rows[layer] = z[0, rows.to(z.device)]
        if mode is RecordingMode.LEAN:  # a view of a fused q/k/v projection would hold q too
            call = call._replace(q=call.q.new_empty(0), k=_own(call.k), v=_own(call.v))
        calls[layer] = call
        return z

    def watch(block: Block) -> list[torch.utils.hooks.RemovableHandle]:
        def keep_call(hidden: Tensor, call: LayerCall) -> None:
            pre[block.layer] = hidden[0]
            layer_calls[block.layer] = call

        def keep_mid(x: Tensor) -> None:
            mid[block.layer] = x[0] if block.mid_site is not None else pre[block.layer] + x[0]

        handles = [capture.on_layer_call(block.module, keep_call)]
        if mode is RecordingMode.FULL:
            site, on = (
                (block.attention, capture.on_output)
                if block.mid_site is None
                else (block.mid_site, capture.on_input)
            )
            handles.append(on(site, keep_mid))
        return handles

    handles = [handle for block in decoder.blocks for handle in watch(block)]
    handles.append(capture.on_output(decoder.blocks[-1].module, lambda x: post.append(x[0])))
    with (
        evaluating(decoder.model),
        capture.attention_through(decoder.model, answer),
        capture.hooks(*handles),
    ):
        states, logits = decoder.forward(token_ids, position)

    # The residual stream carries every NaN and infinity to its end.
    if not torch.isfinite(post[0]).all():
        bad = next((i for i in range(1, n_layers) if not torch.isfinite(pre[i]).all()), n_layers)
        raise IfrError(
            f"text: the model's states are not finite after layer {bad - 1} in {states.dtype}; "
            "try a wider torch_dtype"
        )

    layers = []
    for i in range(n_layers):
        call = calls[i]
        layers.append(
            LayerRecording(
                resid_pre=pre[i],
                k=call.k[0].transpose(0, 1),
                v=call.v[0].transpose(0, 1),
                scale=call.scale,
                window=windows[id(call.mask)],
                softcap=call.softcap,
                sinks=call.sinks,
                checked_z=z_rows[i],
                mask=call.mask,
                call=layer_calls[i],
                q=call.q[0].transpose(0, 1) if mode is RecordingMode.FULL else None,
                resid_mid=mid.get(i),
            )
        )
    return Recording(
        token_ids=token_ids,
        tokens=tokens,
        mode=mode,
        layers=layers,
        resid_final=post[0],
        states=states,
        position=position % len(token_ids),
        logits=logits,
        checked_rows=rows,
    )


def _own(x: Tensor) -> Tensor:
    """X itself, or a copy where its storage is shared with something larger."""
    return x if x.untyped_storage().nbytes() <= 1.05 * x.nbytes else x.clone()


@torch.inference_mode()
def layer_inputs(
    decoder: Decoder, recording: Recording, layer: int, rows: Tensor
) -> tuple[LayerInputs, Tensor | None]:
    """What the kernels need to score `rows` [R] (int64, CPU, ascending) of a layer.

    Also `resid_post` [R, D] where the block is sequential, so that its FFN can be scored. The
    caller has the model's attention go through `capture.attention_through` if the recording is
    lean.
    """
    block, recorded = decoder.blocks[layer], recording.layers[layer]
    everything = len(rows) == len(recording)
    on_device = rows.to(recorded.resid_pre.device)

    def take(x: Tensor) -> Tensor:
        return x if everything else x[on_device]

    if recorded.q is not None and recorded.resid_mid is not None:
        q, mid = take(recorded.q), take(recorded.resid_mid)
    else:
        k, v = recorded.k.transpose(0, 1), recorded.v.transpose(0, 1)
        q, mid = replay_rows(block, recorded.call, recorded.resid_pre, k, v, recorded.mask, rows)
    resid_pre = take(recorded.resid_pre)
    resid_post = take(recording.resid_post(layer)).to(resid_pre.device)
    inputs = LayerInputs(
        rows=rows,
        resid_pre=resid_pre,
        y=resid_post if block.parallel else mid,
        q=q,
        k=recorded.k,
        v=recorded.v,
        W_O=block.W_O,
        scale=recorded.scale,
        window=recorded.window,
        softcap=recorded.softcap,
        sinks=recorded.sinks,
        ffn=resid_post - mid if block.parallel else None,
    )
    return inputs, None if block.parallel else resid_post
