"""Recordings saved and loaded, and the files that are refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from opened import tiny_tracer
from recordings import assert_same_bits
from safetensors.torch import save_file
from tiny import tiny_model, tiny_text

from ifr_fast import FormatError, IfrError, Tracer
from ifr_fast.storage.checksums import checksum_of_json

T = 17


@pytest.mark.parametrize("mode", ["full", "lean"])
@pytest.mark.parametrize(
    "family", ["llama", "phi", "gemma2", "gpt_oss", "qwen3_next", "opt", "bloom", "gpt_neo"]
)
def test_recordings_are_saved_and_loaded(family: str, mode: str, tmp_path: Path) -> None:
    tracer = tiny_tracer(family)
    recording = tracer.record(tiny_text(T), mode=mode)
    recording.save(tmp_path / "recording")
    loaded = tracer.load_recording(tmp_path / "recording")
    assert_same_bits(recording, loaded)
    for position in (-1, 7):
        graph = tracer.trace(recording, position=position, threshold=0.02)
        again = tracer.trace(loaded, position=position, threshold=0.02)
        for mine, theirs in zip(graph.edges, again.edges, strict=True):
            # The rounding of a replay depends on the alignment of what it reads.
            torch.testing.assert_close(mine, theirs, atol=1e-6 * (mode == "lean"), rtol=0)
        assert graph.predictions == again.predictions
    # The file counts as complete, even where attention outside the interface has no chunks.
    assert_same_bits(tracer.record(tiny_text(T), path=tmp_path / "recording"), loaded)


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    n = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + n]), content[8 + n :]


def with_header(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)  # the alignment is kept
    return len(text).to_bytes(8, "little") + text + data


def summed(header: dict[str, Any]) -> dict[str, Any]:
    """The header with the checksum that belongs to it."""
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "checksum"}
    header = {**header, "__metadata__": metadata}
    metadata["checksum"] = checksum_of_json(header)
    return header


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
    no_fields = {**header, "__metadata__": {**metadata, "fields": "{"}}
    refuses(with_header(no_fields, data), "its header does not match its checksum")
    refuses(with_header(summed(no_fields), data), "not a whole")
    fields = json.dumps({**json.loads(metadata["fields"]), "model": "another"})
    refuses(
        with_header(summed({**header, "__metadata__": {**metadata, "fields": fields}}), data),
        "another model",
    )
    renamed = {("k.x" if name == "k.1" else name): entry for name, entry in header.items()}
    refuses(with_header(summed(renamed), data), "not a whole")
    save_file({"progress": torch.zeros(2)}, path)
    refuses(path.read_bytes(), "expected a file of format 'ifr_fast.recording', got None")
    with pytest.raises(FormatError, match="no such file"):
        llama.load_recording(tmp_path / "nowhere")
    with pytest.raises(FormatError):
        llama.load_recording(tmp_path)
    begin = header["token_ids"]["data_offsets"][0]
    wild = data[:begin] + (1 << 40).to_bytes(8, "little") + data[begin + 8 :]
    path.write_bytes(with_header(header, wild))
    with pytest.raises(FormatError, match="'token_ids' does not match its checksum"):
        llama.load_recording(path)


def test_a_recording_of_another_model_is_refused(llama: Tracer, tmp_path: Path) -> None:
    llama.record(tiny_text(9)).save(tmp_path / "recording")
    for other in (Tracer(tiny_model("llama", seed=1)), tiny_tracer("mistral")):
        with pytest.raises(FormatError, match="another model, or with other weights"):
            other.load_recording(tmp_path / "recording")
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


def test_a_missing_folder_is_one_clear_error(llama: Tracer, tmp_path: Path) -> None:
    recording, path = llama.record(tiny_text(9)), tmp_path / "none" / "recording"
    for act in (lambda: llama.record(tiny_text(9), path=path), lambda: recording.save(path)):
        with pytest.raises(IfrError, match=r"none.*: cannot be written \(No such file"):
            act()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "change", "words"),
    [
        ("full", lambda r: {"resid_mid": r.layers[1].resid_mid.T}, "mid.1: expected floats"),
        ("full", lambda r: {"q": r.layers[1].q.transpose(0, 1)}, "q.1: expected floats"),
        ("lean", lambda r: {"k": r.layers[1].k.transpose(0, 1)}, "k.1: expected"),
        ("lean", lambda r: {"v": torch.cat([r.layers[1].v] * 2)}, "v.1: expected floats"),
        ("lean", lambda r: {"resid_pre": r.layers[1].resid_pre.T}, "resid.1: expected floats"),
        ("lean", lambda r: {"checked_mid": r.layers[1].checked_mid[1:]}, "checked_mid.1: expected"),
        ("lean", lambda _: {"window": -3}, "windows: expected at least 1 or none"),
    ],
)
def test_layers_of_wrong_shapes_are_refused(
    mode: str, change: Any, words: str, llama: Tracer, tmp_path: Path
) -> None:
    """Such a file agrees with its checksums."""
    recording = llama.record(tiny_text(T), mode=mode)
    layer = recording.layers[1]
    for name, x in change(recording).items():
        setattr(layer, name, x.contiguous() if isinstance(x, torch.Tensor) else x)
    recording.save(tmp_path / "recording")
    with pytest.raises(FormatError, match=words):
        llama.load_recording(tmp_path / "recording")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checked_rows": torch.tensor([0, T])}, "checked_mid.0|checked_rows: expected 0 to 16"),
        ({"position": T}, "position: expected 0 to 16, got 17"),
        ({"tokens": ["x"]}, "tokens: expected 17 strings"),
        ({"token_ids": torch.zeros(1, T, dtype=torch.int64)}, "token ids"),
        ({"resid_final": torch.zeros(T)}, "resid.3: expected floats"),
        ({"logits": torch.zeros(3)}, "logits: expected floats"),
    ],
)
def test_recordings_of_wrong_shapes_are_refused(
    change: dict[str, Any], words: str, llama: Tracer, tmp_path: Path
) -> None:
    recording = dataclasses.replace(llama.record(tiny_text(T), mode="lean"), **change)
    recording.save(tmp_path / "recording")
    with pytest.raises(FormatError, match=words):
        llama.load_recording(tmp_path / "recording")
