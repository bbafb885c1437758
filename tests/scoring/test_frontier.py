"""Rows that a trace scores, and how often it reads the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opened import tiny_tracer
from tiny import tiny_text
from torch import Tensor

from ifr_fast import Tracer
from ifr_fast.recording.recording import Recording
from ifr_fast.routes import tracing
from ifr_fast.scoring import layer as scoring_layer


def test_one_device_synchronization_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside kernels and model, a trace reads each layer's frontier, and the result."""
    tracer = tiny_tracer("llama", impl="eager")
    recording = tracer.record(tiny_text(20))
    reads: list[str] = []
    inside = False
    scored = scoring_layer.score_layer

    def score_layer(*args: Any) -> Any:
        nonlocal inside
        inside = True
        try:
            return scored(*args)
        finally:
            inside = False

    def counting(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not inside:
                reads.append(name)
            return original(self, *args, **kwargs)

        return method

    for module in ("routes.tracing", "scoring.frontier"):
        monkeypatch.setattr(f"ifr_fast.{module}.score_layer", score_layer)
    for name in ("cpu", "item", "tolist", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, name, counting(name))

    tracer.trace(recording, threshold=0.02)
    n_layers = tracer.decoder.n_layers
    assert reads.count("cpu") == n_layers + 2  # frontiers, the graph, the prediction's token ids
    reads.clear()
    tracer.trace_all(recording, threshold=0.02)
    assert reads == ["tolist"]  # the closure check


@pytest.mark.default_model
def test_a_trace_scores_only_rows_on_the_frontier(
    smol: Tracer, prose: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    T = 320
    scored: dict[int, list[int]] = {}
    original = tracing.score_layer

    def counting(recording: Recording, layer: int, rows: Tensor, *options: Any) -> Any:
        scored[layer] = rows.tolist()
        return original(recording, layer, rows, *options)

    monkeypatch.setattr(tracing, "score_layer", counting)
    graph = smol.trace(prose[20_000 : 20_000 + T], position=-100, threshold=0.04)
    rows = sum(len(r) for r in scored.values())
    n_layers = smol.decoder.n_layers
    reached = {T - 100}
    for layer in reversed(range(n_layers)):
        assert set(scored[layer]) == reached
        edges = graph.edges
        reached = set(edges.source[(edges.layer == layer) & (edges.kind < 2)].tolist())
    print(f"{rows} of {T * n_layers} rows scored")
    assert rows < 0.1 * T * n_layers
