"""Finds how a layer passes its stream on, where that is not by plain additions (held.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .block import TOLERANCE, Branch, relative_error
from .branches import Sum, distinct
from .held import HeldNorm

_Calls = list[tuple[nn.Module, Tensor]]  # submodules, and what each call read or returned, [T, D]


def held_norm(module: nn.Module, x: Tensor, out: Tensor) -> HeldNorm | None:
    """The norm that `module` is, if it makes `out` [T, D] of the rows x [T, D], each with a number
    of its own: f * L(x) + bias. L is the derivative at 0, in two directions.
    """
    generator = torch.Generator().manual_seed(0)
    size = 1 + torch.rand(2, x.shape[-1], generator=generator, dtype=torch.float64)
    size[0, ::2] *= -1  # a mean near 0, by which no coordinate is lost
    tangent = size.to(x)
    with suppress(Exception):  # it is no norm: it takes other arguments, or returns another shape
        if relative_error(module(x[None])[0], out, out) > TOLERANCE:
            return None
        with forward_ad.dual_level():
            made = module(forward_ad.make_dual(torch.zeros_like(tangent)[None], tangent[None]))
            at_zero, moved = (y[0].clone() for y in forward_ad.unpack_dual(made))
        if not torch.equal(at_zero[0], at_zero[1]):
            return None
        for centered in (False, True):
            base = tangent - tangent.mean(-1, keepdim=True) if centered else tangent
            weight = moved[0] / base[0]
            if relative_error(weight * base[1], moved[1]) > TOLERANCE:
                continue
            norm = HeldNorm(module, weight, centered, at_zero[0])
            factor = norm.factors(x, out)
            # At 0 a norm multiplies by 1 / sqrt(eps), so its map is scaled to the actual rows.
            norm = norm._replace(weight=weight * factor.median())
            left, factor = out - norm.bias, norm.factors(x, out)[:, None]
            if relative_error(factor * norm.linear(x), left, out) <= TOLERANCE:
                return norm
    return None


class Meeting(NamedTuple):
    """The place where a layer adds attention's output to what it passes on of its stream."""

    site: nn.Module  # reads the sum
    without: Tensor  # [T, D] the sum where attention gives 0
    whole: Tensor  # [T, D] the sum
    passed: Tensor  # [T, D] what is passed on of the stream
    norm: HeldNorm | None
    weight: Tensor  # [D]


def meeting(
    x: Tensor, moved_x: Tensor, without: _Calls, moved: _Calls, whole: _Calls, made: _Calls
) -> Meeting | None:
    """The first submodule that reads, beside attention's output, a multiple of each coordinate of
    the stream x [T, D] or of a norm of it; None if there is none.

    without, moved, whole: what submodules read in the layer's runs on x without attention, on
    `moved_x` without attention, and on x; made: what they returned in the first.
    """
    norms = []
    for module, out in made:
        norm = held_norm(module, x, out)
        if norm is not None:
            norms.append(norm)
    streams: list[tuple[HeldNorm | None, Tensor, Tensor]] = [(None, x, moved_x)]
    for norm in norms:
        at, at_moved = (norm.site(y[None])[0] - norm.bias for y in (x, moved_x))
        streams.append((norm, at, at_moved))
    for (site, at), (_, at_moved), (_, at_whole) in zip(without, moved, whole, strict=True):
        if torch.equal(at_whole, at):
            continue
        for norm, stream, moved_stream in streams:
            weight = _multiples(moved_stream - stream, at_moved - at)
            change = weight * (moved_stream - stream)
            if bool(weight.any()) and relative_error(change, at_moved - at, at) < TOLERANCE:
                return Meeting(site, at, at_whole, weight * stream, norm, weight)
    return None


def _multiples(x: Tensor, y: Tensor) -> Tensor:
    """The number [D] for each coordinate by which x [T, D] comes nearest to y [T, D]."""
    x64, y64 = x.cpu().double(), y.cpu().double()
    return ((x64 * y64).sum(0) / x64.square().sum(0).clamp(min=1e-300)).to(x)


class Passing(NamedTuple):
    """A way in which a layer may pass its stream on to its output."""

    mid_norm: HeldNorm | None  # makes resid_mid of the sum where stream and attention meet
    resid_mid: Tensor  # [T, D]
    post_norm: HeldNorm | None  # makes the output of the sum of resid_mid and the FFN
    target: Tensor  # [T, D] that sum, which is the output where there is no norm


def passings(
    site: nn.Module | None, summed: Tensor, inputs: _Calls, outputs: _Calls, output: Tensor
) -> Iterator[Passing]:
    """The ways to be tried, a plain one first. site reads `summed` [T, D] (None: a parallel block);
    inputs, outputs: what submodules read and returned; output: the layer's, [T, D].
    """
    yield Passing(None, summed, None, output)
    if site is None:
        return
    mids: list[tuple[HeldNorm | None, Tensor]] = [(None, summed)]
    made = [x for module, x in outputs if module is site]
    if len(made) == 1:
        norm = held_norm(site, summed, made[0])
        if norm is not None:
            mids.append((norm, made[0]))
            yield Passing(norm, made[0], None, output)
    for module, read, is_last in reversed(_last_calls(inputs)):
        made = [x for other, x in outputs if other is module]
        if module is site or not made or not is_last or not torch.equal(made[-1], output):
            continue
        norm = held_norm(module, read, made[-1])
        if norm is not None:
            for mid_norm, resid_mid in mids:
                yield Passing(mid_norm, resid_mid, norm, read)


def _last_calls(inputs: _Calls) -> list[tuple[nn.Module, Tensor, bool]]:
    """Calls, and whether each is the last of its module."""
    calls = [module for module, _ in inputs]
    return [(m, x, m not in calls[i + 1 :]) for i, (m, x) in enumerate(inputs)]


class Weighted(NamedTuple):
    """`target` is weight * resid_mid plus a branch's output times its factor."""

    weight: Tensor  # [D]
    added: Sum


def weighted(target: Tensor, resid_mid: Tensor, outputs: _Calls) -> Weighted | None:
    """The target [T, D] as a multiple of each coordinate of resid_mid [T, D], plus one submodule's
    output. None if it is not, if the multiples are all the same (branches.py finds those), or if
    they can be chosen in several ways.
    """
    found: list[Weighted] = []
    y, x = target.cpu().double(), resid_mid.cpu().double()

    def beside(z: Tensor) -> Tensor:
        """z [T, D] less what is a multiple of x in each coordinate."""
        return z - x * ((x * z).sum(0) / x.square().sum(0).clamp(min=1e-300))

    for module, out in reversed(distinct(outputs)):
        z = out.cpu().double()
        left = beside(z)
        factor = float((left * beside(y)).sum() / left.square().sum().clamp(min=1e-300))
        weight = _multiples(x, y - factor * z).to(target)
        sum_of_both = weight * resid_mid + factor * out
        if factor and relative_error(sum_of_both, target) <= TOLERANCE:
            found.append(Weighted(weight, Sum((Branch(module, factor),), 1.0)))
    if not found:
        return None
    weight = found[0].weight
    granted = TOLERANCE * weight.abs().max()
    agree = all(bool((of.weight - weight).abs().max() <= granted) for of in found)
    return found[0] if agree and bool(weight.max() - weight.min() > granted) else None
