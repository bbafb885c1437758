"""Results of one model are not mixed with another's: recordings and checkpoints are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opened import tiny_tracer
from peft import LoraConfig, get_peft_model
from recordings import assert_same_bits
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_model, tiny_text

from ifr_fast import FormatError, Tracer

T = 12
TEXT = tiny_text(T)
FAMILIES = ["llama", "gpt_neox", "gemma2", "gpt_oss", "bloom", "qwen3_next", "bert", "minimax"]


def put(x: torch.Tensor, at: Any, value: float) -> None:
    with torch.no_grad():
        x[at] = value


def without_checksums(path: Path) -> None:
    """Writes a recording again as version 1 had it, with the fingerprint of that time."""
    with safe_open(path, "pt") as file:
        fields = json.loads(file.metadata()["fields"]) | {"model": "0" * 64}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    done, total = tensors.pop("commits").max(0).values[:2].tolist()
    tensors["progress"] = torch.tensor([done, total])
    metadata = {"format": "ifr_fast.recording", "version": "1", "fields": json.dumps(fields)}
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("mode", ["lean", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recordings_without_checksums_are_read_with_a_warning(
    family: str, mode: str, tmp_path: Path
) -> None:
    tracer = tiny_tracer(family)
    recording = tracer.record(TEXT, mode=mode)
    recording.save(tmp_path / "old")
    without_checksums(tmp_path / "old")
    with pytest.warns(UserWarning, match="files of version 1 have no checksums"):
        assert_same_bits(tracer.load_recording(tmp_path / "old"), recording)


EDITS: dict[str, Callable[[Any], Any]] = {
    "a column of W_K": lambda m: put(m.model.layers[0].self_attn.k_proj.weight, (slice(9), 3), 1.0),
    "a column of W_V": lambda m: put(m.model.layers[1].self_attn.v_proj.weight, (slice(9), 3), 1.0),
    "a column of W_Q": lambda m: put(m.model.layers[1].self_attn.q_proj.weight, (slice(9), 3), 1.0),
    "a column of W_O": lambda m: put(m.model.layers[1].self_attn.o_proj.weight, (slice(9), 3), 1.0),
    "an FFN": lambda m: put(m.model.layers[2].mlp.up_proj.weight, (slice(9), 3), 1.0),
    "an embedding row": lambda m: put(m.model.embed_tokens.weight, int(TEXT[-1]), 1.0),
    "the final norm": lambda m: put(m.model.norm.weight, slice(9), 2.0),
    "the head": lambda m: put(m.lm_head.weight, slice(9), 2.0),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_an_edited_model_s_recording_is_refused(edit: Callable[[Any], Any], tmp_path: Path) -> None:
    """By the fingerprint, and by rows computed again where a file's fingerprint says nothing."""
    Tracer(tiny_model("llama")).record(TEXT, mode="full").save(tmp_path / "new")
    Tracer(tiny_model("llama")).record(TEXT, mode="lean").save(tmp_path / "lean")
    Tracer(tiny_model("llama")).record(TEXT, mode="full").save(tmp_path / "full")
    for name in ("lean", "full"):
        without_checksums(tmp_path / name)
    model = tiny_model("llama")
    edit(model)
    tracer = Tracer(model)
    with pytest.raises(FormatError, match="another model, or with other weights"):
        tracer.load_recording(tmp_path / "new")
    with pytest.raises(FormatError, match="another model, or with other weights"):
        tracer.record(TEXT, path=tmp_path / "new")
    for name in ("lean", "full"):
        with (
            pytest.warns(UserWarning, match="no checksums"),
            pytest.raises(FormatError, match="now gives other values"),
        ):
            tracer.load_recording(tmp_path / name)


def adapted() -> tuple[Tracer, Any]:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config)
    return Tracer(model), model


def test_an_adapter_s_results_are_not_mixed_with_its_base_s(tmp_path: Path) -> None:
    tracer, model = adapted()
    tracer.record(TEXT, path=tmp_path / "recording")
    tracer.trace_all(TEXT, threshold=0.1, checkpoint=tmp_path / "tables")
    expected = tracer.trace_all(TEXT, threshold=0.1)
    again = adapted()[0]
    again.load_recording(tmp_path / "recording")
    found = again.trace_all(TEXT, threshold=0.1, checkpoint=tmp_path / "tables")
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(mine.residual, theirs.residual)
    with model.disable_adapter():
        base = Tracer(model)
        for act in (
            lambda: base.load_recording(tmp_path / "recording"),
            lambda: base.record(TEXT, path=tmp_path / "recording"),
        ):
            with pytest.raises(FormatError, match="another model, or with other weights"):
                act()
        with pytest.raises(FormatError, match="is of another model, text or threshold"):
            base.trace_all(TEXT, threshold=0.1, checkpoint=tmp_path / "tables")


def hidden(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
    """Reads its number where no fingerprint finds it."""
    return output * (1 + float(os.environ["STRENGTH"]))


def test_a_hook_that_changes_unseen_is_found_by_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRENGTH", "0")
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(hidden)
    tracer = Tracer(model)
    tracer.record(TEXT, path=tmp_path / "recording")
    tracer.trace_all(TEXT, threshold=0.1, checkpoint=tmp_path / "tables")
    before = tracer.decoder.fingerprint()
    monkeypatch.setenv("STRENGTH", "0.5")
    assert tracer.decoder.fingerprint() == before
    with pytest.raises(FormatError, match=r"layer .*1 now gives other values"):
        tracer.load_recording(tmp_path / "recording")
    with pytest.raises(FormatError, match="other states of the residual stream"):
        tracer.trace_all(TEXT, threshold=0.1, checkpoint=tmp_path / "tables")
