"""Recordings that no longer hold what the model attended to are noticed."""

from __future__ import annotations

import pytest
from opened import tiny_tracer
from tiny import tiny_text

from ifr_fast import IfrError

T = 12


@pytest.mark.parametrize("mode", ["full", "lean"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_a_poisoned_recording_is_noticed(family: str, layer: int, mode: str) -> None:
    """The model attended to other values and keys than those at the position that is changed."""
    tracer, text = tiny_tracer(family), tiny_text(T)
    for field, position in (("v", T - 1), ("k", T - 2)):
        recording = tracer.record(text, mode=mode)
        assert T - 1 in recording.checked_rows.tolist()
        cache = getattr(recording.layers[layer], field).clone()
        cache[position] = -3 * cache[position]
        setattr(recording.layers[layer], field, cache)
        for act in (
            lambda recording=recording: tracer.trace(recording, threshold=0.0),
            lambda recording=recording: tracer.trace_all(recording),
            lambda recording=recording: list(tracer.contributions(recording, layers=[layer])),
        ):
            with pytest.raises(IfrError, match=f"layer {layer} .*do not add up"):
                act()
