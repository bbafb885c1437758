"""Domains and contrasts: corpora that differ, and those that do not."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from synthetic_survey import made_up, rows, written

from ifr_fast.survey.analyses import (
    NotApplicableError,
    contrast,
    domains,
)
from ifr_fast.survey.analyses.domains import halves_differ


def test_domains_find_the_head_that_differs(tmp_path: Path) -> None:
    columns = made_up(60, 30)
    odd = columns["corpus"] == "odd"
    columns["head_in_1"][odd, 0, 2] |= np.random.default_rng(0).random(odd.sum()) < 0.5
    finding = domains(written(tmp_path, columns), permutations=1999)
    sure = [row for row in finding.table.to_pylist() if row["q"] <= 0.05]
    (row,) = sure
    assert (row["corpus"], row["layer"], row["head"]) == ("even", 0, 2)
    frequency_ = [columns["head_in_1"][mask, 0, 2].mean() for mask in (~odd, odd)]
    assert [row["frequency"], row["elsewhere"]] == pytest.approx(frequency_)
    assert row["low"] < row["difference"] < row["high"] < 0
    assert finding.excerpt.num_rows == 1
    assert "0 of 24 heads differ by the same test" in finding.statement


def test_halves_of_a_corpus_do_not_differ(tmp_path: Path) -> None:
    """Documents differ among themselves, and their halves are found alike."""
    columns = made_up(80, 25)
    columns["corpus"] = np.where(columns["document"] < 40, "first half", "second half").astype(
        object
    )
    finding = domains(written(tmp_path, columns), permutations=1999)
    assert "No head's frequency differs" in finding.statement
    assert all(row["q"] > 0.05 for row in finding.table.to_pylist())


def test_false_discoveries_are_rare() -> None:
    """40 surveys without any effect: at a rate of 5%, more than 7 have a chance of 0.1%."""
    wrong = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        counts = rng.integers(20, 60, 40).astype(float)
        likely = rng.beta(2, 5, (40, 30))
        sums = rng.binomial(counts[:, None].astype(int), likely).astype(float)
        q = halves_differ(np.zeros(40, int), counts, sums, seed=seed, permutations=999)
        wrong += int((q <= 0.05).any())
    assert wrong <= 7


def test_domains_need_two_corpora(tmp_path: Path) -> None:
    survey = written(tmp_path, made_up())
    with pytest.raises(NotApplicableError, match="at least 2 with 2 documents or more, got 'odd'"):
        domains(survey, ["odd"])
    with pytest.raises(ValueError, match=r"one of 0\.02, 0\.04, got 0\.03"):
        domains(survey, threshold=0.03)


def test_contrast_looks_at_the_last_prediction(tmp_path: Path) -> None:
    columns = made_up(60, 12)
    last = np.append(columns["document"][1:] != columns["document"][:-1], True)
    odd = columns["corpus"] == "odd"
    columns["head_importance"][last & odd, 1, 1] += 0.2
    columns["head_importance"][~last & ~odd, 2, 0] += 0.5  # elsewhere: not to be seen
    survey = written(tmp_path, columns)
    finding = contrast(survey, "odd", "even", permutations=1999)
    sure = [
        row for row in finding.table.to_pylist() if row["q"] <= 0.05 and row["layer"] is not None
    ]
    (row,) = sure
    assert (row["quantity"], row["layer"], row["head"]) == ("head importance", 1, 1)
    assert row["first"] == pytest.approx(columns["head_importance"][last & odd, 1, 1].mean())
    everywhere = contrast(survey, "odd", "even", position="all", permutations=1999)
    (row,) = rows(everywhere, quantity="head importance", layer=2, head=0)
    assert row["q"] <= 0.05
    with pytest.raises(ValueError, match="no corpus 'third'"):
        contrast(survey, "odd", "third")


def test_contrasts_of_other_corpora_have_other_names(tmp_path: Path) -> None:
    """Their files are named so, and most of a name may be no part of a file's name."""
    columns = made_up(12, 8)
    names = np.array(["日本", "中国", "a/b", "a b", "A-b", "a-b"], object)
    columns["corpus"] = names[columns["document"] % 6]
    survey = written(tmp_path, columns)
    found = [contrast(survey, name, "a-b", permutations=9).name for name in names[:-1]]
    assert len(set(found)) == 5
    assert all(re.fullmatch(r"contrast_[a-z0-9_-]+", name) for name in found)


def test_a_contrast_needs_two_prompts_each(tmp_path: Path) -> None:
    columns = made_up(6, 8)
    columns["corpus"] = np.where(columns["document"] == 0, "one", "rest").astype(object)
    with pytest.raises(NotApplicableError, match="at least 2 in 'one', got 1"):
        contrast(written(tmp_path, columns), "one", "rest")
