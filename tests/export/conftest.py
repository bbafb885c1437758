from __future__ import annotations

import dataclasses

import pytest
import torch
from hostile import HOSTILE, N_TOKENS, VOCABULARY, trace, tracer

from ifr_fast.graph.tables import EdgeKind, Node, NodeKind, Prediction
from ifr_fast.routes.route_graph import RouteGraph


@pytest.fixture(scope="session", params=["sequential", "parallel"])
def parallel(request: pytest.FixtureRequest) -> bool:
    return request.param == "parallel"


@pytest.fixture(scope="session", params=["token", "head"])
def graph(request: pytest.FixtureRequest, parallel: bool) -> RouteGraph:
    found = trace(parallel, request.param)
    assert {EdgeKind.ATTENTION, EdgeKind.FFN} <= set(found.edges.kind.tolist())
    return found


@pytest.fixture(scope="session")
def hostile() -> RouteGraph:
    graph = trace(False)
    predictions = [
        Prediction(token, i, p.probability)
        for i, (token, p) in enumerate(zip(HOSTILE, graph.predictions, strict=False))
    ]
    unattributed = [
        Node(graph.n_layers - 1, NodeKind.POST, graph.position),
        Node(graph.n_layers - 1, NodeKind.MID, graph.position),
    ]
    return dataclasses.replace(
        graph, tokens=HOSTILE, predictions=predictions, unattributed=unattributed
    )


@pytest.fixture(scope="session", params=["sequential", "parallel", "span", "hostile"])
def any_graph(request: pytest.FixtureRequest) -> RouteGraph:
    if request.param == "span":
        ids = torch.randint(VOCABULARY, (N_TOKENS,), generator=torch.Generator().manual_seed(5))
        return tracer(False, 4).trace(
            ids, position=[3, 8, 13], position_weights=[1, 2, 5], threshold=0.01
        )
    found = trace(request.param == "parallel")
    return dataclasses.replace(found, tokens=HOSTILE) if request.param == "hostile" else found
