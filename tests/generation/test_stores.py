"""Stores of keys and values that grow with the text."""

from __future__ import annotations

import pytest
import torch
from generating import OPTIONS, PROMPT
from opened import tiny_tracer
from same_graph import assert_same_graph
from tiny import tiny_text

import ifr_fast.generation.generation as module


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "gemma2", "bloom", "gpt_oss", "gpt_neox", "qwen3_next", "deepseek_v3"],
)
def test_other_kernels_have_a_store_of_their_own(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROOM", 2)
    tracer = tiny_tracer(family, impl="eager")
    for step in tracer.generate(tiny_text(PROMPT), **OPTIONS):
        fresh = tracer.trace(step.graph.token_ids, threshold=0.02)
        assert_same_graph(step.graph, fresh, tolerance=1e-5)


def test_a_store_that_grew_leaves_nothing_of_the_old_one() -> None:
    tracer = tiny_tracer("mistral")
    recording = tracer.record(tiny_text(PROMPT), mode="lean")
    generation = module.Generation(tracer._recorder, tracer.kernel, recording, 0.02, "token", 2)
    for token_id in range(4):
        generation.append(token_id)
    layers = generation._decoding._layers
    for layer, mine, theirs in zip(
        layers, generation._decoding.recorded, recording.layers, strict=True
    ):
        assert len(layer.k) > PROMPT + 2
        assert torch.equal(mine.k, theirs.k)
        assert torch.equal(mine.v, theirs.v)
        assert mine.k.untyped_storage().data_ptr() == layer.k.untyped_storage().data_ptr()
        assert mine.v.untyped_storage().data_ptr() == layer.v.untyped_storage().data_ptr()
