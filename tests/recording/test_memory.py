"""Sizes of memory and times, read and written."""

from __future__ import annotations

import pytest
from opened import tiny_tracer

from ifr_fast import Tracer
from ifr_fast.recording.memory import parse_bytes
from ifr_fast.recording.speed import describe_seconds


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        ("1.5g", 1_500_000_000),
        ("500MB", 500 * 10**6),
        ("2GiB", 2 << 30),
        ("64 KiB", 64 << 10),
        ("1000", 1000),
        (1000, 1000),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_read(text: str | int, n: int) -> None:
    assert parse_bytes(text) == n


@pytest.mark.parametrize("text", ["", "GB", "8XB", "-1GB", "0", "1e9", "8 i", "8ib", "nan"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="max_memory: expected a size such as 8GB"):
        Tracer(tiny_tracer("llama").model, max_memory=text)


def test_times_are_written_out() -> None:
    assert [describe_seconds(s) for s in (0.42, 59.0, 200.4, 7500.0)] == [
        "0.42 s",
        "59 s",
        "3 min 20 s",
        "2 h 5 min",
    ]
