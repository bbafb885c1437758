"""Fixtures of graphs of tiny models, and routes whose weights are drawn at random."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from opened import tiny_tracer
from tiny import tiny_text

from ifr_fast import RouteGraph, Routes, Tracer
from ifr_fast.graph.tables import Granularity, LayerTable, Prediction
from ifr_fast.kernels.contract import EdgeList

FAMILIES = ["llama", "gpt_neox", "mistral", "gemma4_shared"]  # sequential, parallel, windowed
GRANULARITIES = ["token", "head"]


@pytest.fixture(scope="session", params=FAMILIES)
def tracer(request: pytest.FixtureRequest) -> Tracer:
    return tiny_tracer(request.param)


@pytest.fixture(scope="session", params=GRANULARITIES)
def granularity(request: pytest.FixtureRequest) -> Granularity:
    return request.param


@pytest.fixture(scope="session")
def small(tracer: Tracer, granularity: Granularity) -> RouteGraph:
    """A graph whose paths can all be listed."""
    graph = tracer.trace(tiny_text(6), threshold=0.01, granularity=granularity)
    assert set(graph.edges.source[graph.edges.layer == 0].tolist()) > {graph.position}
    return graph


def random_table(
    draw: st.DrawFn, T: int, H: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> LayerTable:
    """A layer's table of T rows whose weights are sixteenths, some of them 0, and products of two
    such for heads.
    """

    def sixteenths(*shape: int) -> torch.Tensor:
        return torch.randint(0, 9, shape, generator=generator).to(dtype) / 16

    parallel = draw(st.booleans())
    row, source = torch.ones(T, T).tril().nonzero(as_tuple=True)
    head_weight = sixteenths(len(row), H) * sixteenths(len(row), 1)
    # An entry of weight 0 is padding, whatever nodes it names.
    padding = torch.zeros(2, dtype=torch.int64)
    none = head_weight.new_zeros(2, H)
    edges = EdgeList(
        torch.cat([row, padding]),
        torch.cat([source, padding + T - 1]),
        torch.cat([head_weight.sum(-1), none.sum(-1)]),
        torch.cat([head_weight, none]),
    )
    return LayerTable(
        torch.arange(T),
        sixteenths(T),
        sixteenths(T),
        None if parallel else sixteenths(T),
        edges,
        torch.randint(2, (T,), generator=generator).bool(),
        None if parallel else torch.randint(2, (T,), generator=generator).bool(),
    )


def share_values(draw: st.DrawFn, tables: list[LayerTable]) -> list[LayerTable]:
    """The tables, some of whose attention reads the values of a lower layer."""
    own, found = [], []
    for i, table in enumerate(tables):
        read = draw(st.sampled_from([None, None, *own]))
        if read is None:
            own.append(i)
        found.append(table._replace(value_layer=read))
    return found


@st.composite
def any_routes(draw: st.DrawFn) -> Routes:
    """Routes whose weights are sixteenths, so that some meet a threshold exactly."""
    T, L, H = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    tables = [random_table(draw, T, H, generator) for _ in range(L)]
    return Routes(
        tokens=[f"<{t}>" for t in range(T)],
        token_ids=torch.arange(T),
        threshold=0.0,
        granularity=draw(st.sampled_from(GRANULARITIES)),
        layers=share_values(draw, tables),
        predict=lambda positions: [[Prediction("x", t, 0.5)] for t in positions],
        scored_threshold=0.0,
    )
