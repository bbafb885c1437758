"""Agreement of components' scores with their effects: ROC curve, rank correlation, precision.

One method gives scores (routes, for example). They are compared with effects of patching, or with a
set of heads that somebody else published. Both are means over prompts. Intervals are percentiles of
a bootstrap over prompts: each draw takes prompts with replacement and computes the means, and all
that follows from them, again. All draws are computed at once, and the numbers that a seed gives are
documented, so AUC, rank correlation and bootstrap are written here and not taken from a library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_count, check_seed
from ..errors import needing

LEVEL = 0.95  # confidence level of all intervals
DRAWS = 1000  # bootstrap draws


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
    """Agreement of scores with effects, over N components."""

    auc: Interval  # the probability that a positive scores above a negative
    rank_correlation: Interval  # Spearman's, between scores and the size of effects
    precision: dict[int, Interval]  # k -> share of positives among the k highest scores
    n_positive: int
    n_components: int


def roc_curve(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """False and true positive rates, [M] each, from (0, 0) to (1, 1); equal scores are one step.

    scores [N], positive bool [N]. Raises ValueError unless there are positives and negatives.
    """
    _check_kinds(scores, positive)
    metrics = _library("sklearn.metrics")
    false, true, _ = metrics.roc_curve(positive.numpy(), scores.numpy(), drop_intermediate=False)
    return torch.from_numpy(false), torch.from_numpy(true)


def auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: Mann and Whitney's statistic, where ties count one half.

    scores [N], positive bool [N]. Raises ValueError unless there are positives and negatives.
    """
    _check_kinds(scores, positive)
    return float(_auc(scores, positive))


def _auc(scores: Tensor, positive: Tensor) -> Tensor:
    """Areas [...] of scores [..., N]; NaN where all are positive or none is."""
    hits = positive.double()
    n_positive = hits.sum(-1)
    wins = (ranks(scores) * hits).sum(-1) - n_positive * (n_positive + 1) / 2
    return wins / (n_positive * (positive.shape[-1] - n_positive))


def ranks(x: Tensor) -> Tensor:
    """Ranks [..., N] float64 along the last dimension, from 1; equal values share their mean."""
    return torch.from_numpy(_library("scipy.stats").rankdata(x.numpy(), axis=-1))


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of x [N] and y [N]; 0 where one of them is constant."""
    return float(_rank_correlation(x, y))


def _rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    a, b = (r - r.mean(-1, keepdim=True) for r in (ranks(x), ranks(y)))
    norm = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norm > 0, (a * b).sum(-1) / norm.clamp(min=1e-300), 0.0)


def precision_at(scores: Tensor, positive: Tensor, k: int) -> float:
    """The share of positives among the k highest of scores [N].

    Where scores tie for the last places, each of them counts with the share that is taken.
    """
    k = check_count("k", k, most=len(scores))
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
    """The bootstrap interval of a statistic of n prompts.

    statistic: takes the prompts' indices in many draws [draws, n] and returns a number for each
    draw [draws]. Draws where it is not defined (NaN) are left out.
    """
    generator = torch.Generator().manual_seed(check_seed("seed", seed))
    drawn = statistic(torch.randint(n, (draws, n), generator=generator)).double()
    drawn = drawn[~drawn.isnan()]
    value = float(statistic(torch.arange(n)[None])[0])
    if len(drawn) == 0:
        return Interval(value, float("nan"), float("nan"))
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = drawn.quantile(edges).tolist()
    return Interval(value, low, high)


def mean_interval(x: Tensor, *, seed: int = 0) -> Interval:
    """The interval of the mean of x [P], one number for each prompt."""
    return bootstrap(lambda chosen: x.double()[chosen].mean(-1), len(x), seed=seed)


def share_interval(hits: Tensor) -> Interval:
    """Wilson's interval of the share of hits, bool [P]; NaN where P is 0.

    Unlike a bootstrap's interval, it has a width where the share is 0 or 1.
    """
    if len(hits) == 0:
        return Interval(math.nan, math.nan, math.nan)
    test = _library("scipy.stats").binomtest(int(hits.sum()), len(hits))
    low, high = test.proportion_ci(LEVEL, method="wilson")
    return Interval(float(hits.double().mean()), float(low), float(high))


def ratio_interval(x: Tensor, y: Tensor, *, seed: int = 0) -> Interval:
    """The interval of the mean of x [P] divided by the mean of y [P]."""
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
    """Agreement of scores [P, N] with effects [P, N], of N components on P prompts.

    gap: [P], the difference that patching could restore or remove on each prompt. With it, effects
    count as shares of its mean; without it, they count as they are. absolute: rank components by
    the size of the mean score, whatever its sign.

    A component is positive where the size of its mean effect is at least `least`, whatever the
    sign: a component that works against the task is part of the circuit too. Each bootstrap draw
    determines shares and positives again.
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
    """Agreement of scores [P, N] with a published set of heads, bool [N]."""
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
    """size: takes weights of prompts [draws, P] and returns the sizes of effects [draws, N]."""
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


def _library(name: str) -> Any:
    package = {"scipy.stats": "scipy", "sklearn.metrics": "scikit-learn"}[name]
    with needing("the report", package, "pip install 'ifr-fast[circuits]'"):
        return import_module(name)
