"""How well one account of components agrees with another: ROC curve, rank correlation, precision.

One account gives scores (routes, say), the other effects, or a set of heads that somebody else
published. Both are means over prompts; intervals are percentiles of a bootstrap over prompts, which
draws them with replacement and takes the means, and what follows from them, anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Area under the ROC curve: Mann and Whitney's statistic, ties counting one half."""
    _check_kinds(scores, positive)
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    wins = float(ranks(scores)[positive].sum()) - n_positive * (n_positive + 1) / 2
    return wins / (n_positive * n_negative)


def ranks(x: Tensor) -> Tensor:
    """[N] float64: ranks from 1, equal values sharing the mean of theirs."""
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's, of two [N]; 0 where one of them is constant."""
    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0


def precision_at(scores: Tensor, positive: Tensor, k: int) -> float:
    """The share of positives among the k highest scores; where scores tie at the border, their
    positives count in the proportion in which they are taken.
    """
    if not 1 <= k <= len(scores):
        raise ValueError(f"k: expected 1 to {len(scores)}, got {k}")
    border = scores.sort(descending=True).values[k - 1]
    above, tied = scores > border, scores == border
    taken = (k - int(above.sum())) / int(tied.sum())
    return (float(positive[above].sum()) + taken * float(positive[tied].sum())) / k


def bootstrap(
    statistic: Callable[[Tensor], float], n: int, *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Of a statistic of n prompts, which is given their indices [n]. Draws for which it is not
    defined (NaN) are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.tensor(
        [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(draws)],
        dtype=torch.float64,
    )
    drawn = drawn[~drawn.isnan()]
    value = statistic(torch.arange(n))
    if len(drawn) == 0:
        return Interval(value, float("nan"), float("nan"))
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = drawn.quantile(edges).tolist()
    return Interval(value, low, high)


def mean_interval(x: Tensor, *, seed: int = 0) -> Interval:
    """Of the mean of x [P], one number a prompt."""
    return bootstrap(lambda chosen: float(x[chosen].double().mean()), len(x), seed=seed)


def agreement(
    scores: Tensor,
    effects: Tensor,
    *,
    least: float,
    ks: Sequence[int] = (5, 10, 20),
    draws: int = DRAWS,
    seed: int = 0,
) -> Agreement:
    """Of scores with effects, [P, N] each, of P prompts.

    A component is positive where the size of its mean effect is at least `least`, an effect's
    sign being that of its service to the task: one that works against it is part of the circuit
    too. Positives are found anew in each draw.
    """
    if scores.shape != effects.shape or scores.ndim != 2:
        raise ValueError(
            f"scores: expected [P, N] as effects have, got {list(scores.shape)} and "
            f"{list(effects.shape)}"
        )
    size = effects.mean(0).abs()
    return _agreement(
        scores, lambda chosen: effects[chosen].mean(0).abs(), size >= least, least, ks, draws, seed
    )


def agreement_with(
    scores: Tensor,
    heads: Tensor,
    *,
    ks: Sequence[int] = (5, 10, 20),
    draws: int = DRAWS,
    seed: int = 0,
) -> Agreement:
    """Of scores [P, N] with a published set, bool [N]."""
    member = heads.double()
    return _agreement(scores, lambda _: member, heads, 0.5, ks, draws, seed)


def _agreement(
    scores: Tensor,
    size: Callable[[Tensor], Tensor],
    positive: Tensor,
    least: float,
    ks: Sequence[int],
    draws: int,
    seed: int,
) -> Agreement:
    P, N = scores.shape

    def interval(of: Callable[[Tensor, Tensor, Tensor], float]) -> Interval:
        def statistic(chosen: Tensor) -> float:
            sizes = size(chosen)
            hits = sizes >= least
            if not 0 < int(hits.sum()) < N:
                return float("nan")
            return of(scores[chosen].mean(0), sizes, hits)

        return bootstrap(statistic, P, draws=draws, seed=seed)

    return Agreement(
        interval(lambda s, _, hits: auc(s, hits)),
        interval(lambda s, sizes, _: rank_correlation(s, sizes)),
        {k: interval(lambda s, _, hits, k=k: precision_at(s, hits, k)) for k in ks if k <= N},  # type: ignore[misc]
        int(positive.sum()),
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
