"""The neurons of an FFN block: its output as a sum of activation times direction.

Nothing here depends on a model family. A block's *down projection* is a submodule of the layer,
outside attention. With zeros as its input the FFN adds only a bias, and what the FFN adds is linear
in its input, up to a number for each row (a norm after the FFN). A short probe finds it:

1. with zeros as its input, the layer adds the same to `resid_mid` in every row: the bias;
2. with half of its input, the layer adds half as much (or as much, if a norm follows);
3. W [F, D] is the derivative of the layer's output by that input, in forward mode, taken at 0,
   where norms are linear. It reproduces what the FFN added to each row. It includes the output's
   norm weight, multipliers and adapters.

Where a layer multiplies its output by a constant, that constant is taken off first
(`Block.unscaled`). Where a norm of the whole stream ends the layer, the neurons of the sum that it
reads are found, and the norm is held (model/held.py): W and the bias go through its map, and a
number for each row multiplies both. A mixture of experts has several down projections, so no single
submodule fits: it is refused. So is an FFN that is the sum of several submodules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import IfrError, UnsupportedArchitectureError
from ..model.attention import AttentionCall, attend_rows
from ..model.block import HALF, TOLERANCE, Block, relative_error, rounding_tolerance
from ..model.decoder import Decoder
from ..model.held import fit_rows
from ..model.hooks import (
    LayerCall,
    change_input,
    hidden_output,
    hooked,
    in_this_thread,
    map_tensors,
    on_input,
)
from ..model.interface import overriding
from ..model.modes import in_float32, is_packed
from ..model.opening import probe_tokens
from ..recording.layer_inputs import past_of
from ..recording.record import record
from ..recording.recording import Recording, RecordingMode

_PROBE_ROWS = 512  # rows of the identity that pass through a layer at once


class NeuronBasis(NamedTuple):
    """The directions that the neurons of a layer's FFN block write, and the activations' site."""

    site: nn.Module  # the module whose input is the activations
    W: Tensor  # [F, D] output of an activation of 1; in a row-scaled block, before the scale
    bias: Tensor  # [D] output of the FFN at activations of 0; it belongs to no neuron
    row_scaled: bool  # a norm follows the FFN
    bias_scaled: bool = False  # it scales the bias too


class Activations(NamedTuple):
    """R rows of a layer's neurons."""

    values: Tensor  # [R, F] as the down projection reads them
    row_scale: Tensor | None  # [R] scale of the down projection's output


class NeuronBases:
    """The neuron bases of a model's layers, each found at its first use."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._probe: Recording | None = None
        self._found: dict[int, NeuronBasis] = {}

    def __getitem__(self, layer: int) -> NeuronBasis:
        """The basis of a layer; raises UnsupportedArchitectureError if its block has none."""
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

    added: [R, D] what the FFN added there. IfrError is raised unless the neurons and the bias add
    up to it.
    """
    block = recording.decoder.blocks[layer]
    with torch.inference_mode(), recording.decoder.replaying():
        run = _Replay.of(recording, layer, rows)
        values: list[Tensor] = []
        hooks = [on_input(basis.site, lambda x: values.append(x.reshape(len(rows), -1)))]
        post = run(hooks)
        wide = torch.promote_types(post.dtype, torch.float32)
        moved = values[0].to(wide) @ basis.W.to(wide)
        left, bias = added.to(wide), basis.bias.to(wide)
        if basis.bias_scaled:
            moved = moved + bias
        else:
            left = left - bias
        scale = fit_rows(moved, left) if basis.row_scaled else None
        parts = moved if scale is None else scale[:, None] * moved
    error = relative_error(parts, left, post)
    if error > rounding_tolerance(block.bias.dtype):
        raise IfrError(
            f"text: at layer {layer} the neurons do not add up to what the FFN added (relative "
            f"error {error:.1e}); were the model's weights changed after its neurons were found?"
        )
    return Activations(values[0], scale)


