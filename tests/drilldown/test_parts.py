"""Contribution maps, against float64 importances of all parts."""

from __future__ import annotations

import pytest
import torch
from model_oracle import LAYER, Case, T, assert_close, case
from oracle import importances

from ifr_fast.recording.recording import RecordingMode


def test_contribution_maps(any_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tracer, oracle, text = any_case
    monkeypatch.setattr("ifr_fast.drilldown.parts._MAP_ELEMENTS", 5 * T * tracer.decoder.n_heads)
    for mode in RecordingMode:
        recording = tracer.record(text, mode=mode)
        # How rows are replayed depends on the mode, and a layer's map on its own rows alone.
        for layer in range(tracer.decoder.n_layers) if mode == RecordingMode.FULL else (LAYER,):
            expected = importances(oracle.layers[layer]).heads
            for head in (0, -1):
                got = tracer.contribution_map(recording, layer=layer, head=head)
                assert_close(got, expected[head])
            assert_close(tracer.contribution_map(recording, layer=layer), expected.sum(0))


def test_a_map_says_what_a_graph_says() -> None:
    tracer, _, text = case("llama")
    heads = tracer.trace(text, threshold=0.0, granularity="head").head_edges
    got = tracer.contribution_map(text, layer=LAYER, head=2)
    mine = (heads.layer == LAYER) & (heads.head == 2)
    assert torch.equal(got[heads.target[mine], heads.source[mine]], heads.weight[mine])
    assert not got.is_inference()
