"""The parts of one layer, found by running it on a short probe (model/opening.py, steps 2 to 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedArchitectureError
from .attention import AttentionCall
from .block import TOLERANCE, Branch, error_of_runs, relative_error, rounding_tolerance
from .branches import BRANCHES, Sum, sums
from .held import Residual, fit_heads, fit_rows
from .hooks import (
    LayerCall,
    StopForward,
    change_input,
    change_output,
    hooked,
    on_input,
    on_output,
)
from .interface import overriding
from .output_weights import output_map
from .replay import gates_at, read_at
from .residual import Meeting, Passing, meeting, passings, weighted

_PROBE_ROWS = 512  # rows of the identity that pass through a layer at once


class Probe(NamedTuple):
    """One layer's inputs and outputs on the probe; [T, ...] on the layer's device."""

    name: str
    module: nn.Module
    attention: nn.Module
    call: AttentionCall
    z: Tensor  # [T, H, V]
    layer_call: LayerCall
    resid_pre: Tensor  # [T, D]
    resid_post: Tensor  # [T, D]
    n_outputs: int | None  # of the tuple or list that the layer returns, if it does
    narrow_dtype: torch.dtype | None = None  # of modules that compute in no wider one

    @property
    def tolerance(self) -> float:
        """Relative error that rounding explains between two runs of the layer."""
        return rounding_tolerance(self.narrow_dtype or self.resid_post.dtype)

    def rerun_in_float32(self) -> Probe:
        """The probe with the layer run in float32 on the same stream and attention output.

        The caller makes the layer compute in float32. Raises UnsupportedArchitectureError if its
        output differs.
        """
        layer_call, z, hidden = self.layer_call.float(), self.z.float(), self.resid_pre.float()
        with overriding(lambda _: z[None]):
            output = layer_call(self.module, hidden[None])[0]
        error = error_of_runs(output, self.resid_post)
        if error > rounding_tolerance(self.resid_post.dtype):
            refuse(self, f"in float32 it gives another output (relative error {error:.1e})")
        return self._replace(z=z, layer_call=layer_call, resid_pre=hidden, resid_post=output)


class _Run(NamedTuple):
    """One run of a layer on the probe with its attention output overridden."""

    output: Tensor  # [T, D]
    attention_output: Tensor  # [T, D]
    inputs: list[tuple[nn.Module, Tensor]]  # inputs [T, D] of submodules called after attention
    outputs: list[tuple[nn.Module, Tensor]]  # outputs [T, D] of submodules outside attention
    emits_output: bool  # a submodule's output *is* the layer's
    width: int  # numbers per row in the widest tensor that a submodule returns


def _run(probe: Probe, hidden: Tensor, z: Tensor) -> _Run:
    """Replays the probe's layer on `hidden` [T, D] with attention output `z` [T, H, V]."""
    inputs: list[tuple[nn.Module, Tensor]] = []
    outputs: list[tuple[nn.Module, Tensor]] = []
    attention_output: list[Tensor] = []
    inside = set(probe.attention.modules())
    attended = False

    def answer(_: AttentionCall) -> Tensor:
        nonlocal attended
        attended = True
        return z[None]

    def is_stream(x: Tensor) -> bool:  # some layers merge rows with the batch
        return x.shape[-1] == hidden.shape[-1] and x.numel() == hidden.numel()

    def keep_input(module: nn.Module, x: Tensor) -> None:
        if attended and is_stream(x):
            inputs.append((module, x.reshape(hidden.shape).clone()))

    raw: list[Tensor] = []

    def keep_output(module: nn.Module, x: Tensor) -> None:
        raw.append(x)
        if is_stream(x):
            outputs.append((module, x.reshape(hidden.shape).clone()))

    handles = [on_output(probe.attention, attention_output.append)]
    for module in probe.module.modules():
        if module is not probe.module and module not in inside:
            handles.append(on_input(module, lambda x, m=module: keep_input(m, x)))  # type: ignore[misc]
            handles.append(on_output(module, lambda x, m=module: keep_output(m, x)))  # type: ignore[misc]
    with overriding(answer), hooked(*handles):
        output = probe.layer_call(probe.module, hidden[None])
    emits = any(x.data_ptr() == output.data_ptr() and x.shape == output.shape for x in raw)
    width = max((x.numel() for x in raw), default=hidden.numel()) // len(hidden)
    return _Run(output[0], attention_output[0][0], inputs, outputs, emits, width)


class _Parts(NamedTuple):
    """The parts by which a layer computes resid_mid from resid_pre and its attention output."""

    mid_site: nn.Module | None
    summed: Tensor  # [T, D] on the probe: the sum that `mid_site` reads; resid_mid, if plain
    resid_mid: Tensor  # [T, D] on the probe
    bias: Tensor  # [D]
    W_O: Tensor  # [H, V, D]
    row_scaled: bool = False
    gate_site: nn.Module | None = None
    width: int = 0
    branches: tuple[Branch, ...] = ()
    stream_scale: float = 1.0
    residual: Residual | None = None
    head_scaled: bool = False


