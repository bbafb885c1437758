"""A decode step runs one new token through the model, its attention reading stored keys and values,
and scores each layer's new row as soon as the layer has computed it.

At that time the layer's keys, values and W_O are still in the processor's cache, and the row's
activations can be dropped afterwards. Two stores do the work of a layer: the native kernel's own,
which hands attention weights on to scoring, and `TensorLayer` for all other kernels, devices and
dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..kernels.contract import AttentionScores
from ..kernels.precision import exact_products
from ..model.attention import AttentionCall
from ..model.block import Block
from ..model.decoder import Decoder
from ..model.held import wide
from ..model.hooks import LayerCall, on_input, on_layer_call, on_output
from ..model.modes import all_evaluating
from ..model.node_parts import MidParts, PostParts, mid_parts, post_parts
from ..model.replay import gate_rows
from ..model.stream import Chain, on_end
from ..recording.hook_checks import Additions, hooked_layers
from ..recording.recording import LayerRecording
from ..scoring.closure import cat_on
from ..scoring.implementations import Kernel
from .stores import StepLayer, StepScores, TensorLayer, TensorScores, with_room


class NewRows(NamedTuple):
    """A decode step's rows, one for each of N layers that are all sequential or all parallel."""

    layers: list[int]  # ascending
    residual: Tensor  # [N, D] the part of resid_pre
    y: Tensor  # [N, D] resid_mid, or resid_post in parallel blocks
    ffn: Tensor | None  # [N, D], parallel blocks only
    post: PostParts | None  # N rows, sequential blocks only
    bias: Tensor  # [N, D]
    scores: AttentionScores


class _Layer:
    """A layer of the running pass, and its store, whose room is doubled when used up."""

    layer_call: LayerCall
    resid_pre: Tensor  # [1, D]
    z: Tensor  # [1, H, V]
    mid: Tensor  # [1, D]
    resid_post: Tensor  # [1, D]
    normed: Tensor | None = None  # [1, D] what the norm of the layer's output reads, if any
    of_mid: MidParts
    ffn: Tensor | None  # [1, D], parallel blocks only

    def __init__(self, block: Block, recorded: LayerRecording, room: int, open_: _Open) -> None:
        self.block = block
        self.W_O = _where_it_lies(block)
        self.window = block.window if recorded.window is None else recorded.window
        slopes, device = recorded.alibi_slopes, block.W_O.device
        self.alibi_slopes = None if slopes is None else slopes.to(device)
        self.n_keys = len(recorded.k)
        self._open, self._recorded = open_, recorded
        # Recorded tensors may lie in host memory or in a file.
        self._move(recorded.k.to(device), recorded.v.to(device), self.n_keys + room)

    def _move(self, k: Tensor, v: Tensor, room: int) -> None:
        """Moves all keys and values into a store with `room`."""
        T = len(self._recorded.k)
        self.k, self.v = (with_room(x, room) for x in (k, v))
        self._recorded = replace(self._recorded, k=self.k[:T], v=self.v[:T])
        self._step = self._open(self)

    @property
    def recorded(self) -> LayerRecording:
        """The layer's recording, its keys and values in the store."""
        return self._recorded

    def attend(self, call: AttentionCall) -> Tensor:
        """The attention output [1, 1, H, V] of a new row, whose key and value are stored."""
        if self.n_keys == len(self.k):
            self._move(self.k, self.v, 2 * self.n_keys)
        self.n_keys += 1
        z = self._step.attend(
            call.q, call.k, call.v, call.scale,
            window=self.window, softcap=call.softcap, sinks=call.sinks,
        )  # fmt: skip
        self.z = z[0]
        return z

    def score(self, keep: float) -> None:
        """Scores the row that attended last."""
        block, gate = self.block, None
        if block.gate_site is not None:
            gate = gate_rows(block, self.layer_call, self.resid_pre, torch.tensor([0]), self.z)
        of = self.of_mid = mid_parts(block, self.resid_pre, self.mid, self.z, gate)
        self.ffn = self.resid_post - self.mid if block.parallel else None
        y = self.resid_post if block.parallel else self.mid
        self._step.score(
            of.residual, y, keep, row_scale=of.row_scale, value_gate=gate, ffn=self.ffn
        )

    def post_parts(self) -> PostParts:
        """The parts of the row that was left last, of a sequential block."""
        return post_parts(self.block, self.mid, self.resid_post, self.normed)

    def watch(self, chain: Chain, keep: float, hooked: bool) -> Iterator[RemovableHandle]:
        """Hooks that note a step's row, and score it unless the block has a gate. hooked: whether
        the layer holds hooks of users, so that its output has to be checked.
        """
        block, added = self.block, Additions(self.block)

        def enter(hidden: Tensor, call: LayerCall) -> None:
            chain.enter(f"layer {block.name}", hidden)
            self.resid_pre, self.layer_call = hidden[0], call

        def keep_mid(x: Tensor) -> None:
            found = x.reshape(1, -1)
            self.mid = self.resid_pre + found if block.parallel else found
            if not block.parallel and block.gate_site is None:
                self.score(keep)

        def leave(x: Tensor) -> None:
            chain.leave(x)
            self.resid_post = x[0]
            if hooked:
                added.check(self.mid, self.resid_post)
            if block.parallel and block.gate_site is None:
                self.score(keep)

        def keep_normed(x: Tensor) -> None:
            self.normed = x.reshape(1, -1)

        if block.residual is not None and block.residual.post_norm is not None:
            yield on_input(block.residual.post_norm.site, keep_normed)
        if hooked:
            yield from added.watch()
        yield on_layer_call(block.module, enter)
        yield block.on_mid(keep_mid)
        yield on_output(block.module, leave)


