"""The neurons of an FFN block: its output as a sum of activation times direction.

Nothing is known per family. A block's *down projection* is the submodule of the layer, outside of
attention, without whose input the FFN adds nothing but a bias, and in whose input what it adds is
linear, up to a number for each row (a norm after the FFN). It is looked for on a short probe:

1. with zeros as its input, what the layer adds to `resid_mid` is the same for every row: the bias;
2. with half of its input, the layer adds half as much (or, behind a norm, as much);
3. W [F, D], the derivative of the layer's output by its input, in forward mode, at 0, where norms
   are linear, gives back what the FFN added to each row. It has the output's norm weight and
   multipliers in it, and adapters.

A mixture of experts has several down projections and no such submodule: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import capture
from .capture import AttentionCall, LayerCall
from .errors import IfrError, UnsupportedArchitectureError
from .model import (
    HALF,
    TOLERANCE,
    Block,
    Decoder,
    fit_rows,
    in_float32,
    probe_tokens,
    relative_error,
    rounding_tolerance,
)
from .prefill import attended
from .recording import Recording, RecordingMode, past_of, record

_PROBE_ROWS = 512  # of the identity pushed through a layer at once


class NeuronBasis(NamedTuple):
    """What each neuron of a layer's FFN block writes, and where its activation is."""

    site: nn.Module  # whose input is the activations
    W: Tensor  # [F, D] what an activation of 1 adds; in a row-scaled block, before the scale
    bias: Tensor  # [D] what the FFN adds at activations of 0; of no neuron
    row_scaled: bool  # a norm stands after the FFN


class Activations(NamedTuple):
    """R rows of a layer's neurons."""

    values: Tensor  # [R, F] as the down projection reads them
    row_scale: Tensor | None  # [R] of what it makes of them


class NeuronBases:
    """The neuron bases of a model's layers, each found when it is first asked for."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._probe: Recording | None = None
        self._found: dict[int, NeuronBasis] = {}

    def __getitem__(self, layer: int) -> NeuronBasis:
        """Raises UnsupportedArchitectureError where the block has none."""
        if layer not in self._found:
            if self._probe is None:
                tokens = probe_tokens(self._decoder)
                strings = [""] * len(tokens)
                self._probe = record(self._decoder, tokens, strings, RecordingMode.FULL)
            self._found[layer] = _find(self._probe, layer)
        return self._found[layer]


def activations(
    recording: Recording, layer: int, rows: Tensor, basis: NeuronBasis, added: Tensor
) -> Activations:
    """The activations at `rows` [R] (int64, CPU, ascending), by running the layer on them again.

    added: [R, D] what the FFN added there; the neurons and the bias have to give it back, or
    IfrError is raised.
    """
    block = recording.decoder.blocks[layer]
    with torch.inference_mode(), attended(recording.decoder):
        run = _Replay.of(recording, layer, rows)
        values: list[Tensor] = []
        hooks = [capture.on_input(basis.site, lambda x: values.append(x.reshape(len(rows), -1)))]
        post = run(hooks)
        wide = torch.promote_types(post.dtype, torch.float32)
        moved = values[0].to(wide) @ basis.W.to(wide)
        left = added.to(wide) - basis.bias.to(wide)
        scale = fit_rows(moved, left) if basis.row_scaled else None
        parts = moved if scale is None else scale[:, None] * moved
    error = relative_error(parts, left, post)
    if error > rounding_tolerance(block.bias.dtype):
        raise IfrError(
            f"text: at layer {layer} the neurons do not add up to what the FFN added (relative "
            f"error {error:.1e}); were the model's weights changed after they were looked for?"
        )
    return Activations(values[0], scale)


class _Replay(NamedTuple):
    """A layer as it was called on some rows, its attention answered with what it was."""

    block: Block
    call: LayerCall
    hidden: Tensor  # [R, D]
    rows: Tensor  # [R]
    past: AttentionCall  # the keys and values that were read
    window: int | None

    @staticmethod
    def of(recording: Recording, layer: int, rows: Tensor) -> _Replay:
        block, recorded = recording.decoder.blocks[layer], recording.layers[layer]
        device = block.W_O.device
        return _Replay(
            block,
            recorded.call.at(rows),
            recorded.resid_pre[rows.to(recorded.resid_pre.device)].to(device),
            rows,
            past_of(block, recorded, recorded.k.to(device), recorded.v.to(device)),
            recorded.window,
        )

    def differentiable(self) -> _Replay:
        """The same in float32 or wider, and of tensors that forward mode takes."""

        def own(x: Tensor) -> Tensor:
            return x.float() if x.dtype in HALF else x.clone()

        def owned(x: Tensor | None) -> Tensor | None:
            return None if x is None else own(x)

        return self._replace(
            call=self.call._replace(
                args=capture.map_tensors(self.call.args, own),
                kwargs=capture.map_tensors(self.call.kwargs, own),
            ),
            hidden=own(self.hidden),
            past=self.past._replace(
                k=own(self.past.k),
                v=own(self.past.v),
                sinks=owned(self.past.sinks),
                alibi_slopes=owned(self.past.alibi_slopes),
            ),
        )

    def __call__(self, hooks: list[Any]) -> Tensor:
        """The layer's output [R, D]."""

        def answer(call: AttentionCall) -> Tensor:
            past = self.past._replace(q=call.q)
            return capture.attend_rows(past, call.q, self.rows, self.window)

        with capture.answering(answer), capture.hooks(*hooks):
            return self.call(self.block.module, self.hidden[None])[0]


