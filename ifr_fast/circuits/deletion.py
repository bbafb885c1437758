"""Deletion and insertion of input tokens: how faithful an attribution is to a prediction.

Deletion replaces tokens by padding, the most important ones first, in at most 20 steps. After each
step the log probability of the right tokens is measured. RISE (Petsiuk et al. 2018) is the area
under that curve, normalized to fall from 1 to 0 and never to rise: smaller is better. MAS (Walker
et al. 2024) adds the distance between the curve and the attribution mass that is left, so that a
method's numbers count and not only their order. Both are computed as in FlashTrace 0.1.1
(`faithfulness_test_skip_tokens`), and punctuation and white space are never deleted; but only the
next token is predicted, without an end-of-text token behind it. Insertion starts from padding
alone and puts tokens back in the same order: larger is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..tracer import Tracer

STEPS = 20  # the most steps of a deletion or an insertion
STOP_TOKENS = (",", ".", "")  # tokens that are not deleted, without white space


class Curves(NamedTuple):
    """One prompt's faithfulness under one method."""

    rise: float
    mas: float
    insertion: float


def deletion_groups(
    attribution: Tensor, among: Sequence[int], steps: int = STEPS
) -> list[list[int]]:
    """The positions `among` in the order of their deletion, in at most `steps` groups.

    Sizes of groups differ by at most one; the larger groups come first.
    """
    order = attribution[list(among)].argsort(descending=True, stable=True)
    ordered = [among[i] for i in order.tolist()]
    n = min(steps, len(ordered))
    size, larger = divmod(len(ordered), n)
    bounds = [i * size + min(i, larger) for i in range(n + 1)]
    return [ordered[a:b] for a, b in pairwise(bounds)]


def mass_left(attribution: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """[K + 1] float64: the share of all groups' attribution that is left after each group.

    It falls evenly where all attributions are 0.
    """
    of_groups = torch.stack([attribution[list(group)].double().sum() for group in groups])
    if float(of_groups.sum()) <= 0:
        return torch.linspace(1, 0, len(groups) + 1, dtype=torch.float64)
    return 1 - torch.cat([of_groups.new_zeros(1), of_groups.cumsum(0) / of_groups.sum()])


def rise_and_mas(scores: Tensor, left: Tensor) -> tuple[float, float]:
    """RISE and MAS of a deletion in K steps.

    scores: [K + 1] log probabilities after each step, the first with nothing deleted. left:
    [K + 1], the attribution mass left. Both results are 1/2 where the first and the last score are
    equal, since nothing can be normalized then.
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
    """The area under the curve of an insertion, normalized to rise from 0 to 1 and never to fall.

    scores: [K + 1] log probabilities after each step, the first with padding alone. The result is
    1/2 where the first and the last score are equal.
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