_Open = Callable[[_Layer], StepLayer]


def _where_it_lies(block: Block) -> Tensor:
    """W_O of a block; if the model's own weight is equal, that weight: the model has just
    multiplied by it, so that it is still in the processor's cache.
    """
    H, V, D = block.W_O.shape
    for weight in block.attention.parameters():
        if type(weight) is not nn.Parameter:  # quantized weights are of other classes
            continue
        if weight.shape == (D, H * V) and weight.dtype == block.W_O.dtype:
            view = weight.detach().view(D, H, V).permute(1, 2, 0)
            if view.device == block.W_O.device and torch.equal(view, block.W_O):
                return view
    return block.W_O


class _Alike:
    """Layers that are all sequential or all parallel, so that their rows form one table."""

    def __init__(
        self,
        blocks: list[Block],
        recorded: Sequence[LayerRecording],
        room: int,
        kernel: Kernel,
        device: torch.device,
    ) -> None:
        dtypes = {x.dtype for layer in recorded for x in (layer.k, layer.v)}
        self.scores, open_ = _scored_by(kernel, dtypes, blocks[0], device)
        self.layers = [
            _Layer(block, x, room, open_) for block, x in zip(blocks, recorded, strict=True)
        ]
        self.numbers = [block.layer for block in blocks]
        self._device = device
        self._on_one_device = all(x.W_O.device == device for x in self.layers)

    def take(self) -> NewRows:
        """The rows of the last step."""
        layers = self.layers
        cat = torch.cat if self._on_one_device else functools.partial(cat_on, self._device)
        residual = cat([x.of_mid.residual for x in layers])
        bias = cat([x.of_mid.bias.expand(1, -1) for x in layers])
        scores = self.scores.take()
        if layers[0].block.parallel:
            y = cat([x.resid_post for x in layers])
            ffn = cat([x.ffn for x in layers if x.ffn is not None])
            return NewRows(self.numbers, residual, y, ffn, None, bias, scores)
        y = cat([x.mid for x in layers])
        post = _joined([x.post_parts() for x in layers], cat)
        return NewRows(self.numbers, residual, y, None, post, bias, scores)


def _joined(rows: list[PostParts], cat: Callable[[list[Tensor]], Tensor]) -> PostParts:
    """The parts of several layers' rows as one."""
    given_ffn = error = None
    if any(x.given_ffn is not None for x in rows):
        given_ffn = cat([x.ffn for x in rows])
        none = wide(rows[0].y).new_zeros(1)
        error = cat([none.to(x.y.device) if x.error is None else x.error for x in rows])
    return PostParts(cat([x.residual for x in rows]), cat([x.y for x in rows]), given_ffn, error)


def _scored_by(
    kernel: Kernel, dtypes: set[torch.dtype], block: Block, device: torch.device
) -> tuple[StepScores, _Open]:
    """The scores of a group of layers, and how to open each store. dtypes: of keys and values."""
    from ..kernels.cpu import kernel as cpu

    if kernel is cpu and dtypes == {torch.float32}:
        native = cpu.StepScores(block.W_O.shape[0])
        return native, lambda x: cpu.StepLayer(x.k, x.v, x.n_keys, x.W_O, x.alibi_slopes, native)
    scores = TensorScores(device)
    return scores, lambda x: TensorLayer(x.k, x.v, x.n_keys, x.W_O, x.alibi_slopes, kernel, scores)


class Decoding:
    """Decode steps of one text, whose beginning has been recorded.

    recorded: that recording's layers. room: tokens that stores have room for at first, beyond those
    recorded. keep: edges with weight above it are listed. device: the rows of all layers are moved
    there.
    """

    def __init__(
        self,
        decoder: Decoder,
        recorded: Sequence[LayerRecording],
        room: int,
        kernel: Kernel,
        keep: float,
        device: torch.device,
    ) -> None:
        self._decoder, self._keep = decoder, keep
        self._alike = []
        for parallel in (False, True):
            of = [i for i, block in enumerate(decoder.blocks) if block.parallel == parallel]
            if of:
                blocks, those = [decoder.blocks[i] for i in of], [recorded[i] for i in of]
                self._alike.append(_Alike(blocks, those, room, kernel, device))
        layers = [layer for alike in self._alike for layer in alike.layers]
        self._layers = sorted(layers, key=lambda layer: layer.block.layer)
        self._of_module = {layer.block.attention: layer for layer in self._layers}
        self._modules = list(decoder.model.modules())

    @property
    def recorded(self) -> list[LayerRecording]:
        """Each layer's recording, its keys and values in the store."""
        return [layer.recorded for layer in self._layers]

    def step(self, token_id: int, position: int) -> tuple[Tensor, list[NewRows]]:
        """Runs the model on the token at `position`, the end of the text so far. Returns the logits
        [vocab] of the next token, and the scored row of each layer.
        """

        def answer(call: AttentionCall) -> Tensor:
            return self._of_module[call.module].attend(call)

        with (
            self._decoder.attention_through(self._decoder.model, answer),
            all_evaluating(self._modules),
            exact_products(),
        ):
            chain, checked = Chain(len(self._layers)), hooked_layers(self._decoder)
            with ExitStack() as hooks:  # all are removed after an interrupt too
                for layer in self._layers:
                    of_user = layer.block.layer in checked
                    for handle in layer.watch(chain, self._keep, of_user):
                        hooks.callback(handle.remove)
                hooks.callback(on_end(self._decoder, chain).remove)
                _, logits = self._decoder.step(token_id, position)
            chain.verify()
            for layer in self._layers:  # gated layers run again, for their gates
                if layer.block.gate_site is not None:
                    layer.score(self._keep)
        return logits, [alike.take() for alike in self._alike]
