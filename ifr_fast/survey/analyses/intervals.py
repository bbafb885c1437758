"""Intervals and tests whose unit is the document.

Predictions of one document are not independent, so documents are resampled and permuted. A
frequency is a ratio of sums over documents, Σ_d s_d / Σ_d n_d: predictions with a property, among
all predictions. Every function takes a seed, and gives the same result for the same seed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ALPHA = 0.05  # rate of false discoveries
_CHUNK = 1 << 24  # most elements of a matrix of draws


class Interval(NamedTuple):
    """A ratio and its bootstrap interval, in the shape of one document's sums."""

    value: Floats
    low: Floats
    high: Floats


class Differences(NamedTuple):
    """M differences between two groups of documents, with intervals and p-values."""

    first: Floats  # [M] ratio in the first group
    second: Floats  # [M] ratio in the second group
    low: Floats  # [M] bootstrap interval of first - second
    high: Floats  # [M]
    p: Floats  # [M] permutation test, two-sided, uncorrected


def ratio(sums: Floats, counts: Floats) -> Floats:
    """Σ s / Σ n over the leading axis, NaN if nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums.sum(0) / counts.sum(0))


def bootstrap(
    sums: Floats, counts: Floats, *, seed: int, resamples: int = 1000, level: float = 0.95
) -> Interval:
    """Percentile interval of Σ s / Σ n by drawing documents with replacement.

    sums [D, ...] and counts [D] or [D, ...]: one per document. A count may be zero.
    """
    of_each = _same_shape(sums, counts)
    shape = sums.shape[1:]
    low, high = _percentiles(_resampled(sums, of_each, seed, resamples), level)
    return Interval(ratio(sums, of_each), low.reshape(shape), high.reshape(shape))


def compare(
    first: tuple[Floats, Floats],
    second: tuple[Floats, Floats],
    *,
    seed: int,
    resamples: int = 1000,
    permutations: int = 9999,
    level: float = 0.95,
) -> Differences:
    """Compares the ratios of two groups of documents: sums [D, M] and counts [D] of each.

    The test permutes documents between the groups. Its statistic is the difference divided by its
    standard error, so that a different spread alone is not significant (Janssen 1997); the error
    of a ratio is that of its linearization, s_d - ratio * n_d. Documents without predictions are
    left out.
    """
    (s1, n1), (s2, n2) = (_counted(*group) for group in (first, second))
    if min(len(s1), len(s2)) < 2:
        raise ValueError(
            f"documents: expected at least 2 in each group, got {len(s1)} and {len(s2)}"
        )
    drawn = _resampled(s1, _same_shape(s1, n1), seed, resamples)
    drawn = drawn - _resampled(s2, _same_shape(s2, n2), seed + 1, resamples)
    low, high = _percentiles(drawn, level)
    p = _permuted(np.concatenate([s1, s2]), np.concatenate([n1, n2]), len(s1), seed, permutations)
    return Differences(ratio(s1, n1[:, None]), ratio(s2, n2[:, None]), low, high, p)


def compare_pairs(
    differences: Floats, *, seed: int, permutations: int = 9999
) -> tuple[Floats, Floats]:
    """Means of paired differences [D, M], and two-sided p-values of the sign-flip test."""
    D = len(differences)
    if D < 2:
        raise ValueError(f"documents: expected at least 2 pairs, got {D}")
    observed = np.abs(_t_of_pairs(differences.sum(0), (differences**2).sum(0), D))
    rng = np.random.default_rng(seed)
    squares = (differences**2).sum(0)
    at_least = np.zeros(differences.shape[1])
    for size in _chunks(permutations, D):
        signs = rng.integers(0, 2, (size, D)) * 2.0 - 1
        at_least += (np.abs(_t_of_pairs(signs @ differences, squares, D)) >= observed - 1e-9).sum(0)
    return differences.mean(0), (at_least + 1) / (permutations + 1)


def correct(p: Floats) -> Floats:
    """Corrects p-values by Benjamini-Hochberg: false discovery rates."""
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p, axis=None, method="bh")).reshape(p.shape)


def surest(q: Floats, difference: Floats, alpha: float, most: int = 5) -> list[int]:
    """Rows of significant tests [G, M], at most `most` per group, greatest differences first."""
    rows = []
    for g, (of_q, of) in enumerate(zip(q, difference.reshape(q.shape), strict=True)):
        sure = np.flatnonzero(of_q <= alpha)
        ranked = sure[np.argsort(-np.abs(of[sure]), kind="stable")][:most]
        rows += [g * q.shape[1] + int(i) for i in ranked]
    return rows


def _same_shape(sums: Floats, counts: Floats) -> Floats:
    counts = counts.reshape(counts.shape + (1,) * (sums.ndim - counts.ndim))
    return np.broadcast_to(counts, sums.shape)


def _counted(sums: Floats, counts: Floats) -> tuple[Floats, Floats]:
    return sums[counts > 0], counts[counts > 0]


def _chunks(total: int, width: int) -> list[int]:
    size = max(1, min(total, _CHUNK // max(1, width)))
    return [min(size, total - done) for done in range(0, total, size)]


def _resampled(sums: Floats, counts: Floats, seed: int, resamples: int) -> Floats:
    """Ratio in each bootstrap sample, [B, M]."""
    D = len(sums)
    flat, of_each = sums.reshape(D, -1), counts.reshape(D, -1)
    rng = np.random.default_rng(seed)
    found = []
    for size in _chunks(resamples, max(D, flat.shape[1])):
        times = rng.multinomial(D, np.full(D, 1 / D), size=size).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append((times @ flat) / (times @ of_each))
    return np.concatenate(found)


def _percentiles(drawn: Floats, level: float) -> tuple[Floats, Floats]:
    tail = 100 * (1 - level) / 2
    with np.errstate(invalid="ignore"):
        low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    return low, high


class _Moments(NamedTuple):
    """Sums over a group's documents; moments of s are [..., M], of n alone [..., 1]."""

    D: Any
    s: Floats
    n: Floats
    ss: Floats
    sn: Floats
    nn: Floats

    def ratio_and_error(self) -> tuple[Floats, Floats]:
        """Ratio, and the square of its standard error."""
        r = self.s / self.n
        residual = np.maximum(self.ss - 2 * r * self.sn + r * r * self.nn, 0)
        return r, residual * self.D / ((self.D - 1) * self.n**2)


