"""Replayed rows of lean recordings against those that full recordings hold."""

from __future__ import annotations

import pytest
import torch
from opened import tiny_tracer
from same_graph import assert_within
from tiny import CONFIGS, tiny_text

from ifr_fast.recording.layer_inputs import layer_inputs


def test_float64_replays_are_those_of_a_full_recording() -> None:
    for family in ("gpt2", "mistral"):
        tracer = tiny_tracer(family, torch.float64)
        full, lean = (tracer.record(tiny_text(20), mode=mode) for mode in ("full", "lean"))
        for layer in range(3):
            rows = torch.tensor([2, 19])
            with lean.replaying():
                of_full, of_lean = (
                    layer_inputs(recording, layer, rows).inputs for recording in (full, lean)
                )
            assert float((of_full.q - of_lean.q).abs().max()) < 1e-9
            assert float((of_full.y - of_lean.y).abs().max()) < 1e-9


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_lean_and_full_recordings_give_the_same(family: str) -> None:
    tracer, text = tiny_tracer(family), tiny_text(23)
    full, lean = (tracer.record(text, mode=mode) for mode in ("full", "lean"))
    assert lean.layers[0].q is None
    assert lean.layers[0].resid_mid is None
    rows = [0, 1, 8, 20]
    for a, b in zip(
        tracer.contributions(full, rows=rows, keep=0.0),
        tracer.contributions(lean, rows=rows, keep=0.0),
        strict=True,
    ):
        for name in ("head_total", "residual", "ffn"):
            assert_within(getattr(a, name), getattr(b, name))
        assert torch.equal(a.rows, torch.tensor(rows))
