"""Copies and pickles of graphs and routes hold data alone: no model and no cached results."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from opened import tiny_tracer
from same_graph import assert_same_bits
from tiny import tiny_text

from ifr_fast import RouteGraph, Routes


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def routes(request: pytest.FixtureRequest) -> Routes:
    return tiny_tracer(request.param).trace_all(tiny_text(12), threshold=0.02)


def compute_all(graph: RouteGraph) -> None:
    graph.token_importance()
    graph.head_importance()
    graph.top_paths(3)
    graph.reach(0)
    graph.prune(0.1)


def test_pickled_routes_hold_no_model(routes: Routes) -> None:
    routes.head_importance()
    routes.reach(0)
    data = pickle.dumps(routes)
    assert b"transformers" not in data
    assert b"Decoder" not in data
    again = pickle.loads(data)
    assert abs(len(pickle.dumps(again)) - len(data)) < 100
    predictions = routes.predict(list(range(len(routes))))
    for t in range(len(routes)):
        assert again[t].predictions == predictions[t]
        for mine, theirs in zip(again[t].edges, routes[t].edges, strict=True):
            assert torch.equal(mine, theirs)
    assert torch.equal(again.head_importance(), routes.head_importance())
    assert torch.equal(again.head_frequency(), routes.head_frequency())


def test_pickled_routes_are_about_as_large_as_their_tensors(routes: Routes) -> None:
    held = sum(
        x.nbytes
        for table in routes.layers
        for x in (*table._replace(edges=None), *table.edges)
        if x is not None
    )
    assert len(pickle.dumps(routes)) < 3 * held + 40_000


def test_a_copy_of_a_graph_stays_small(routes: Routes) -> None:
    fresh = routes[-1]
    size = len(pickle.dumps(copy.deepcopy(fresh)))
    used = routes[-1]
    compute_all(used)
    copied = copy.deepcopy(used)
    assert set(vars(copied)) == set(vars(fresh))
    assert len(pickle.dumps(copied)) == size
    assert len(pickle.dumps(used)) == size
    assert_same_bits(copied, fresh)
    assert copied.edges.weight.data_ptr() != used.edges.weight.data_ptr()


def test_copies_of_routes_share_the_model(routes: Routes) -> None:
    copied = copy.deepcopy(routes)
    assert copied.predict is routes.predict
    assert copied[3].predictions == routes[3].predictions
    assert_same_bits(copied[3], routes[3])