def _permuted(s: Floats, n: Floats, n_first: int, seed: int, permutations: int) -> Floats:
    """Share [M] of permutations whose statistic is at least the observed one."""
    D = len(s)
    n = n[:, None]
    whole = [s, n, s * s, s * n, n * n]

    def statistic(chosen: Floats) -> Floats:
        """Statistics [B, M]. chosen [B, D]: 1 for documents in the first group, else 0."""
        inside = [chosen @ x for x in whole]
        outside = [x.sum(0) - y for x, y in zip(whole, inside, strict=True)]
        r1, e1 = _Moments(n_first, *inside).ratio_and_error()
        r2, e2 = _Moments(D - n_first, *outside).ratio_and_error()
        difference, error = np.abs(r1 - r2), np.sqrt(e1 + e2)
        # Without spread, the statistic of a difference is infinite, and zero without one.
        with np.errstate(invalid="ignore", divide="ignore"):
            t = difference / error
        return np.where(error > 1e-12, t, np.where(difference > 1e-12, np.inf, 0.0))

    own = np.zeros((1, D))
    own[0, :n_first] = 1
    observed = statistic(own)[0]
    rng = np.random.default_rng(seed)
    at_least = np.zeros(s.shape[1])
    for size in _chunks(permutations, max(D, s.shape[1])):
        order = rng.random((size, D)).argsort(1)
        at_least += (statistic((order < n_first).astype(np.float64)) >= observed - 1e-9).sum(0)
    return (at_least + 1) / (permutations + 1)


def _t_of_pairs(sums: Floats, squares: Floats, D: int) -> Floats:
    error = np.sqrt(np.maximum(squares - sums**2 / D, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        t = sums / error
    return np.where(
        error > 1e-12, t, np.where(np.abs(sums) > 1e-12, np.copysign(np.inf, sums), 0.0)
    )