class _Replay(NamedTuple):
    """A layer's call on some rows, with its attention over the recorded keys and values."""

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
        """A copy in float32 or wider, made of tensors that forward mode accepts."""

        def own(x: Tensor) -> Tensor:
            return x.float() if x.dtype in HALF else x.clone()

        def owned(x: Tensor | None) -> Tensor | None:
            return None if x is None else own(x)

        return self._replace(
            call=self.call._replace(
                args=map_tensors(self.call.args, own),
                kwargs=map_tensors(self.call.kwargs, own),
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
        """The layer's output [R, D], unscaled and before a norm of it."""

        def answer(call: AttentionCall) -> Tensor:
            past = self.past._replace(q=call.q)
            return attend_rows(past, call.q, self.rows, self.window)

        with overriding(answer), hooked(*hooks):
            return self.left(self.call, self.hidden)

    def left(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """What a run of the layer on `hidden` [R, D] gives."""
        norm = None if self.block.residual is None else self.block.residual.post_norm
        read: list[Tensor] = []
        with hooked(*([] if norm is None else [on_input(norm.site, read.append)])):
            output = call(self.block.module, hidden[None])[0]
        return read[-1].reshape(output.shape) if read else self.block.unscaled(output)


class _Candidate(NamedTuple):
    """A submodule that may be the down projection."""

    site: nn.Module
    values: Tensor  # its input, in the original shape


def _find(probe: Recording, layer: int) -> NeuronBasis:
    block = probe.decoder.blocks[layer]
    if len(block.branches) > 1:
        raise UnsupportedArchitectureError(
            f"model: the FFN of layer {block.name} is a sum of the outputs of "
            f"{len(block.branches)} submodules, so it has no one basis of neurons"
        )
    found = None
    n_rows = min(_PROBE_ROWS, probe.decoder.max_length or _PROBE_ROWS)
    # Forward-mode derivatives exist neither in inference mode nor for its tensors.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        probe.decoder.replaying(),
        in_float32(block.module, block.bias.dtype) if block.bias.dtype in HALF else nullcontext(),
    ):
        run = _Replay.of(probe, layer, torch.arange(len(probe))).differentiable()
        candidates, mid, post = _watch(run)
        packed = [x.site for x in candidates if is_packed(x.site)]
        for candidate in candidates:
            with suppress(NotImplementedError):  # a packed projection has no derivative
                found = _try(run, candidate, mid, post, n_rows)
            if found is not None:
                break
    if found is None and packed:
        raise UnsupportedArchitectureError(
            f"model: the FFN of layer {block.name} has packed weights "
            f"({type(packed[0]).__name__}), so its neurons are not known; open the dequantized "
            "model (`model.dequantize()`)"
        )
    if found is None:
        raise UnsupportedArchitectureError(
            f"model: the FFN of layer {block.name} has no basis of neurons: no one projection "
            "makes its output from activations (a mixture of experts has several)"
        )
    norm = None if block.residual is None else block.residual.post_norm
    if norm is not None and not found.row_scaled:
        W, bias = norm.linear(found.W), norm.linear(found.bias)
        return NeuronBasis(found.site, W, bias, row_scaled=True, bias_scaled=True)
    if norm is not None:
        raise UnsupportedArchitectureError(
            f"model: the FFN of layer {block.name} has a norm of its own before a norm of the "
            "stream, so its neurons are not known"
        )
    return found._replace(W=_held(found, block.bias.dtype))


def _held(basis: NeuronBasis, dtype: torch.dtype) -> Tensor:
    """W in the model's dtype if exact there; the module's own weight if it is equal."""
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
    """Submodules that have a matrix and map rows to rows of the stream, the last that ran first;
    and the stream before and after the FFN is added, [R, D] each.
    """
    block, (R, D) = run.block, run.hidden.shape
    inside = set(block.attention.modules())
    candidates: list[_Candidate] = []
    mid: list[Tensor] = []

    def watch(module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x, made = args[0] if args else None, hidden_output(output)
            if not isinstance(x, Tensor) or not isinstance(made, Tensor):
                return
            if x.shape[:-1].numel() == R and made.numel() == R * D:
                candidates.append(_Candidate(module, x.clone()))

        return module.register_forward_hook(in_this_thread(hook))

    hooks = [
        watch(module)
        for module in block.module.modules()
        if module is not block.module
        and module not in inside
        and any(weight.ndim > 1 for weight in (*module.parameters(), *module.buffers()))
    ]

    def keep_mid(x: Tensor) -> None:
        x = x.reshape(R, D)
        weight = None if block.residual is None else block.residual.mid_weight
        passed = x if weight is None else x * weight
        mid.append(run.hidden + x if block.parallel else passed.clone())

    hooks.append(block.on_mid(keep_mid))
    post = run(hooks)
    return candidates[::-1], mid[0], post


def _try(
    run: _Replay, candidate: _Candidate, mid: Tensor, post: Tensor, n_rows: int
) -> NeuronBasis | None:
    """The basis if the candidate is the down projection, else None. n_rows: rows of a run."""

    def with_input(x: Tensor) -> Tensor:
        return run([change_input(candidate.site, x)])

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
    W = torch.cat(list(_derivative(run, candidate, n_rows)))
    moved = values @ W
    if relative_error(moved, added, post) <= TOLERANCE:
        return NeuronBasis(candidate.site, W, bias, row_scaled=False)
    scale = fit_rows(moved, added)
    if relative_error(scale[:, None] * moved, added, post) > TOLERANCE:
        return None
    # At 0 a norm multiplies by 1 / sqrt(eps), so W is scaled to the actual rows.
    return NeuronBasis(candidate.site, W * scale.median(), bias, row_scaled=True)


def _derivative(run: _Replay, candidate: _Candidate, n_rows: int) -> Iterator[Tensor]:
    """The derivative [F, D] of the layer's output by the candidate's input at 0, in row blocks."""
    x = candidate.values
    T, F = run.hidden.shape[0], x.shape[-1]
    for tangent in torch.eye(F, dtype=x.dtype, device=x.device).split(n_rows):
        rows = torch.full((len(tangent),), T - 1, device=x.device)
        z = run.hidden.new_zeros(1, len(rows), *run.block.W_O.shape[:2])
        shape = (len(rows), F) if x.ndim == 2 else (1, len(rows), F)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.new_zeros(shape), tangent.reshape(shape).contiguous())
            with (
                overriding(lambda _, z=z: z),  # type: ignore[misc]
                hooked(change_input(candidate.site, dual)),
            ):
                made = run.left(run.call.at(rows), run.hidden[rows])
            found = forward_ad.unpack_dual(made).tangent
        yield x.new_zeros(len(rows), run.hidden.shape[1]) if found is None else found