def decompose(index: int, probe: Probe) -> _Parts:
    """Finds the parts of a layer, and checks that they add up to its output."""
    x, z = probe.resid_pre, probe.z
    generator = torch.Generator().manual_seed(index)
    # The step is relative: a unit step vanishes in a stream whose norm is in the thousands.
    d = x * torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
    zero = _run(probe, x, torch.zeros_like(z))
    moved = _run(probe, x + d, torch.zeros_like(z))
    whole = _run(probe, x, z)

    met: Meeting | None = None
    mid_site: nn.Module | None = None
    passed: Tensor | None = x
    for (module, at_zero), (_, at_moved), (_, at_whole) in zip(
        zero.inputs, moved.inputs, whole.inputs, strict=True
    ):
        follows = relative_error(at_moved - at_zero, (x + d) - x, x) < TOLERANCE
        if follows and not torch.equal(at_whole, at_zero):
            mid_site, summed = module, at_whole
            bias = at_zero - x
            break
    else:
        half = _run(probe, x, z / 2)
        step = whole.output - zero.output
        additive = relative_error((half.output - zero.output) * 2, step, whole.output) < TOLERANCE
        # A layer without an FFN; a norm of its heads may be in the way of halves.
        alone = relative_error(x + whole.attention_output, whole.output) < TOLERANCE
        if not torch.equal(whole.output, zero.output) and (additive or alone):
            bias = zero.attention_output
            summed, passed = x + whole.attention_output, None
            if not torch.equal(bias, moved.attention_output):
                refuse(probe, "its attention module adds more than its heads' outputs")
        else:
            met = meeting(x, x + d, zero.inputs, moved.inputs, whole.inputs, zero.outputs)
            if met is None:
                refuse(probe, "no place was found where its residual stream and attention meet")
            mid_site, summed, passed = met.site, met.whole, met.passed
            bias = met.without - met.passed
    middle = bias.median(0).values
    if relative_error(bias - middle, torch.zeros_like(bias), x if met is None else met.without) > 0:
        refuse(probe, "what it adds besides its heads' outputs is not a constant bias")

    if passed is None:
        attended, beside = whole.attention_output, whole.output
    else:
        attended, beside = summed - passed, summed
    parts = _close(probe, _Parts(mid_site, summed, summed, middle, z), attended, beside)
    parts = _passed_on(probe, whole, parts, met)

    error = relative_error(whole.output, probe.resid_post)
    if error > probe.tolerance:
        refuse(probe, f"a replay does not give its output back (relative error {error:.1e})")
    _check_sources(probe, parts, whole)
    return parts._replace(width=whole.width)


def _passed_on(probe: Probe, run: _Run, parts: _Parts, met: Meeting | None) -> _Parts:
    """`parts` with what the layer adds to its stream, and how it passes the stream on."""
    nearest = float("inf")
    for passing in passings(parts.mid_site, parts.summed, run.inputs, run.outputs, run.output):
        if passing.mid_norm is not None and parts.row_scaled:
            continue
        nearest, added = _branches(probe, run, passing, nearest, parts.mid_site is None)
        weight = None
        if added is None and parts.mid_site is not None:
            found = weighted(passing.target, passing.resid_mid, run.outputs)
            if found is not None and _is_all(probe, found.added, found.weight, passing):
                weight, added = found
        if added is None:
            continue
        if weight is None and passing.post_norm is not None and added.stream_scale != 1:
            weight = torch.full_like(parts.bias, added.stream_scale)
            added = Sum(added.branches, 1.0)
        norm = passing.mid_norm
        of = Residual(
            None if met is None else met.norm,
            None if met is None else met.weight,
            norm,
            weight,
            passing.post_norm,
        )
        return parts._replace(
            resid_mid=passing.resid_mid,
            W_O=parts.W_O if norm is None else norm.linear(parts.W_O),
            branches=added.branches,
            stream_scale=added.stream_scale,
            residual=None if all(x is None for x in of) else of,
        )
    if run.emits_output:
        refuse(
            probe,
            "its output is made by a submodule that is no norm of resid_mid plus what its FFN adds",
        )
    return refuse(
        probe,
        "what its FFN adds is no submodule's output, nor a sum of at most "
        f"{BRANCHES} (relative error {nearest:.1e})",
    )


