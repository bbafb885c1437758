"""Importance, frequency and bypass: their numbers against plain means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic_survey import THRESHOLDS, H, L, made_up, rows, written

from ifr_fast.survey.analyses import (
    bypass,
    frequency,
    importance,
)


def test_importance_is_the_mean(tmp_path: Path) -> None:
    columns = made_up()
    columns["head_importance"][..., 2, 1] += 0.2
    finding = importance(written(tmp_path, columns))
    heads, ffn = columns["head_importance"], columns["ffn_importance"]
    for layer in range(L):
        (row,) = rows(finding, component="FFN", layer=layer)
        assert row["importance"] == pytest.approx(ffn[:, layer].mean(), rel=1e-5)
        (row,) = rows(finding, component="attention", layer=layer)
        assert row["importance"] == pytest.approx(heads[:, layer].sum(1).mean(), rel=1e-5)
        for head in range(H):
            (row,) = rows(finding, component="head", layer=layer, head=head)
            assert row["importance"] == pytest.approx(heads[:, layer, head].mean(), rel=1e-5)
            assert row["low"] < row["importance"] < row["high"]
    assert "the strongest are L2H1 (" in finding.statement


def test_some_corpora_alone(tmp_path: Path) -> None:
    columns = made_up()
    survey = written(tmp_path, columns)
    mine = columns["corpus"] == "odd"
    (row,) = rows(importance(survey, ["odd"]), component="head", layer=1, head=2)
    assert row["importance"] == pytest.approx(columns["head_importance"][mine, 1, 2].mean())
    with pytest.raises(ValueError, match="no corpus 'none'; it has 'even', 'odd'"):
        importance(survey, ["none"])


def test_frequency_is_the_share_of_graphs(tmp_path: Path) -> None:
    columns = made_up()
    finding = frequency(written(tmp_path, columns, n_parts=3))
    for row in finding.table.to_pylist():
        for k, threshold in enumerate(THRESHOLDS):
            share = columns[f"head_in_{k}"][:, row["layer"], row["head"]].mean()
            assert row[f"frequency_{threshold:g}"] == pytest.approx(share)


def test_bypass_tells_what_passes(tmp_path: Path) -> None:
    columns = made_up()
    period, first = columns["token"] == ".", columns["position"] == 0
    columns["residual_mid"][period] = 0.97
    columns["residual_post"][period] = 0.95
    columns["residual_post"][first, 1:] = columns["residual_mid"][first, 1:] = 0.99
    finding = bypass(written(tmp_path, columns), min_count=5)
    (row,) = rows(finding, kind="class", token="period")
    mine = period & ~first
    assert row["count"] == mine.sum()
    assert row["residual_share"] == pytest.approx(0.96)
    assert row["blocks_passed"] == pytest.approx(1)
    (row,) = rows(finding, kind="class", token="other tokens")
    both = np.concatenate([columns["residual_mid"], columns["residual_post"]], axis=1)
    other = ~first & np.isin(columns["token"], ["the", " cat", " sat", " of", " red"])
    assert row["residual_share"] == pytest.approx(both[other].mean(), rel=1e-5)
    assert row["blocks_passed"] == pytest.approx((both[other] >= 0.9).mean())
    (row,) = rows(finding, kind="token", token=" cat")
    assert row["residual_share"] == pytest.approx(
        both[~first & (columns["token"] == " cat")].mean(), rel=1e-5
    )
    assert "Period: 96%" in finding.statement
    assert "more than at other tokens" in finding.statement
    assert "passes both blocks by, on average, in layers 1 to 2" in finding.statement
    assert "“.” is number 1 of the 8 tokens" in finding.statement


def test_bypass_of_parallel_blocks(tmp_path: Path) -> None:
    columns = made_up()
    columns["residual_mid"][:] = np.nan
    finding = bypass(written(tmp_path, columns))
    (row,) = rows(finding, kind="class", token="period")
    mine = (columns["token"] == ".") & (columns["position"] > 0)
    assert row["residual_share"] == pytest.approx(columns["residual_post"][mine].mean(), rel=1e-5)
