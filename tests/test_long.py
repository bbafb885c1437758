"""Long texts: recorded in chunks, in files, gone on with, planned; recordings saved and loaded."""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import TOLERANCE
from safetensors.torch import save_file
from tiny import FAMILIES, tiny_model, tiny_text

import ifr_fast.recording.chunked
import ifr_fast.recording.plan
import ifr_fast.recording.recorder
import ifr_fast.scoring.frontier
from ifr_fast import FormatError, IfrError, MemoryBudgetError, Tracer, UnsupportedArchitectureError
from ifr_fast.recording.mapped_file import open_file
from ifr_fast.recording.memory import parse_bytes
from ifr_fast.recording.paper_plan import plan_for
from ifr_fast.recording.plan import Place, Room, make_plan
from ifr_fast.recording.prefill import CHUNK_ROWS, is_chunkable
from ifr_fast.recording.recording import Recording, RecordingMode
from ifr_fast.recording.sizes import Sizes
from ifr_fast.recording.speed import describe_seconds
from ifr_fast.scoring.layer import score_layer

T = 33
INSIDE = sorted(name for name, family in FAMILIES.items() if family.values is None)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are long beyond 5 tokens, and chunks shorter than the windows."""
    monkeypatch.setitem(CHUNK_ROWS, "cpu", 5)
    monkeypatch.setattr(ifr_fast.recording.plan, "LONG", 5)


@pytest.fixture(scope="module")
def llama() -> Tracer:
    return Tracer(tiny_model("llama"))


def tensors(recording: Recording) -> dict[str, torch.Tensor]:
    return ifr_fast.recording._tensors(recording)


def assert_same_bits(mine: Recording, theirs: Recording) -> None:
    left, right = tensors(mine), tensors(theirs)
    assert left.keys() == right.keys()
    for name, x in left.items():
        assert x.dtype == right[name].dtype, name
        assert torch.equal(x, right[name]), name
    for one, other in zip(mine.layers, theirs.layers, strict=True):
        for name in ("scale", "window", "softcap"):
            assert getattr(one, name) == getattr(other, name)
    assert mine.tokens == theirs.tokens
    assert (mine.mode, mine.position) == (theirs.mode, theirs.position)


def assert_same_scores(tracer: Tracer, mine: Recording, theirs: Recording, atol: float) -> None:
    both = zip(
        tracer.contributions(mine, keep=0.0), tracer.contributions(theirs, keep=0.0), strict=True
    )
    for left, right in both:
        for name in ("residual", "ffn", "head_total"):
            torch.testing.assert_close(getattr(left, name), getattr(right, name), atol=atol, rtol=0)


@pytest.mark.usefixtures("chunks", "poisoned")
@pytest.mark.parametrize("family", INSIDE)
def test_chunks_give_what_one_pass_gives(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer(tiny_model(family))
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
        "original_max_position_embeddings": 16,
    }
    config.original_max_position_embeddings = 16
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
    tracer = Tracer(tiny_model("gemma2", dtype=dtype), impl="eager")
    in_file = tracer.record(tiny_text(T), path=tmp_path / "recording")
    at_once = tracer.record(tiny_text(T), mode="full")
    eps = torch.finfo(dtype).eps
    for mine, theirs in zip(in_file.layers, at_once.layers, strict=True):
        assert mine.k.dtype == theirs.k.dtype == dtype
        error = (mine.k - theirs.k).abs().max() / theirs.k.abs().max()
        assert float(error) < 16 * eps
    assert len(tracer.trace(in_file).edges.layer) > 0


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("family", "visible"), [("llama", range(T)), ("mistral", range(26, T))])
def test_a_replaced_value_changes_its_source_alone(family: str, visible: range) -> None:
    tracer = Tracer(tiny_model(family))
    recording = tracer.record(tiny_text(T), mode="lean")
    row = torch.tensor([T - 1])

    def weights() -> torch.Tensor:
        with torch.inference_mode(), recording.replaying():
            scores = score_layer(recording, 1, row, 0.0, "eager")
        dense = torch.zeros(T, tracer.decoder.n_heads)
        head, _, source, weight = scores.head_edges
        dense[source, head] = weight
        return dense / scores.residual  # whatever the denominator

    before = weights()
    for source in (0, 4, 5, 9, 10, 24, 25, 26, 29, 30, 32):  # about the edges of chunks and window
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
    tracer = Tracer(tiny_model("gemma3"))
    text = tiny_text(T)
    in_memory = tracer.record(text, mode="lean")
    in_file = tracer.record(text, path=tmp_path / "recording")
    expected = tensors(in_memory)
    for name, x in tensors(in_file).items():
        torch.testing.assert_close(x, expected[name], atol=1e-5, rtol=1e-5)
    assert in_file.nbytes == (tmp_path / "recording").stat().st_size
    assert_same_scores(tracer, in_memory, in_file, TOLERANCE)
    # No copy was made: what is in the file is what is read.
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
def test_any_interruption_can_be_gone_on_from(
    llama: Tracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tiny_text(17)
    whole = llama.record(text, path=tmp_path / "whole")
    n_steps = open_file(tmp_path / "whole").total
    assert n_steps == 4 * 4  # three layers and the head, four chunks each
    for n in range(1, n_steps):
        path = tmp_path / f"after-{n}"
        with monkeypatch.context() as patched:
            interrupt_after(patched, n)
            with pytest.raises(KeyboardInterrupt):
                llama.record(text, path=path)
        assert open_file(path).done == n
        with pytest.raises(FormatError, match=f"unfinished, {n} of 16 steps"):
            llama.load_recording(path)
        with pytest.raises(FormatError, match="another text"):
            llama.record(tiny_text(17, seed=1), path=path)
        assert_same_bits(llama.record(text, path=path), whole)


@pytest.mark.usefixtures("chunks")
def test_whole_files_are_read_and_not_made_again(
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


@pytest.mark.parametrize("mode", ["full", "lean"])
@pytest.mark.parametrize(
    "family", ["llama", "phi", "gemma2", "gpt_oss", "qwen3_next", "opt", "bloom", "gpt_neo"]
)
def test_recordings_are_saved_and_loaded(family: str, mode: str, tmp_path: Path) -> None:
    tracer = Tracer(tiny_model(family))
    recording = tracer.record(tiny_text(T), mode=mode)
    recording.save(tmp_path / "recording")
    loaded = tracer.load_recording(tmp_path / "recording")
    assert_same_bits(recording, loaded)
    for position in (-1, 7):
        graph = tracer.trace(recording, position=position, threshold=0.02)
        again = tracer.trace(loaded, position=position, threshold=0.02)
        for mine, theirs in zip(graph.edges, again.edges, strict=True):
            # Replays round by how what they read is aligned.
            torch.testing.assert_close(mine, theirs, atol=1e-6 * (mode == "lean"), rtol=0)
        assert graph.predictions == again.predictions
    # It goes on to be a file of the text, though attention outside the interface has no chunks.
    assert_same_bits(tracer.record(tiny_text(T), path=tmp_path / "recording"), loaded)


def test_attention_outside_the_interface_is_recorded_into_a_file(tmp_path: Path) -> None:
    tracer = Tracer(tiny_model("bloom"))
    assert not is_chunkable(tracer.decoder)
    recording = tracer.record(tiny_text(9), path=tmp_path / "recording")
    assert recording.mode == "lean"
    assert_same_bits(recording, tracer.load_recording(tmp_path / "recording"))
    with pytest.raises(FormatError, match="another text"):
        tracer.record(tiny_text(8), path=tmp_path / "recording")


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    n = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + n]), content[8 + n :]


def with_header(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)  # as aligned as it was
    return len(text).to_bytes(8, "little") + text + data


def test_corrupt_files_are_refused(llama: Tracer, tmp_path: Path) -> None:
    path = tmp_path / "recording"
    llama.record(tiny_text(9)).save(path)
    content = path.read_bytes()
    header, data = header_of(content)

    def refuses(changed: bytes, match: str) -> None:
        path.write_bytes(changed)
        for act in (llama.load_recording, lambda p: llama.record(tiny_text(9), path=p)):
            with pytest.raises(FormatError, match=match):
                act(path)

    for n in (0, 7, 100, len(content) // 2, len(content) - 1):
        refuses(content[:n], "not a whole")
    refuses(content + b"x", "not a whole")
    refuses(b"\xff" * len(content), "not a whole")
    metadata = header["__metadata__"]
    refuses(
        with_header({**header, "__metadata__": {**metadata, "version": "0"}}, data), "version 0"
    )
    refuses(
        with_header({**header, "__metadata__": {**metadata, "fields": "{"}}, data), "not a whole"
    )
    fields = json.dumps({**json.loads(metadata["fields"]), "model": "another"})
    refuses(
        with_header({**header, "__metadata__": {**metadata, "fields": fields}}, data),
        "another model",
    )
    renamed = {("k.x" if name == "k.1" else name): entry for name, entry in header.items()}
    refuses(with_header(renamed, data), "not a whole")
    save_file({"progress": torch.zeros(2)}, path)
    refuses(path.read_bytes(), "expected a file of format 'ifr_fast.recording', got None")
    with pytest.raises(FormatError, match="no such file"):
        llama.load_recording(tmp_path / "nowhere")
    with pytest.raises(FormatError):
        llama.load_recording(tmp_path)
    begin = header["token_ids"]["data_offsets"][0]
    wild = data[:begin] + (1 << 40).to_bytes(8, "little") + data[begin + 8 :]
    path.write_bytes(with_header(header, wild))
    with pytest.raises(FormatError, match="not a whole recording"):
        llama.load_recording(path)


def test_a_recording_of_another_model_is_refused(llama: Tracer, tmp_path: Path) -> None:
    llama.record(tiny_text(9)).save(tmp_path / "recording")
    for other in (tiny_model("llama", seed=1), tiny_model("mistral")):
        with pytest.raises(FormatError, match="another model, or with other weights"):
            Tracer(other).load_recording(tmp_path / "recording")
    Tracer(tiny_model("llama")).load_recording(tmp_path / "recording")


@pytest.mark.usefixtures("chunks")
def test_a_full_disk_is_one_clear_error(
    llama: Tracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recording = llama.record(tiny_text(9))
    monkeypatch.setattr(os, "posix_fallocate", full)
    path = tmp_path / "recording"
    for act in (lambda: llama.record(tiny_text(9), path=path), lambda: recording.save(path)):
        with pytest.raises(IfrError, match=r"recording: cannot be written \(No space left"):
            act()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("chunks")
def test_states_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    tracer = Tracer(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(IfrError, match="not finite after layer 1 in"):
        tracer.record(tiny_text(T), path=tmp_path / "recording")


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_all_routes_are_gone_on_with(
    granularity: str, llama: Tracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, folder = tiny_text(T), tmp_path / "layers"
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
        Tracer(tiny_model("llama"), max_memory=text)


def test_times_are_written_out() -> None:
    assert [describe_seconds(s) for s in (0.42, 59.0, 200.4, 7500.0)] == [
        "0.42 s",
        "59 s",
        "3 min 20 s",
        "2 h 5 min",
    ]


def test_a_plan_goes_where_there_is_room(llama: Tracer) -> None:
    sizes = Sizes.of(llama.decoder)
    n = 1 << 20
    free = Room(None, None, None)
    lean = make_plan(sizes, n, free, mode=RecordingMode.LEAN, place=Place.DEVICE)

    def choice(device: int | None, host: int | None = None, disk: int | None = None, on="cpu"):
        plan = make_plan(sizes._replace(device=torch.device(on)), n, Room(device, host, disk))
        return plan.mode, plan.place, plan.chunk_rows

    full = make_plan(sizes, n, free)
    assert full.added_bytes > lean.added_bytes > lean.lean_bytes
    assert choice(None) == (RecordingMode.FULL, Place.DEVICE, None)
    assert choice(full.added_bytes * 2) == (RecordingMode.FULL, Place.DEVICE, None)
    assert choice(lean.added_bytes * 9 // 8) == (RecordingMode.LEAN, Place.DEVICE, 512)
    little = lean.added_bytes
    assert choice(little) == (RecordingMode.LEAN, Place.FILE, 512)
    # There the kernels take more room beside a recording.
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
    small = Tracer(tiny_model("llama"), max_memory="1MB")
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


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3", "phi3", "cohere2"])
def test_a_plan_on_paper_is_that_of_the_model(family: str) -> None:
    mine = plan_for(FAMILIES[family].config(), 96, dtype=torch.float32, device="cpu")
    theirs = make_plan(Sizes.of(Tracer(tiny_model(family)).decoder), 96, Room(None, None, None))
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
