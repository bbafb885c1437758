"""A layer's output as a multiple of the stream plus a sum of a few submodules' outputs.

    resid_post = c * resid_mid + sum over k of a_k * output_k,    c and a_k constants

The constants of a choice of submodules are those of least squares, which need only the products of
all pairs of [resid_mid, outputs, resid_post] (the Gram matrix). All choices of one submodule are
tried, then all pairs, then all triples. A fit counts if it gives every row back.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .block import TOLERANCE, Branch, relative_error

BRANCHES = 3  # submodules in a sum, at most
_NEAR = 1e-2  # relative error of a fit, over all rows at once, that is worth a look at each row


class Sum(NamedTuple):
    """resid_post / stream_scale is resid_mid plus the branches' outputs times their factors."""

    branches: tuple[Branch, ...]  # in the order of their calls
    stream_scale: float


def sums(output: Tensor, before: Tensor, outputs: list[tuple[nn.Module, Tensor]]) -> list[Sum]:
    """The sums of the smallest number of submodules that give `output` [T, D] back, those that fit
    best first. Empty if there are none, or if they leave open how much of the stream is passed on.

    before: the stream [T, D] that is passed on; outputs: submodules and what they returned, [T, D].
    """
    candidates = [
        (module, x)
        for module, x in distinct(outputs)
        if not torch.equal(x, before)  # made by the norm behind which the stream is passed on
    ]
    columns = torch.stack([before, *(x for _, x in candidates), output]).flatten(1)
    # Double precision is for the products: a small branch beside a large stream has small ones.
    columns = columns.cpu().double()
    columns /= torch.linalg.vector_norm(columns, dim=1, keepdim=True).clamp(min=1e-300)
    gram = columns @ columns.T
    for size in range(1, min(BRANCHES, len(candidates)) + 1):
        chosen = torch.tensor(list(combinations(range(1, len(candidates) + 1), size)))
        index = torch.cat([torch.zeros(len(chosen), 1, dtype=torch.long), chosen], dim=1)
        among = gram[index[:, :, None], index[:, None]]
        to = gram[index, -1]
        weights = (torch.linalg.pinv(among, rtol=1e-12, hermitian=True) @ to[:, :, None])[..., 0]
        left = 1 - (weights * to).sum(-1)  # squared, relative to the output's norm
        found = []
        for i in left.argsort().tolist():
            if left[i] > _NEAR**2:
                break
            sites = [candidates[k - 1] for k in chosen[i].tolist()]
            fit = _fitted(output, before, sites)
            if fit is not None:
                found.append(fit)
        if found:
            scale = found[0].stream_scale
            agree = all(abs(fit.stream_scale - scale) <= TOLERANCE * abs(scale) for fit in found)
            return found if agree else []
    return []


def distinct(outputs: list[tuple[nn.Module, Tensor]]) -> list[tuple[nn.Module, Tensor]]:
    """Submodules that are called once and return something. Of those that pass on a multiple of the
    same output the last is taken.
    """
    calls = [module for module, _ in outputs]
    found: list[tuple[nn.Module, Tensor]] = []
    for module, x in outputs:
        if calls.count(module) > 1 or not bool(x.any()):
            continue
        found = [
            (other, y)
            for other, y in found
            if relative_error((x * y).sum() / y.square().sum() * y, x) > TOLERANCE
        ]
        found.append((module, x))
    return found


def _fitted(output: Tensor, before: Tensor, sites: list[tuple[nn.Module, Tensor]]) -> Sum | None:
    """The sum of the sites' outputs that comes nearest, if it gives every row back and passes the
    stream on.
    """
    columns = torch.stack([before, *(x for _, x in sites)]).flatten(1).cpu().double()
    size = torch.linalg.vector_norm(columns, dim=1)
    weights = torch.linalg.lstsq((columns / size[:, None]).T, output.flatten().cpu().double())[0]
    scale, *factors = (_constant(x, output.dtype) for x in (weights / size).tolist())
    if abs(scale - 1) <= 4 * torch.finfo(output.dtype).eps:
        scale = 1.0
    if abs(scale) * float(size[0]) <= TOLERANCE * float(torch.linalg.vector_norm(output)):
        return None  # a submodule passes the stream on, perhaps by a norm
    added = sum(factor * x for factor, (_, x) in zip(factors, sites, strict=True))
    assert isinstance(added, Tensor)
    if relative_error(added, output - scale * before, output) > TOLERANCE:
        return None
    branches = [
        Branch(module, factor / scale) for factor, (module, _) in zip(factors, sites, strict=True)
    ]
    return Sum(tuple(branches), scale)


def _constant(x: float, dtype: torch.dtype) -> float:
    """The number of the layer's precision that a fitted constant stands for."""
    single = float(torch.tensor(x, dtype=torch.float32))
    return x if dtype == torch.float64 and abs(single - x) > 1e-12 * abs(x) else single