def _check_sources(probe: Probe, parts: _Parts, whole: _Run) -> None:
    """Refuses a layer whose output at a row depends on more than `resid_mid` of that row (in a
    parallel block: than the stream and the attention output of that row).
    """
    rows, x, z = probe_rows(len(probe.resid_pre)), probe.resid_pre, probe.z

    def error_of(hidden: Tensor, z: Tensor, *handles: RemovableHandle) -> float:
        with overriding(lambda _: z[rows][None]), hooked(*handles):
            alone = probe.layer_call.at(rows)(probe.module, hidden[rows][None])[0]
        return relative_error(alone, whole.output[rows])

    def check_rows() -> None:
        error = error_of(x, z)
        if error > probe.tolerance:
            refuse(
                probe,
                "something in it beside attention reads other positions "
                f"(relative error {error:.1e} of rows on their own)",
            )

    # Where modules compute in half precision, another rounding may choose other experts.
    if parts.mid_site is None or (probe.narrow_dtype is not None and len(parts.branches) == 1):
        check_rows()
        return
    # Another stream, without attention, gives the same resid_mid: the output has to be the same.
    hidden, norm, handles = parts.summed - parts.bias, None, []
    if parts.residual is not None and parts.residual.pre_weight is not None:
        hidden, norm = hidden / parts.residual.pre_weight, parts.residual.pre_norm
        if not bool(torch.isfinite(hidden).all()):
            refuse(probe, "it passes on a part of its residual stream's coordinates")
    if norm is not None:
        normed = (hidden + norm.bias)[rows][None]
        handles.append(change_output(norm.site, lambda _: normed))
        hidden = x.flip(0)
    error = error_of(hidden, torch.zeros_like(z), *handles)
    if error > probe.tolerance:
        check_rows()
        refuse(
            probe,
            "what it adds after attention depends on more than the stream there: it reads the "
            f"stream before attention, or attention itself (relative error {error:.1e})",
        )


def _close(probe: Probe, parts: _Parts, attended: Tensor, beside: Tensor) -> _Parts:
    """`parts` with a map W_O by which they add up to what attention added, `attended` [T, D].

    The map is one for all rows, one scaled by a number for each row, or one behind a gate in value
    space, which a norm may scale by a number for each row and head.
    """

    def gate_sites() -> Iterator[nn.Module | None]:
        yield None
        yield from _gate_sites(probe)

    errors = []
    for gate_site in gate_sites():
        W_O = _probe_output_map(probe, parts.mid_site, gate_site)
        z, head_scaled = probe.z, False
        if gate_site is not None:
            shape = (probe.module, gate_site, probe.layer_call, probe.resid_pre)
            z = z * gates_at(*shape, z.shape)
            read = read_at(*shape, probe.z)
            if relative_error(z, read) > TOLERANCE:
                scaled = fit_heads(z, read)[..., None] * z
                head_scaled = relative_error(scaled, read) <= TOLERANCE
                z = scaled if head_scaled else z
        moved = torch.einsum("thv,hvd->td", z, W_O)
        errors.append(relative_error(moved + parts.bias, attended, beside))
        if errors[-1] <= TOLERANCE:
            return parts._replace(W_O=W_O, gate_site=gate_site, head_scaled=head_scaled)
        scale = fit_rows(moved, attended - parts.bias)
        errors.append(relative_error(scale[:, None] * moved + parts.bias, attended, beside))
        # A scale that is the same for all rows shows a wrong W_O, not a norm.
        varies = bool(scale.max() - scale.min() > TOLERANCE * scale.abs().max())
        if errors[-1] <= TOLERANCE and varies:
            # At 0 a norm multiplies by 1 / sqrt(eps), so W_O is scaled to the actual rows.
            W_O = W_O * scale.median()
            return parts._replace(
                W_O=W_O, row_scaled=True, gate_site=gate_site, head_scaled=head_scaled
            )
    total = "attention output" if parts.mid_site is None else "resid_mid"
    return refuse(probe, f"its parts do not add up to {total} (relative error {min(errors):.1e})")


def _probe_output_map(
    probe: Probe, mid_site: nn.Module | None, gate_site: nn.Module | None = None
) -> Tensor:
    """W_O [H, V, D]: the derivative of `resid_mid` (in a parallel block, of the layer's output) by
    the attention output of the last row, or by the gated one; taken at 0, where norms are linear.

    Forward mode is used because in half precision the difference of two runs would be lost in the
    rounding of the residual stream.
    """
    return output_map(
        probe.attention, probe.z, lambda x: _derivatives(probe, mid_site, gate_site, x)
    )


