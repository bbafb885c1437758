"""Intervals, tests and units: their numbers against plain loops."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from synthetic_survey import made_up, written

from ifr_fast.survey.analyses.intervals import bootstrap, compare, compare_pairs, correct
from ifr_fast.survey.analyses.units import units_of


def test_bootstrap_is_the_quantile_of_resampled_ratios() -> None:
    """Of three documents there are 27 samples, so the percentiles are known."""
    sums, counts = np.array([1.0, 5.0, 9.0]), np.array([10.0, 10.0, 20.0])
    of = bootstrap(sums, counts, seed=1, resamples=40_000, level=0.8)
    every = sorted(
        sums[list(draw)].sum() / counts[list(draw)].sum() for draw in product(range(3), repeat=3)
    )
    assert of.value == pytest.approx(15 / 40)
    assert of.low == pytest.approx(every[2], abs=0.02)  # 3 of 27 lie at or below
    assert of.high == pytest.approx(every[24], abs=0.02)


def test_the_permutation_test_counts_relabellings() -> None:
    """All 20 ways to deal six documents into two groups of three, by a plain loop."""
    rng = np.random.default_rng(3)
    s, n = rng.random((6, 2)) * 10, rng.integers(5, 20, 6).astype(float)

    def t(first: tuple[int, ...]) -> np.ndarray:
        groups = [list(first), [i for i in range(6) if i not in first]]
        r, e = [], []
        for group in groups:
            ratio = s[group].sum(0) / n[group].sum()
            residual = ((s[group] - ratio * n[group, None]) ** 2).sum(0)
            r.append(ratio)
            e.append(residual * 3 / 2 / n[group].sum() ** 2)
        return np.abs(r[0] - r[1]) / np.sqrt(e[0] + e[1])

    every = [t(order[:3]) for order in permutations(range(6))]
    exact = np.mean([x >= every[0] - 1e-9 for x in every], axis=0)
    found = compare((s[:3], n[:3]), (s[3:], n[3:]), seed=0, permutations=20_000)
    assert found.first == pytest.approx(s[:3].sum(0) / n[:3].sum())
    assert found.p == pytest.approx(exact, abs=0.015)


def test_the_sign_flip_test_counts_flips() -> None:
    d = np.random.default_rng(4).normal(0.4, 1, (7, 3))

    def t(x: np.ndarray) -> np.ndarray:
        return np.abs(x.mean(0)) / x.std(0, ddof=1)

    every = [t(d * np.array(signs)[:, None]) for signs in product((1, -1), repeat=7)]
    exact = np.mean([x >= t(d) - 1e-9 for x in every], axis=0)
    mean, p = compare_pairs(d, seed=0, permutations=20_000)
    assert mean == pytest.approx(d.mean(0))
    assert p == pytest.approx(exact, abs=0.015)


def test_perfect_separation_is_as_sure_as_permutations_let_it() -> None:
    n = np.full(8, 10.0)
    found = compare((np.full((8, 2), 10.0), n), (np.zeros((8, 2)), n), seed=0, permutations=999)
    assert (found.p <= 0.003).all()  # 2 of 12,870 relabellings
    same = compare((np.zeros((8, 1)), n), (np.zeros((8, 1)), n), seed=0, permutations=99)
    assert same.p == 1


def test_documents_not_predictions_are_the_unit() -> None:
    """Documents that differ among themselves: by predictions every test would be sure."""
    wrong = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        s, n = rng.random((20, 1)) * 1000, np.full(20, 1000.0)
        found = compare((s[:10], n[:10]), (s[10:], n[10:]), seed=seed, permutations=399)
        wrong += int(found.p[0] <= 0.05)
    assert wrong <= 6  # 2 are expected; 7 or more have a chance of 0.3%


def test_correction_is_benjamini_hochberg() -> None:
    p = np.array([[0.01, 0.04], [0.03, 0.5]])
    assert correct(p) == pytest.approx(np.array([[0.04, 0.16 / 3], [0.16 / 3, 0.5]]))


def test_many_documents_are_dealt_into_units(tmp_path: Path) -> None:
    columns = made_up(30)
    survey = written(tmp_path, columns)
    units = units_of(survey, most=10)
    assert len(units) == 10
    assert units.corpora == ["even", "odd"]
    sums = units.sum(survey.predictions, ["probability"], lambda part: {"p": part["probability"]})
    for u in range(10):
        documents = units.documents[units.unit == u]
        assert len(documents) == 3
        mine = np.isin(columns["document"], documents)
        assert sums["p"][u] == pytest.approx(columns["probability"][mine].sum(), rel=1e-5)
        assert set(documents % 2) == {units.corpus[u]}
