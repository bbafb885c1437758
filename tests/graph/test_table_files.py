"""One layer's table as tensors by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from graphs import random_table
from hypothesis import given, settings
from hypothesis import strategies as st
from opened import tiny_tracer
from rewritten import rewrite, tensor_names
from tiny import tiny_text

from ifr_fast import FormatError, Routes
from ifr_fast.graph.table_files import named_tensors, take_table


@settings(deadline=None, max_examples=30)
@given(st.data(), st.sampled_from(["", "7."]), st.sampled_from(["", "edges."]), st.booleans())
def test_a_table_comes_back_from_its_names(
    data: st.DataObject, prefix: str, edges: str, known_rows: bool
) -> None:
    table = random_table(data.draw, 3, 2, torch.Generator().manual_seed(0))
    parallel = table.ffn_residual is None
    tensors = named_tensors(table, prefix, edges)
    assert len(tensors) == (8 if parallel else 10)
    assert all(name.startswith(prefix) for name in tensors)
    assert prefix + edges + "head_weight" in tensors
    rows = tensors.pop(prefix + "rows") if known_rows else None
    other = torch.ones(1)
    held = tensors | {"other": other}
    got = take_table(held, parallel=parallel, prefix=prefix, edges=edges, rows=rows)
    assert held == {"other": other}
    assert all(a is b for a, b in zip(got.edges, table.edges, strict=True))
    mine, theirs = got._replace(edges=None), table._replace(edges=None)
    assert all(a is b for a, b in zip(mine, theirs, strict=True))
    for name in tensors:
        lacking = {key: x for key, x in tensors.items() if key != name}
        with pytest.raises(KeyError, match=name):
            take_table(lacking, parallel=parallel, prefix=prefix, edges=edges, rows=rows)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_routes_without_one_of_their_tensors_are_refused(family: str, tmp_path: Path) -> None:
    path = tmp_path / "routes"
    tiny_tracer(family).trace_all(tiny_text(5), threshold=0.1).save(path)
    whole = path.read_bytes()
    accepted = []
    for name in tensor_names(path):
        rewrite(path, drop=name)
        try:
            Routes.load(path)
            accepted.append(name)
        except FormatError:
            pass
        path.write_bytes(whole)
    assert accepted == []
