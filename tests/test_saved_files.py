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

from ifr_fast import RouteGraph, Routes, Tracer
from ifr_fast.graph.table_files import named_tensors
from ifr_fast.scoring.checkpoint import Checkpoint

SAVED = ROOT / "tests" / "data" / "saved"
FAMILIES = ["llama", "gpt_neox"]  # sequential and parallel blocks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["graph", "span"])
def test_graphs_load_and_are_saved_alike(family: str, kind: str, tmp_path: Path) -> None:
    old, new = SAVED / f"{family}.{kind}.safetensors", tmp_path / "graph.safetensors"
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
    routes = Routes.load(old)
    assert len(routes) == 9
    routes.save(new)
    assert tensors_of(new) == tensors_of(old)
    assert fields_of(new) == fields_of(old)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_load(family: str, tmp_path: Path) -> None:
    """A folder's fields depend on the model's weights, so they are taken from the files."""
    folder = SAVED / f"{family}.checkpoint"
    routes = Routes.load(SAVED / f"{family}.routes.safetensors")
    old = Checkpoint(folder, fields_of(folder / "layer-000.safetensors"))
    new = Checkpoint(tmp_path, old.fields)
    for layer, of_routes in enumerate(routes.layers):
        table = old.load(layer, torch.device("cpu"))
        assert table is not None
        expected = named_tensors(of_routes)
        for name, x in named_tensors(table).items():
            assert torch.equal(x, expected[name]), name
        new.save(layer, table)
        name = f"layer-{layer:03}.safetensors"
        assert tensors_of(tmp_path / name) == tensors_of(folder / name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["lean", "full"])
def test_recordings_hold_the_same_tensors(family: str, mode: str, tmp_path: Path) -> None:
    expected = json.loads((SAVED / "recordings.json").read_text())[f"{family}.{mode}"]
    path = tmp_path / "recording"
    Tracer(tiny_model(family), impl="reference").record(tiny_text(9), mode=mode).save(path)
    with safe_open(str(path), "pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
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
