"""How well one account of components agrees with another: ROC curve, rank correlation, precision.

One account gives scores (routes, say), the other effects, or a set of heads that somebody else
published. Both are means over prompts; intervals are percentiles of a bootstrap over prompts, which
draws them with replacement and takes the means, and what follows from them, anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

LEVEL = 0.95  # of all intervals
DRAWS = 1000


class Interval(NamedTuple):
    """An estimate and the bootstrap interval around it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "not defined"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


class Agreement(NamedTuple):
    """Of scores with effects, N components."""

    auc: Interval  # the chance that a positive scores above a negative
    rank_correlation: Interval  # Spearman's, of scores with the size of effects
    precision: dict[int, Interval]  # share of positives among the k that score highest
    n_positive: int
    n_components: int


def roc_curve(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """False and true positive rates, [M] each, from (0, 0) to (1, 1); equal scores are one step.

    scores [N], positive bool [N]. Raises ValueError unless there are both kinds.
    """
    _check_kinds(scores, positive)
    order = scores.argsort(descending=True, stable=True)
    ordered, hits = scores[order], positive[order].double()
    changes = torch.ones(len(ordered), dtype=torch.bool)
    changes[:-1] = ordered[1:] != ordered[:-1]
    ends = changes.nonzero().squeeze(1)
    true, false = hits.cumsum(0)[ends], (1 - hits).cumsum(0)[ends]
    zero = true.new_zeros(1)
    return torch.cat([zero, false / false[-1]]), torch.cat([zero, true / true[-1]])


def auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: Mann and Whitney's statistic, ties counting one half.

    scores [N], positive bool [N]. Raises ValueError unless there are both kinds.
    """
    _check_kinds(scores, positive)
    return float(_auc(scores, positive))


def _auc(scores: Tensor, positive: Tensor) -> Tensor:
    """[...] of [..., N]; NaN where there is one kind alone."""
    hits = positive.double()
    n_positive = hits.sum(-1)
    wins = (ranks(scores) * hits).sum(-1) - n_positive * (n_positive + 1) / 2
    return wins / (n_positive * (positive.shape[-1] - n_positive))


def ranks(x: Tensor) -> Tensor:
    """[..., N] float64: ranks from 1 along the last dimension, equal values sharing the mean."""
    ordered = x.sort(-1).values.contiguous()
    less = torch.searchsorted(ordered, x.contiguous())
    not_more = torch.searchsorted(ordered, x.contiguous(), right=True)
    return (less + not_more + 1).double() / 2


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's, of two [N]; 0 where one of them is constant."""
    return float(_rank_correlation(x, y))


def _rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    a, b = (r - r.mean(-1, keepdim=True) for r in (ranks(x), ranks(y)))
    norm = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norm > 0, (a * b).sum(-1) / norm.clamp(min=1e-300), 0.0)


def precision_at(scores: Tensor, positive: Tensor, k: int) -> float:
    """The share of positives among the k highest of scores [N]; where scores tie at the border,
    their positives count in the proportion in which they are taken.
    """
    if not 1 <= k <= len(scores):
        raise ValueError(f"k: expected 1 to {len(scores)}, got {k}")
    return float(_precision_at(scores, positive, k))


def _precision_at(scores: Tensor, positive: Tensor, k: int) -> Tensor:
    border = scores.topk(k, dim=-1).values[..., -1:]
    above, tied = (scores > border).double(), (scores == border).double()
    taken = (k - above.sum(-1)) / tied.sum(-1)
    hits = positive.double()
    return ((above * hits).sum(-1) + taken * (tied * hits).sum(-1)) / k


def bootstrap(
    statistic: Callable[[Tensor], Tensor], n: int, *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Of a statistic of n prompts, which is given the indices of many draws [draws, n] and gives a
    number for each [draws]. Draws for which it is not defined (NaN) are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = statistic(torch.randint(n, (draws, n), generator=generator)).double()
    drawn = drawn[~drawn.isnan()]
    value = float(statistic(torch.arange(n)[None])[0])
    if len(drawn) == 0:
        return Interval(value, float("nan"), float("nan"))
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = drawn.quantile(edges).tolist()
    return Interval(value, low, high)


def mean_interval(x: Tensor, *, seed: int = 0) -> Interval:
    """Of the mean of x [P], one number a prompt."""
    return bootstrap(lambda chosen: x.double()[chosen].mean(-1), len(x), seed=seed)


def share_interval(hits: Tensor) -> Interval:
    """Of the share of hits, bool [P]: Wilson's score interval, which has a width at 0 and 1, too;
    NaN where there are none to count.
    """
    n = len(hits)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    p, z = float(hits.double().mean()), NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half))


