"""Plans: the room that a recording takes, where it goes, and plans without a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from opened import tiny_tracer
from tiny import FAMILIES, tiny_text

import ifr_fast.recording.plan
from ifr_fast import MemoryBudgetError, Tracer, UnsupportedArchitectureError
from ifr_fast.recording.paper_plan import plan_for
from ifr_fast.recording.plan import Place, Room, make_plan
from ifr_fast.recording.recording import RecordingMode
from ifr_fast.recording.sizes import Sizes


def test_memory_decides_what_is_recorded(llama: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = llama.plan(96)
    assert plan.lean_bytes < plan.full_bytes
    # A lean token takes resid_pre, k, v of each layer, the last layer's output and the state that
    # the head reads; a full one also takes q and resid_mid.
    assert plan.lean_bytes == 96 * 4 * (3 * (36 + 2 * 2 * 6) + 2 * 36)
    assert plan.full_bytes - plan.lean_bytes == 96 * 3 * 4 * (36 + 36)

    def with_memory(n_bytes: float | None) -> None:
        available = None if n_bytes is None else int(n_bytes)
        monkeypatch.setattr(ifr_fast.recording.plan, "available_memory", lambda _: available)

    text = tiny_text(96)
    expected = llama.trace(text)
    with_memory(None)
    assert llama.record(text).mode == "full"
    assert llama.plan(96).available_bytes is None
    with_memory(2 * plan.added_bytes)
    assert llama.record(text).mode == "full"
    with_memory(plan.added_bytes / 0.85)
    assert llama.plan(96).mode == "lean"
    assert llama.plan(96).recording_bytes == plan.lean_bytes
    assert llama.record(text).mode == "lean"
    graph = llama.trace(text)
    assert torch.equal(graph.edges.source, expected.edges.source)
    with_memory(1000)
    for act in (llama.record, llama.trace, llama.trace_all, llama.contributions):
        with pytest.raises(MemoryBudgetError, match=r"96 tokens.*1 kB are available"):
            act(text)
    with pytest.raises(MemoryBudgetError, match="96 tokens"):
        llama.plan(96)


@pytest.mark.parametrize("n_tokens", [0, -1])
def test_plans_need_tokens(llama: Tracer, n_tokens: int) -> None:
    with pytest.raises(ValueError, match="n_tokens: expected at least 1"):
        llama.plan(n_tokens)


def test_a_plan_goes_where_there_is_room(llama: Tracer) -> None:
    sizes = Sizes.of(llama.decoder)
    n = 1 << 20
    free = Room(None, None, None)
    lean = make_plan(sizes, n, free, mode=RecordingMode.LEAN, place=Place.DEVICE)

    def choice(
        device: int | None, host: int | None = None, disk: int | None = None, on: str = "cpu"
    ) -> tuple[RecordingMode, Place, int | None]:
        plan = make_plan(sizes._replace(device=torch.device(on)), n, Room(device, host, disk))
        return plan.mode, plan.place, plan.chunk_rows

    full = make_plan(sizes, n, free)
    assert full.added_bytes > lean.added_bytes > lean.lean_bytes
    assert choice(None) == (RecordingMode.FULL, Place.DEVICE, None)
    assert choice(full.added_bytes * 2) == (RecordingMode.FULL, Place.DEVICE, None)
    assert choice(lean.added_bytes * 9 // 8) == (RecordingMode.LEAN, Place.DEVICE, 512)
    little = lean.added_bytes
    assert choice(little) == (RecordingMode.LEAN, Place.FILE, 512)
    # The kernels take more room beside a recording on a GPU.
    on_gpu = sizes._replace(device=torch.device("cuda"))
    beside = make_plan(on_gpu, n, free, mode=RecordingMode.LEAN, place=Place.HOST).added_bytes
    beside = beside * 9 // 8
    assert choice(beside, 2 * lean.lean_bytes, on="cuda") == (
        RecordingMode.LEAN,
        Place.HOST,
        2048,
    )
    assert choice(beside, 1000, on="cuda") == (RecordingMode.LEAN, Place.FILE, 2048)
    with pytest.raises(MemoryBudgetError, match=r"1048576 tokens takes .* of disk and a margin"):
        choice(little, 1000, 1000)
    with pytest.raises(MemoryBudgetError, match="of memory and a margin, 1 kB are available"):
        choice(1000)


def test_max_memory_is_kept(llama: Tracer, tmp_path: Path) -> None:
    with pytest.raises(MemoryBudgetError, match="recording 96 tokens takes"):
        llama.plan(96, max_memory="1MB")
    small = Tracer(llama.model, max_memory="1MB")
    for act in (small.record, small.trace, small.trace_all, small.contributions):
        with pytest.raises(MemoryBudgetError):
            act(tiny_text(9))
    with pytest.raises(MemoryBudgetError):
        small.record(tiny_text(9), path=tmp_path / "recording")
    plan = llama.plan(96, max_memory="200MB")
    assert plan.seconds is not None
    assert 0 < plan.seconds < 60
    assert "recording takes about" in str(plan)
    assert plan.lines()[-1] == ("in all", plan.total_bytes)


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3", "phi3", "cohere2"])
def test_a_plan_on_paper_is_that_of_the_model(family: str) -> None:
    mine = plan_for(FAMILIES[family].config(), 96, dtype=torch.float32, device="cpu")
    theirs = make_plan(Sizes.of(tiny_tracer(family).decoder), 96, Room(None, None, None))
    for name in ("weights_bytes", "maps_bytes", "lean_bytes", "full_bytes", "scoring_bytes"):
        assert getattr(mine, name) == getattr(theirs, name), name


def test_llama_3_8b_at_its_whole_context_fits_into_80_gb() -> None:
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=32,
        vocab_size=128256,
    )
    plan = plan_for(config, 131_072, device_memory=80 * 10**9)
    assert plan.place is Place.DEVICE
    assert plan.weights_bytes == 2 * 8_030_261_248  # the published number of weights
    assert plan.lean_bytes == 131_072 * 2 * (34 * 4096 + 32 * 2 * 8 * 128)
    assert plan.total_bytes < 80 * 10**9
    assert plan_for(config, 131_072, device_memory=60 * 10**9).place is Place.HOST
    with pytest.raises(MemoryBudgetError, match="131072 tokens"):
        plan_for(config, 131_072, device_memory=16 * 10**9)


def test_a_plan_on_paper_needs_attention_that_can_be_seen() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="config: the attention of Bloom"):
        plan_for(FAMILIES["bloom"].config(), 96)