class _Candidate(NamedTuple):
    """A submodule that may be the down projection."""

    site: nn.Module
    values: Tensor  # its input, as it came


def _find(probe: Recording, layer: int) -> NeuronBasis:
    block = probe.decoder.blocks[layer]
    found = None
    # Forward-mode derivatives do not exist in inference mode, nor do they take its tensors.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        attended(probe.decoder),
        in_float32(block.module) if block.bias.dtype in HALF else nullcontext(),
    ):
        run = _Replay.of(probe, layer, torch.arange(len(probe))).differentiable()
        candidates, mid, post = _watch(run)
        for candidate in candidates:
            found = _try(run, candidate, mid, post)
            if found is not None:
                break
    if found is None:
        raise UnsupportedArchitectureError(
            f"model: the FFN of layer {block.name} has no basis of neurons: no one projection "
            "makes its output from activations (a mixture of experts has several)"
        )
    return found._replace(W=_held(found, block.bias.dtype))


def _held(basis: NeuronBasis, dtype: torch.dtype) -> Tensor:
    """W in the model's dtype if that holds it, and the module's own weight where it is that."""
    narrow = basis.W.to(dtype)
    if not torch.equal(narrow.to(basis.W.dtype), basis.W):
        return basis.W
    weight = getattr(basis.site, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.dtype == dtype:
        for own in (weight.detach().T, weight.detach()):
            if own.device == narrow.device and torch.equal(own, narrow):
                return own
    return narrow


def _watch(run: _Replay) -> tuple[list[_Candidate], Tensor, Tensor]:
    """Submodules with a matrix that map rows to rows of the stream, the last that ran first; what
    stands before the FFN is added, and after, [R, D].
    """
    block, (R, D) = run.block, run.hidden.shape
    inside = set(block.attention.modules())
    candidates: list[_Candidate] = []
    mid: list[Tensor] = []

    def watch(module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x, made = args[0] if args else None, capture.hidden_output(output)
            if not isinstance(x, Tensor) or not isinstance(made, Tensor):
                return
            if x.shape[:-1].numel() == R and made.numel() == R * D:
                candidates.append(_Candidate(module, x.clone()))

        return module.register_forward_hook(hook)

    hooks = [
        watch(module)
        for module in block.module.modules()
        if module is not block.module
        and module not in inside
        and any(weight.ndim > 1 for weight in (*module.parameters(), *module.buffers()))
    ]

    def keep_mid(x: Tensor) -> None:
        x = x.reshape(R, D)
        mid.append(run.hidden + x if block.parallel else x.clone())

    hooks.append(block.on_mid(keep_mid))
    post = run(hooks)
    return candidates[::-1], mid[0], post


def _try(run: _Replay, candidate: _Candidate, mid: Tensor, post: Tensor) -> NeuronBasis | None:
    """The basis, if the candidate is the down projection."""

    def with_input(x: Tensor) -> Tensor:
        return run([capture.change_input(candidate.site, x)])

    at_zero = with_input(torch.zeros_like(candidate.values)) - mid
    bias = at_zero.median(0).values
    if relative_error(at_zero - bias, torch.zeros_like(mid), mid) > 0:
        return None
    added = post - mid - bias
    if relative_error(added, torch.zeros_like(mid), post) == 0:
        return None
    at_half = with_input(candidate.values / 2) - mid - bias
    errors = [relative_error(x, added, post) for x in (2 * at_half, at_half)]
    if min(errors) > TOLERANCE:
        return None
    values = candidate.values.reshape(len(mid), -1)
    W = torch.cat(list(_derivative(run, candidate)))
    moved = values @ W
    if relative_error(moved, added, post) <= TOLERANCE:
        return NeuronBasis(candidate.site, W, bias, row_scaled=False)
    scale = fit_rows(moved, added)
    if relative_error(scale[:, None] * moved, added, post) > TOLERANCE:
        return None
    # At 0 a norm multiplies by 1 / sqrt(eps): brought to where its rows are.
    return NeuronBasis(candidate.site, W * scale.median(), bias, row_scaled=True)


def _derivative(run: _Replay, candidate: _Candidate) -> Iterator[Tensor]:
    """Of the layer's output by the candidate's input, at 0: rows of [F, D]."""
    x = candidate.values
    T, F = run.hidden.shape[0], x.shape[-1]
    for tangent in torch.eye(F, dtype=x.dtype, device=x.device).split(_PROBE_ROWS):
        rows = torch.full((len(tangent),), T - 1, device=x.device)
        z = run.hidden.new_zeros(1, len(rows), *run.block.W_O.shape[:2])
        shape = (len(rows), F) if x.ndim == 2 else (1, len(rows), F)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.new_zeros(shape), tangent.reshape(shape).contiguous())
            with (
                capture.answering(lambda _, z=z: z),  # type: ignore[misc]
                capture.hooks(capture.change_input(candidate.site, dual)),
            ):
                made = run.call.at(rows)(run.block.module, run.hidden[rows][None])
            found = forward_ad.unpack_dual(made).tangent
        yield x.new_zeros(len(rows), run.hidden.shape[1]) if found is None else found[0]