def ratio_interval(x: Tensor, y: Tensor, *, seed: int = 0) -> Interval:
    """Of the mean of x [P] over that of y [P]."""
    return bootstrap(lambda chosen: x[chosen].mean(-1) / y[chosen].mean(-1), len(x), seed=seed)


def agreement(
    scores: Tensor,
    effects: Tensor,
    *,
    least: float,
    gap: Tensor | None = None,
    absolute: bool = False,
    ks: Sequence[int] = (5, 10, 20),
    draws: int = DRAWS,
    seed: int = 0,
) -> Agreement:
    """Of scores with effects, [P, N] each, of P prompts.

    gap: of each prompt [P], the difference that there was to restore or to lose: effects count in
    shares of its mean, or as they are without it. absolute: rank by the size of the mean score,
    whatever its sign.

    A component is positive where the size of its mean effect is at least `least`, an effect's
    sign being that of its service to the task: one that works against it is part of the circuit
    too. Shares and positives are found anew in each draw.
    """
    if scores.shape != effects.shape or scores.ndim != 2:
        raise ValueError(
            f"scores: expected [P, N] as effects have, got {list(scores.shape)} and "
            f"{list(effects.shape)}"
        )
    if gap is not None and gap.shape != scores.shape[:1]:
        raise ValueError(f"gap: expected [{len(scores)}], got {list(gap.shape)}")

    def size(weights: Tensor) -> Tensor:
        found = weights @ effects.double()
        return (found if gap is None else found / (weights @ gap.double())[:, None]).abs()

    return _agreement(scores, size, least, absolute, ks, draws, seed)


def agreement_with(
    scores: Tensor,
    heads: Tensor,
    *,
    absolute: bool = False,
    ks: Sequence[int] = (5, 10, 20),
    draws: int = DRAWS,
    seed: int = 0,
) -> Agreement:
    """Of scores [P, N] with a published set, bool [N]."""
    member = heads.double()
    return _agreement(
        scores,
        lambda weights: member.expand(len(weights), -1),
        0.5,
        absolute,
        ks,
        draws,
        seed,
    )


def _agreement(
    scores: Tensor,
    size: Callable[[Tensor], Tensor],
    least: float,
    absolute: bool,
    ks: Sequence[int],
    draws: int,
    seed: int,
) -> Agreement:
    """size: of effects [draws, N], where prompts have the weights [draws, P]."""
    P, N = scores.shape

    def interval(of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Interval:
        def statistic(chosen: Tensor) -> Tensor:
            weights = torch.zeros(len(chosen), P, dtype=torch.float64)
            weights.scatter_add_(1, chosen, torch.full(chosen.shape, 1 / P, dtype=torch.float64))
            sizes = size(weights)
            hits = sizes >= least
            means = weights @ scores.double()
            found = of(means.abs() if absolute else means, sizes, hits)
            both = hits.any(-1) & ~hits.all(-1)
            return torch.where(both, found, torch.nan)

        return bootstrap(statistic, P, draws=draws, seed=seed)

    everyone = torch.full((1, P), 1 / P, dtype=torch.float64)
    return Agreement(
        interval(lambda s, _, hits: _auc(s, hits)),
        interval(lambda s, sizes, _: _rank_correlation(s, sizes)),
        {k: interval(lambda s, _, hits, k=k: _precision_at(s, hits, k)) for k in ks if k <= N},  # type: ignore[misc]
        int((size(everyone) >= least).sum()),
        N,
    )


def _check_kinds(scores: Tensor, positive: Tensor) -> None:
    if scores.shape != positive.shape or scores.ndim != 1 or positive.dtype != torch.bool:
        raise ValueError(
            f"positive: expected bool {list(scores.shape)}, got {positive.dtype} "
            f"{list(positive.shape)}"
        )
    if not 0 < int(positive.sum()) < len(positive):
        raise ValueError(
            f"positive: expected some and not all of {len(positive)}, got {int(positive.sum())}"
        )
