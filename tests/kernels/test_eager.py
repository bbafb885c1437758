"""The eager kernel's own ways: blocks, products, padded edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_grid import EAGER, F64, Case, inputs_of, oracle
from tiny import tiny_model, tiny_text

from ifr_fast import Tracer
from ifr_fast.kernels import eager

CASE = Case((40, 57, 4, 2, 8, 6, 19))


def check() -> None:
    EAGER.check(CASE, F64, 0.01)


def test_small_blocks_and_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 500)
    monkeypatch.setattr(eager, "VISIT_ELEMENTS", 7)
    check()


def test_devices_without_sparse_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "SPARSE_PRODUCTS", ())
    check()


@pytest.mark.parametrize("keep", [0.0, 0.005, 0.03, 0.25, 1.0])
@pytest.mark.usefixtures("poisoned")
def test_padded_edges_are_the_listed_ones(keep: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where no size may depend on the weights."""
    inputs = inputs_of(CASE).to(torch.float32)
    listed = eager.score_attention(inputs, keep).edges
    monkeypatch.setattr(eager, "_listed", eager._padded)
    padded = eager.score_attention(inputs, keep).edges
    assert len(padded.row) >= len(listed.row)
    assert len(padded.row) <= 40 * min(57, 1 / keep if keep else 57)
    assert (padded.head_weight[padded.weight == 0] <= keep).all()
    edge = (padded.weight != 0).nonzero().squeeze(1)
    edge = edge[(padded.row * 57 + padded.source)[edge].argsort()]
    for mine, theirs in zip(padded, listed, strict=True):
        assert torch.equal(mine[edge], theirs)


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_padding_is_in_no_graph(granularity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer(tiny_model("llama"), impl="eager")
    options: dict[str, Any] = {"threshold": 0.05, "granularity": granularity}

    def results() -> tuple[list[Any], list[Any]]:
        graph = tracer.trace(tiny_text(20), **options)
        routes = tracer.trace_all(tiny_text(20), **options)
        scores = next(tracer.contributions(tiny_text(20), keep=0.05))
        of_routes = [routes.head_frequency(), routes.head_importance(), routes.ffn_importance()]
        return [
            *graph.edges, *graph.head_edges, *routes[7].head_edges,
            *scores.token_edges, *scores.head_edges,
        ], of_routes  # fmt: skip

    expected = results()
    monkeypatch.setattr(eager, "_listed", eager._padded)
    got = results()
    for mine, theirs in zip(got[0], expected[0], strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(got[1], expected[1], strict=True):  # sums in another order
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_rows_in_float64() -> None:
    assert eager.score_attention(inputs_of(CASE), 0.01).residual.dtype == F64
    assert oracle(CASE, 0.01).residual.dtype == F64
