"""Traces of all positions that keep each layer's table in a folder, and resume from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from opened import tiny_tracer
from rewritten import put, rewrite
from tiny import tiny_text

import ifr_fast.scoring.frontier
from ifr_fast import FormatError, Recording
from ifr_fast.scoring.layer import score_layer

T = 17


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_an_interrupted_trace_is_resumed(
    granularity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama, text, folder = tiny_tracer("llama"), tiny_text(T), tmp_path / "layers"
    expected = llama.trace_all(text, granularity=granularity)
    scored: list[int] = []

    def score(recording: Recording, layer: int, *args: Any) -> Any:
        scored.append(layer)
        if scored == [0, 1]:
            raise KeyboardInterrupt
        return score_layer(recording, layer, *args)

    monkeypatch.setattr(ifr_fast.scoring.frontier, "score_layer", score)
    with pytest.raises(KeyboardInterrupt):
        llama.trace_all(text, granularity=granularity, checkpoint=folder)
    routes = llama.trace_all(text, granularity=granularity, checkpoint=folder)
    assert scored == [0, 1, 1, 2]
    for position in range(T):
        for mine, theirs in zip(routes[position].edges, expected[position].edges, strict=True):
            assert torch.equal(mine, theirs)
    llama.trace_all(text, checkpoint=folder)
    assert scored == [0, 1, 1, 2]
    for other in ({"text": tiny_text(9)}, {"text": text, "threshold": 0.1}):
        with pytest.raises(FormatError, match="of another model, text or threshold"):
            llama.trace_all(**other, checkpoint=folder)
    first = folder / "layer-000.safetensors"
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(FormatError, match="not a whole"):
        llama.trace_all(text, checkpoint=folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"edges.row": put(0, T)}, "row: expected 0 to 16, got . to 17"),
        ({"edges.source": put(0, -1)}, "source: expected 0 to 16, got -1"),
        ({"edges.head_weight": lambda x: x.T}, "head_weight: expected 6 heads"),
        ({"edges.weight": lambda x: x[1:]}, "weight: expected floats"),
        ({"edges.weight": put(0, float("nan"))}, "weight: expected numbers from 0 to 1"),
        ({"residual": lambda x: x[None]}, "residual: expected floats"),
        ({"rows": lambda x: x.flip(0)}, "rows: expected 0 to 16, in order"),
        ({"sample.resid_pre": lambda x: x.T}, "not a whole"),
        ({"edges.row": lambda x: x.float()}, "row: expected int64"),
    ],
)
def test_tables_of_wrong_shapes_and_ranges_are_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Such a file agrees with its checksums."""
    llama, text = tiny_tracer("llama"), tiny_text(T)
    llama.trace_all(text, checkpoint=tmp_path)
    rewrite(tmp_path / "layer-001.safetensors", **change)
    with pytest.raises(FormatError, match=words):
        llama.trace_all(text, checkpoint=tmp_path)
