"""Checks of the figures that `ifr-fast bench` writes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ifr_fast.benchmark import TIMED, Machine, Subject, Throughput

RATES = {"tokens_per_second", "pairs_per_second", "share_of_forward"}


def check(document: dict[str, Any], lengths: list[int]) -> None:
    assert set(document) == {"machine", "subject", "results"}
    assert list(document["machine"]) == list(Machine._fields)
    assert list(document["subject"]) == list(Subject._fields)
    assert [result["n_tokens"] for result in document["results"]] == lengths
    for result in document["results"]:
        assert set(result) == {*Throughput._fields, "units", *RATES}
        assert list(result["units"]) == list(TIMED)
        assert result["units"]["forward"] == 1
        assert result["share_of_forward"] == result["units"]["scoring"]
        numbers = [result[f"{name}_seconds"] for name in TIMED]
        numbers += [*result["units"].values(), *(result[name] for name in RATES)]
        numbers += [result["recording_bytes"], result["repeat"]]
        assert all(math.isfinite(x) and x > 0 for x in numbers)
        for name in ("scoring_bytes", "peak_bytes"):
            assert result[name] is None or result[name] >= 0
        T = result["n_tokens"]
        assert result["tokens_per_second"] == pytest.approx(T / result["trace_all_seconds"])
        assert result["pairs_per_second"] == pytest.approx(
            result["pairs"] / result["scoring_seconds"]
        )