def _derivatives(
    probe: Probe, mid_site: nn.Module | None, gate_site: nn.Module | None, tangents: Tensor
) -> Tensor:
    """The derivatives [N, D] at 0 of `_probe_output_map` in the directions `tangents` [N, H, V]."""
    T = len(probe.z)
    rows_of: list[Tensor] = []
    for tangent in tangents.split(_PROBE_ROWS):
        rows = torch.full((len(tangent),), T - 1, device=probe.z.device)
        layer_call = probe.layer_call.at(rows)
        hidden = probe.resid_pre[rows][None]
        at_site: list[Tensor] = []

        def stop(x: Tensor, at_site: list[Tensor] = at_site) -> None:
            at_site.append(x)
            raise StopForward

        with forward_ad.dual_level():
            z = torch.zeros_like(tangent)[None]
            handles = []
            if mid_site is not None:
                handles.append(on_input(mid_site, stop))
            if gate_site is None:
                z = forward_ad.make_dual(z, tangent[None].contiguous())
            else:
                behind = forward_ad.make_dual(z.flatten(2), tangent[None].flatten(2))
                handles.append(change_input(gate_site, behind))
            with (
                suppress(StopForward),
                overriding(lambda _, z=z: z),  # type: ignore[misc]
                hooked(*handles),
            ):
                try:
                    at_site.append(layer_call(probe.module, hidden))
                except NotImplementedError as error:  # it rounds on the way, for example to int8
                    refuse(probe, f"what it makes of its attention has no derivative ({error})")
            derivative = forward_ad.unpack_dual(at_site[0]).tangent
        if derivative is None:
            refuse(probe, "its output does not depend on its attention")
        rows_of.append(derivative.reshape(len(tangent), -1))
    return torch.cat(rows_of)


def _gate_sites(probe: Probe) -> list[nn.Module]:
    """The submodules of the attention module that read its output for all heads at once, in the
    order of their calls.

    A submodule that makes a gate may be called after attention too. It reads the same numbers
    whatever attention gives.
    """

    def inputs(z: Tensor) -> list[tuple[nn.Module, Tensor]]:
        found: list[tuple[nn.Module, Tensor]] = []
        called = False

        def answer(_: AttentionCall) -> Tensor:
            nonlocal called
            called = True
            return z[None]

        def keep_input(module: nn.Module, x: Tensor) -> None:
            if called and x.numel() == z.numel() and x.shape[-1] == z[0].numel():
                found.append((module, x.clone()))

        handles = [
            on_input(module, lambda x, m=module: keep_input(m, x))  # type: ignore[misc]
            for module in probe.attention.modules()
            if module is not probe.attention
        ]
        with overriding(answer), hooked(*handles):
            probe.layer_call(probe.module, probe.resid_pre[None])
        return found

    pairs = zip(inputs(probe.z), inputs(torch.zeros_like(probe.z)), strict=True)
    return list(dict.fromkeys(module for (module, x), (_, y) in pairs if not torch.equal(x, y)))


def _branches(
    probe: Probe, run: _Run, passing: Passing, nearest: float, parallel: bool
) -> tuple[float, Sum | None]:
    """What the layer adds to `resid_mid`: one submodule's output times a constant (if several pass
    it on, that of the last one that is called only once), or else a sum of a few beside a multiple
    of the stream. No branches if all that pass it on are called several times; None if the target
    is no such sum. With the smallest error of one submodule's output, or `nearest` if that is less.
    """
    before, target = passing.resid_mid, passing.target
    left = target - before
    calls = [module for module, _ in run.outputs]
    best = float("inf")
    found: Branch | None = None
    for module, x in run.outputs:
        scale = (left * x).sum() / x.square().sum().clamp(min=1e-30)
        error = relative_error(scale * x, left, target)
        best = min(best, error)
        adds = bool(scale) or not bool(x.any())  # zero is a multiple of any output
        if error <= TOLERANCE and adds and calls.count(module) == 1:
            found = Branch(module, float(scale))
    nearest = min(best, nearest)
    if best <= TOLERANCE:
        return nearest, Sum(() if found is None else (found,), 1.0)
    for candidate in sums(target, before, run.outputs):
        whole = not (parallel and candidate.stream_scale != 1)
        if whole and _is_all(probe, candidate, candidate.stream_scale, passing):
            return nearest, candidate
    return nearest, None


def _is_all(probe: Probe, found: Sum, scale: float | Tensor, passing: Passing) -> bool:
    """True if the target is a multiple of the stream alone where the branches give 0."""
    handles = [change_output(branch.site, torch.zeros_like) for branch in found.branches]
    normed: list[Tensor] = []
    if passing.post_norm is not None:
        handles.append(on_input(passing.post_norm.site, normed.append))
    with hooked(*handles):
        output = _run(probe, probe.resid_pre, probe.z).output
    target = normed[-1].reshape(output.shape) if normed else output
    return relative_error(target, scale * passing.resid_mid) <= TOLERANCE


def probe_rows(n_tokens: int) -> Tensor:
    """Indices of the probe's rows that are run on their own."""
    return torch.tensor(sorted({n_tokens // 2, n_tokens - 1}))


def refuse(probe: Probe, why: str) -> NoReturn:
    raise UnsupportedArchitectureError(f"model: layer {probe.name} is not supported: {why}")
