"""Comparison of two graphs, bit by bit or within a tolerance."""

from __future__ import annotations

import dataclasses

import torch
from oracle import TOLERANCE, LayerImportance

from ifr_fast import RouteGraph
from ifr_fast.scoring.scores import LayerScores


def assert_same_bits(got: RouteGraph, expected: RouteGraph) -> None:
    for field in dataclasses.fields(RouteGraph):
        mine, theirs = getattr(got, field.name), getattr(expected, field.name)
        if isinstance(theirs, torch.Tensor):
            mine, theirs = [mine], [theirs]
        if field.name in ("edges", "head_edges") or isinstance(theirs, list | tuple):
            assert len(mine) == len(theirs), field.name
            for a, b in zip(mine, theirs, strict=True):
                if isinstance(b, torch.Tensor):
                    assert a.dtype == b.dtype, field.name
                    assert torch.equal(a, b), field.name
                else:
                    assert a == b, field.name
                    assert type(a) is type(b), field.name
        else:
            assert mine == theirs, field.name
            assert type(mine) is type(theirs), field.name


def assert_same_graph(got: RouteGraph, expected: RouteGraph, tolerance: float = 1e-6) -> None:
    """The same structure, and weights within the tolerance."""
    for name in ("edges", "head_edges"):
        mine, theirs = getattr(got, name), getattr(expected, name)
        for column in mine._fields:
            a, b = getattr(mine, column), getattr(theirs, column)
            if column == "weight":
                torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
            else:
                assert torch.equal(a, b), (name, column)
    for name in ("position", "threshold", "granularity", "n_layers", "n_heads", "tokens"):
        assert getattr(got, name) == getattr(expected, name), name
    assert got.unattributed == expected.unattributed
    assert torch.equal(got.parallel, expected.parallel)
    assert torch.equal(got.token_ids, expected.token_ids)


def assert_within(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """All elements agree, and none is NaN. torch's own assertion takes ten times as long."""
    assert mine.shape == theirs.shape
    error = float((mine.double() - theirs.double()).abs().max())
    assert error <= tolerance, error


def assert_agree(scores: LayerScores, layer: LayerImportance) -> None:
    rows, close = scores.rows, assert_within
    close(scores.residual, layer.residual[rows])
    close(scores.ffn, layer.ffn[rows])
    assert (scores.ffn_residual is None) == (layer.ffn_residual is None)
    if scores.ffn_residual is not None:
        close(scores.ffn_residual, layer.ffn_residual[rows])
    dense = torch.zeros_like(layer.heads)
    head, target, source, weight = scores.head_edges
    dense[head, target, source] = weight.double()
    close(dense[:, rows], layer.heads[:, rows])
    close(scores.head_total, layer.heads[:, rows].sum(-1).T)
    total = scores.residual + scores.head_total.sum(-1)
    if scores.ffn_residual is None:
        total = total + scores.ffn
    close(total, torch.ones(len(rows), dtype=torch.float64))
    assert not scores.unattributed.any()
