"""DELETION"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..tracer import Tracer

STEPS = 20


STOP_TOKENS = (",", ".", "")  # tokens that are left alone, stripped


class Curves(NamedTuple):
    """One prompt's faithfulness under one method."""

    rise: float
    mas: float
    insertion: float


def deletion_groups(
    attribution: Tensor, among: Sequence[int], steps: int = STEPS
) -> list[list[int]]:
    """The positions `among` in the order in which they are deleted, in at most `steps` groups of
    like size, the larger ones first.
    """
    order = attribution[list(among)].argsort(descending=True, stable=True)
    ordered = [among[i] for i in order.tolist()]
    n = min(steps, len(ordered))
    size, larger = divmod(len(ordered), n)
    bounds = [i * size + min(i, larger) for i in range(n + 1)]
    return [ordered[a:b] for a, b in pairwise(bounds)]


def mass_left(attribution: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """[K + 1] float64: the share of the attribution of all groups that is left after each; falling
    evenly where there is none.
    """
    of_groups = torch.stack([attribution[list(group)].double().sum() for group in groups])
    if float(of_groups.sum()) <= 0:
        return torch.linspace(1, 0, len(groups) + 1, dtype=torch.float64)
    return 1 - torch.cat([of_groups.new_zeros(1), of_groups.cumsum(0) / of_groups.sum()])


def rise_and_mas(scores: Tensor, left: Tensor) -> tuple[float, float]:
    """Of log probabilities [K + 1] after each step of a deletion, nothing deleted first, and of the
    attribution mass left [K + 1].

    Where the last score is the first, nothing can be normalized, and both are 1/2.
    """
    scores = scores.double()
    if float(scores[0]) == float(scores[-1]):
        return 0.5, 0.5
    curve = (scores - scores[-1]) / (scores[0] - scores[-1]).abs()
    curve = curve.clamp(0, 1).cummin(0).values
    penalized = (curve + (curve - left).abs()).clamp(0, 1)
    spread = penalized.max() - penalized.min()
    if float(spread) == 0:
        return _area(curve), 0.5
    return _area(curve), _area((penalized - penalized.min()) / spread)


def insertion_area(scores: Tensor) -> float:
    """Of log probabilities [K + 1] after each step of an insertion, all padding first: normalized
    to rise from 0 to 1 and never to fall. 1/2 where the two ends are alike.
    """
    scores = scores.double()
    if float(scores[0]) == float(scores[-1]):
        return 0.5
    curve = (scores - scores[0]) / (scores[-1] - scores[0]).abs()
    return _area(curve.clamp(0, 1).cummax(0).values)


def _area(curve: Tensor) -> float:
    return float(torch.trapezoid(curve)) / (len(curve) - 1)


def padding_id(tracer: Tracer) -> int:
    tokenizer = tracer.tokenizer
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if isinstance(found, int):
            return found
    return 0
