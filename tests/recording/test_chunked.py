"""Texts recorded in chunks, in memory and in files, against one pass; runs that are resumed."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from opened import tiny_tracer
from oracle import TOLERANCE
from recordings import assert_same_bits, assert_same_scores, tensors
from tiny import FAMILIES, WINDOW, tiny_model, tiny_text

import ifr_fast.recording.chunked
import ifr_fast.recording.plan
import ifr_fast.recording.recorder
from ifr_fast import FormatError, IfrError, Tracer
from ifr_fast.kernels import eager
from ifr_fast.recording.mapped_file import alone, open_file
from ifr_fast.recording.plan import Place
from ifr_fast.recording.prefill import is_chunkable
from ifr_fast.scoring.layer import score_layer

T = 17  # four chunks, two windows and a bit
CHOOSING = ("deepseek_v32", "doge", "glm_moe_dsa")  # they make masks of all rows
INSIDE = sorted(
    name
    for name, of in FAMILIES.items()
    if of.values is None and of.made_by is None and name not in CHOOSING
)


@pytest.mark.usefixtures("chunks", "poisoned")
@pytest.mark.parametrize("family", INSIDE)
def test_chunks_give_what_one_pass_gives(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = tiny_tracer(family)
    assert is_chunkable(tracer.decoder)
    in_chunks = tracer.record(tiny_text(T), mode="lean")
    monkeypatch.setattr(ifr_fast.recording.plan, "LONG", T)
    at_once = tracer.record(tiny_text(T), mode="lean")
    expected = tensors(at_once)
    for name, x in tensors(in_chunks).items():
        if x.is_floating_point():
            error = float((x - expected[name]).abs().max() / expected[name].abs().max())
            assert error < 1e-5, name
    assert_same_scores(tracer, in_chunks, at_once, TOLERANCE)
    assert in_chunks.layers[0].mask is not at_once.layers[0].mask


@pytest.mark.usefixtures("chunks")
def test_chunks_keep_a_rotary_base_that_depends_on_the_length() -> None:
    short, long = [1.0, 1.3, 1.7], [2.0, 3.0, 5.0]
    config = transformers.Phi3Config(
        **{**FAMILIES["phi3"].config().to_dict(), "sliding_window": None},
    )
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": 14,
    }
    config.original_max_position_embeddings = 14
    torch.manual_seed(0)
    tracer = Tracer(transformers.AutoModelForCausalLM.from_config(config))
    in_chunks = tracer.record(tiny_text(T), mode="lean")
    at_once = tracer.record(tiny_text(T), mode="full")
    for mine, theirs in zip(in_chunks.layers, at_once.layers, strict=True):
        torch.testing.assert_close(mine.k, theirs.k, atol=1e-5, rtol=1e-5)
    short_text = tracer.record(tiny_text(T)[:12], mode="full")
    assert not torch.allclose(short_text.layers[0].k, at_once.layers[0].k[:12], atol=1e-3)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_chunks_in_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    tracer = tiny_tracer("gemma2", dtype, "eager")
    in_file = tracer.record(tiny_text(T), path=tmp_path / "recording")
    at_once = tracer.record(tiny_text(T), mode="full")
    eps = torch.finfo(dtype).eps
    for mine, theirs in zip(in_file.layers, at_once.layers, strict=True):
        assert mine.k.dtype == theirs.k.dtype == dtype
        error = (mine.k - theirs.k).abs().max() / theirs.k.abs().max()
        assert float(error) < 16 * eps
    assert len(tracer.trace(in_file).edges.layer) > 0


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    ("family", "visible"), [("llama", range(T)), ("mistral", range(T - WINDOW, T))]
)
def test_a_replaced_value_changes_its_source_alone(family: str, visible: range) -> None:
    tracer = tiny_tracer(family)
    recording = tracer.record(tiny_text(T), mode="lean")
    row = torch.tensor([T - 1])

    def weights() -> torch.Tensor:
        with torch.inference_mode(), recording.replaying():
            scores = score_layer(recording, 1, row, 0.0, eager)
        dense = torch.zeros(T, tracer.decoder.n_heads)
        head, _, source, weight = scores.head_edges
        dense[source, head] = weight
        return dense / scores.residual  # the common denominator cancels

    before = weights()
    for source in (0, 4, 5, 8, 9, 10, 11, 14, 15, 16):  # near the edges of chunks and window
        v = recording.layers[1].v
        kept = v[source].clone()
        with torch.inference_mode():
            v[source] = kept * 3 + 1
        changed = (weights() - before).abs().amax(-1) > 1e-6
        assert changed.nonzero().flatten().tolist() == ([source] if source in visible else [])
        with torch.inference_mode():
            v[source] = kept


@pytest.mark.usefixtures("chunks")
def test_a_file_holds_what_memory_holds(tmp_path: Path) -> None:
    tracer = tiny_tracer("gemma3")
    text = tiny_text(T)
    in_memory = tracer.record(text, mode="lean")
    in_file = tracer.record(text, path=tmp_path / "recording")
    expected = tensors(in_memory)
    for name, x in tensors(in_file).items():
        torch.testing.assert_close(x, expected[name], atol=1e-5, rtol=1e-5)
    assert in_file.nbytes == (tmp_path / "recording").stat().st_size
    assert_same_scores(tracer, in_memory, in_file, TOLERANCE)
    # Nothing was copied: the recording is the file's own bytes.
    assert_same_bits(in_file, tracer.load_recording(tmp_path / "recording"))


def interrupt_after(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    @contextmanager
    def stopped(*_: Any) -> Any:
        def show(done: int) -> None:
            if done == n:
                raise KeyboardInterrupt

        yield show

    monkeypatch.setattr(ifr_fast.recording.chunked, "progress", stopped)


@pytest.mark.usefixtures("chunks")
def test_a_recording_resumes_after_any_interruption(
    llama: Tracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tiny_text(11)
    whole = llama.record(text, path=tmp_path / "whole")
    n_steps = open_file(tmp_path / "whole").total
    assert n_steps == 4 * 3  # three layers and the head, three chunks each
    for n in range(1, n_steps):
        path = tmp_path / f"after-{n}"
        with monkeypatch.context() as patched:
            interrupt_after(patched, n)
            with pytest.raises(KeyboardInterrupt):
                llama.record(text, path=path)
        assert open_file(path).done == n
        with pytest.raises(FormatError, match=f"unfinished, {n} of 12 steps"):
            llama.load_recording(path)
        with pytest.raises(FormatError, match="another text"):
            llama.record(tiny_text(11, seed=1), path=path)
        assert_same_bits(llama.record(text, path=path), whole)


@pytest.mark.usefixtures("chunks")
def test_a_hook_that_keeps_what_it_sees_stops_no_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[torch.Tensor] = []
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda *args: kept.append(args[2]))
    tracer, path = Tracer(model), tmp_path / "recording"
    kept.clear()
    with monkeypatch.context() as patched:
        interrupt_after(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            tracer.record(tiny_text(11), path=path)
    kept.clear()  # as in another process
    resumed = tracer.record(tiny_text(11), path=path)
    assert kept
    assert_same_bits(resumed, tracer.record(tiny_text(11), path=tmp_path / "whole"))


@pytest.mark.usefixtures("chunks")
def test_complete_files_are_read_and_not_made_again(
    llama: Tracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, text = tmp_path / "recording", tiny_text(T)
    llama.record(text, mode="full").save(path)
    interrupt_after(monkeypatch, 1)
    assert llama.record(text, path=path).mode == "full"
    with pytest.raises(FormatError, match="another text"):
        llama.record(tiny_text(9), path=path)
    with pytest.raises(ValueError, match="path: only lean recordings"):
        llama.record(text, mode="full", path=path)


@pytest.mark.parametrize("family", ["bloom", "gemma4_shared"])
def test_what_has_no_chunks_is_recorded_into_a_file(family: str, tmp_path: Path) -> None:
    tracer = tiny_tracer(family)
    assert not is_chunkable(tracer.decoder)
    recording = tracer.record(tiny_text(9), path=tmp_path / "recording")
    assert recording.mode == "lean"
    assert_same_bits(recording, tracer.load_recording(tmp_path / "recording"))
    with pytest.raises(FormatError, match="another text"):
        tracer.record(tiny_text(8), path=tmp_path / "recording")


@pytest.mark.usefixtures("chunks")
def test_states_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    tracer = Tracer(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(IfrError, match="not finite after layer 1 in"):
        tracer.record(tiny_text(T), path=tmp_path / "recording")


@pytest.mark.usefixtures("chunks")
def test_two_runs_into_one_file_do_not_meet(tmp_path: Path) -> None:
    """The second is refused while the first is under way, and reads its file afterwards."""
    tracer, path = tiny_tracer("llama"), tmp_path / "text.rec"
    with alone(path), pytest.raises(IfrError, match="another run is recording into it"):
        tracer.record(tiny_text(T), path=path)
    assert not list(tmp_path.iterdir())
    first = tracer.record(tiny_text(T), path=path)
    assert_same_bits(first, tracer.record(tiny_text(T), path=path))
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


@pytest.mark.usefixtures("chunks")
def test_without_a_path_a_file_has_no_name(
    llama: Tracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = llama.record(tiny_text(T), mode="lean")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    make = ifr_fast.recording.recorder.make_plan
    monkeypatch.setattr(
        ifr_fast.recording.recorder,
        "make_plan",
        lambda *args, **kwargs: make(*args, **{**kwargs, "place": Place.FILE}),
    )
    in_file = llama.record(tiny_text(T))
    assert list(tmp_path.iterdir()) == []
    assert_same_scores(llama, in_file, in_memory, TOLERANCE)
