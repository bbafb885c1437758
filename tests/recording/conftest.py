from __future__ import annotations

import pytest
from opened import tiny_tracer

import ifr_fast.recording.plan
from ifr_fast import Tracer
from ifr_fast.recording.prefill import CHUNK_ROWS


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are long beyond 5 tokens, and chunks shorter than the windows."""
    monkeypatch.setitem(CHUNK_ROWS, "cpu", 5)
    monkeypatch.setattr(ifr_fast.recording.plan, "LONG", 5)


@pytest.fixture
def llama() -> Tracer:
    """A model that no test changes."""
    return tiny_tracer("llama")
