"""Files of graphs and routes whose parts do not fit together are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from opened import tiny_tracer
from rewritten import put, rewrite, tensor_names
from tiny import tiny_text

from ifr_fast import FormatError, RouteGraph, Routes
from ifr_fast.graph.tables import EdgeKind
from ifr_fast.kernels.contract import EdgeList

COLUMNS = [
    *(f"edges.{name}" for name in ("layer", "kind", "target", "source", "weight")),
    *(f"head_edges.{name}" for name in ("layer", "head", "target", "source", "weight")),
]


@cache
def graph_with_attention() -> RouteGraph:
    graph = tiny_tracer("llama").trace(tiny_text(20), threshold=0.005)
    assert len(graph.head_edges.layer) > 9
    return graph


@pytest.fixture
def detailed(tmp_path: Path) -> Path:
    path = tmp_path / "graph.safetensors"
    graph_with_attention().save(path)
    return path


@pytest.mark.parametrize("name", [*COLUMNS, "token_ids", "parallel"])
def test_graphs_whose_tensors_do_not_fit_together_are_refused(detailed: Path, name: str) -> None:
    whole = detailed.read_bytes()
    last = {"weight": float("nan")}
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "shorter": lambda x: x[:-1],
        "2-d": lambda x: x[:, None],
        "0-d": lambda x: x[0],
        "other dtype": lambda x: x.int() if x.dtype != torch.int32 else x.long(),
    }
    if name in COLUMNS:
        changes["negative"] = put(-1, -1)
        changes["too large"] = put(-1, last.get(name.partition(".")[2], 20))
    for what, change in changes.items():
        rewrite(detailed, **{name: change})
        with pytest.raises(FormatError, match=rf"not a whole .*{name.partition('.')[0]}"):
            pytest.fail(f"{what}: {RouteGraph.load(detailed)}")
        detailed.write_bytes(whole)


def test_graphs_out_of_canonical_order_are_refused(detailed: Path) -> None:
    whole = detailed.read_bytes()
    for table in ("edges", "head_edges"):
        columns = [name for name in COLUMNS if name.startswith(f"{table}.")]
        for change in (lambda x: x.flip(0), lambda x: torch.cat([x[:1], x])):
            rewrite(detailed, **dict.fromkeys(columns, change))
            with pytest.raises(FormatError, match=f"{table}: not in canonical order"):
                RouteGraph.load(detailed)
            detailed.write_bytes(whole)


def test_graphs_with_edges_that_no_graph_has_are_refused(detailed: Path) -> None:
    whole = detailed.read_bytes()
    graph = RouteGraph.load(detailed)
    i = int((graph.edges.kind == EdgeKind.RESIDUAL_MID).nonzero()[-1])
    target = int(graph.edges.target[i])
    alone = [name for name in COLUMNS if name.startswith("head_edges.")]
    for tensors, words in (
        ({"edges.source": put(i, target - 1)}, "edges: a source"),
        ({"parallel": torch.ones_like}, "RESIDUAL_MID in a parallel block"),
        ({"head_edges.target": put(-1, 0), "head_edges.source": put(-1, 0)}, "head_edges"),
        ({name: (lambda x: x[:0]) for name in COLUMNS if name not in alone}, "head_edges: not all"),
    ):
        rewrite(detailed, **tensors)
        with pytest.raises(FormatError, match=words):
            RouteGraph.load(detailed)
        detailed.write_bytes(whole)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("position", 20),
        ("position", -1),
        ("position", 1.0),
        ("position", True),
        ("n_layers", 4),
        ("n_layers", 0),
        ("n_heads", 0),
        ("n_heads", 1),
        ("threshold", 2),
        ("threshold", "0.1"),
        ("threshold", float("nan")),
        ("granularity", "both"),
        ("granularity", None),
        ("tokens", []),
        ("tokens", ["a"] * 19),
        ("tokens", "abcdefghijabcdefghij"),
        ("tokens", [1] * 20),
        ("predictions", [["a", 1]]),
        ("predictions", [["a", -1, 0.5]]),
        ("predictions", [["a", "1", 0.5]]),
        ("predictions", [[1, 1, 0.5]]),
        ("unattributed", [[3, "mid", 0]]),
        ("unattributed", [[0, "mid", 20]]),
        ("unattributed", [[0, "embed", 0]]),
        ("unattributed", [[0, "top", 0]]),
        ("unattributed", [[0]]),
        ("surprise", 1),
    ],
)
def test_graphs_whose_fields_do_not_fit_are_refused(detailed: Path, field: str, value: Any) -> None:
    rewrite(detailed, fields=lambda _: {field: value})
    with pytest.raises(FormatError, match=r"graph\.safetensors: not a whole"):
        RouteGraph.load(detailed)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_routes_whose_parts_do_not_fit_together_are_refused(family: str, tmp_path: Path) -> None:
    path = tmp_path / "routes"
    tiny_tracer(family).trace_all(tiny_text(5), threshold=0.005).save(path)
    whole = path.read_bytes()
    assert len(Routes.load(path)) == 5
    edits: list[dict[str, Any]] = []
    for name in tensor_names(path):
        layer, _, column = name.partition(".")
        edits.append({name: lambda x: x[:-1]})
        if layer in ("0", "2"):  # layer 1 gets the other changes
            continue
        edits += [{name: lambda x: x[..., None]}, {name: torch.Tensor.int}]
        if column in ("row", "source"):
            edits += [{name: put(-1, 5)}, {name: put(-1, -1)}]
        elif column in ("weight", "head_weight", "residual", "ffn", "ffn_residual"):
            edits += [{name: put(0, -0.5)}, {name: put(0, float("inf"))}]
    edges = [f"1.{name}" for name in EdgeList._fields]
    edits += [
        {"1.head_weight": lambda x: x[:, :-1]},
        {name: (lambda x: torch.cat([x, x])) for name in edges},
        {"1.row": torch.zeros_like, "1.source": lambda x: 1 + torch.zeros_like(x)},
    ]
    for field, value in {
        "parallel": [[], [False], [True] * 3 if family == "llama" else [False] * 3, ["a"] * 4],
        "tokens": [["a"] * 4, [], [1] * 5],
        "threshold": [0.004, 2, None],
        "scored_threshold": [0.2, -1, "0"],
        "granularity": ["both"],
        "predictions": [[], [[["a", 1]]] * 5, [[]] * 4, [[["a", 1, "x"]]] * 5],
    }.items():
        edits += [{"fields": lambda _, change={field: of}: change} for of in value]
    accepted = []
    for edit in edits:
        rewrite(path, **edit)
        try:
            Routes.load(path)
            accepted.append(edit)
        except FormatError:
            pass
        path.write_bytes(whole)
    assert accepted == []
