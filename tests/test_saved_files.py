"""Files saved by earlier versions load, and today's have the same form.

tests/data/saved holds files of the tiny models of tests/support/tiny.py, as the version before the
packages of ifr_fast/ saved them: 9 tokens, the reference kernel.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from paths import ROOT
from safetensors import safe_open
from tiny import tiny_model, tiny_text

from ifr_fast import FormatError, RouteGraph, Routes, Tracer
from ifr_fast.scoring.checkpoint import Checkpoint

SAVED = ROOT / "tests" / "data" / "saved"
FAMILIES = ["llama", "gpt_neox"]  # sequential and parallel blocks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["graph", "span"])
def test_graphs_load_and_are_saved_alike(family: str, kind: str, tmp_path: Path) -> None:
    old, new = SAVED / f"{family}.{kind}.safetensors", tmp_path / "graph.safetensors"
    with pytest.warns(UserWarning, match="version 2 have no checksums"):
        graph = RouteGraph.load(old)
    assert len(graph.tokens) == 9
    assert len(graph.edges.layer) > 10
    assert (graph.span is not None) == (kind == "span")
    graph.save(new)
    assert tensors_of(new) == tensors_of(old)
    assert fields_of(new) == fields_of(old)


@pytest.mark.parametrize("family", FAMILIES)
def test_routes_load_and_are_saved_alike(family: str, tmp_path: Path) -> None:
    old, new = SAVED / f"{family}.routes.safetensors", tmp_path / "routes.safetensors"
    with pytest.warns(UserWarning, match="version 1 have no checksums"):
        routes = Routes.load(old)
    assert len(routes) == 9
    routes.save(new)
    assert tensors_of(new) == tensors_of(old)
    assert fields_of(new) == fields_of(old)


def test_checkpoints_without_checksums_are_refused() -> None:
    """The model that they are of cannot be told any more."""
    tracer = Tracer(tiny_model("llama"), impl="reference")
    checkpoint = Checkpoint.of(SAVED / "llama.checkpoint", tracer.record(tiny_text(9)), 0.02)
    with pytest.raises(FormatError, match="has version 1, this ifr_fast reads version 2"):
        checkpoint.load(0, torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["lean", "full"])
def test_recordings_hold_the_same_tensors(family: str, mode: str, tmp_path: Path) -> None:
    expected = json.loads((SAVED / "recordings.json").read_text())[f"{family}.{mode}"]
    del expected["progress"]  # the form of version 1
    path = tmp_path / "recording"
    Tracer(tiny_model(family), impl="reference").record(tiny_text(9), mode=mode).save(path)
    with safe_open(str(path), "pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert found.pop("commits").get_shape() == [2, 3 + len(expected)]
        assert {n: [x.get_dtype(), *x.get_shape()] for n, x in found.items()} == expected
    fields = fields_of(path)
    assert set(fields) == {"mode", "model", "tokens", "position", "windows"}


def tensors_of(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor of a file by its name: dtype, shape and bytes."""
    found = {}
    with safe_open(str(path), "pt") as file:
        for name in file.keys():  # noqa: SIM118
            x = file.get_tensor(name)
            found[name] = str(x.dtype), list(x.shape), x.contiguous().numpy().tobytes()
    return found


def fields_of(path: Path) -> dict[str, object]:
    with safe_open(str(path), "pt") as file:
        return json.loads(file.metadata()["fields"])


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    for load in (RouteGraph.load, Routes.load, Tracer(tiny_model("llama")).load_recording):
        with pytest.raises(FormatError, match="is a directory; expected a file"):
            load(tmp_path)
