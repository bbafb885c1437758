"""Rows whose weights are given, and sums of rows, against every part formed in float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_inputs import random_inputs
from torch import Tensor

from ifr_fast.errors import IfrError
from ifr_fast.kernels import eager, reference
from ifr_fast.kernels.contract import AttentionScores, LayerInputs
from ifr_fast.kernels.cpu import kernel as cpu
from ifr_fast.scoring.closure import check_closure
from ifr_fast.scoring.given_rows import given_rows, rows_closure, score_given, summed_row

FLAGS = ["row_scale", "value_gate", "window", "softcap", "sinks", "alibi_slopes", "ffn"]
KERNELS = {"reference": reference, "eager": eager, "cpu": cpu}


def parts_of(inputs: LayerInputs) -> Tensor:
    """p[h, j] of every row, [R, S, H, D], in the inputs' dtype."""
    v = inputs.v.repeat_interleave(len(inputs.W_O) // inputs.v.shape[1], dim=1)
    values = reference.attention_pattern(inputs).transpose(1, 2)[..., None] * v  # [R, S, H, V]
    if inputs.value_gate is not None:
        values = values * inputs.value_gate[:, None]
    if inputs.row_scale is not None:
        values = values * inputs.row_scale[:, None, None, None]
    return torch.einsum("rshv,hvd->rshd", values, inputs.W_O)


def proximity(part: Tensor, y: Tensor) -> Tensor:
    return (y.abs().sum(-1) - (y - part).abs().sum(-1)).clamp(min=0)


def dense(scores: AttentionScores, n_keys: int) -> Tensor:
    """Importances [R, S, H] by heads, of kept edges."""
    found = scores.head_total.new_zeros(len(scores.residual), n_keys, scores.head_total.shape[1])
    found[scores.edges.row, scores.edges.source] = scores.edges.head_weight
    return found


@pytest.mark.parametrize("kernel", ["reference", "eager", "cpu"])
@settings(deadline=None, max_examples=25)
@given(
    flags=st.sets(st.sampled_from(FLAGS)),
    R=st.integers(1, 9),
    S=st.integers(9, 23),
    seed=st.integers(0, 99),
)
def test_a_sum_of_rows_is_scored_as_all_its_parts_are(
    kernel: str, flags: set[str], R: int, S: int, seed: int
) -> None:
    inputs = random_inputs(R, S, 6, 2, 5, 7, 19, seed=seed, flags=flags)
    weights = torch.rand(R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    n_keys = int(inputs.rows[-1]) + 1
    y = weights @ inputs.y
    pairs = proximity(torch.einsum("r,rshd->shd", weights, parts_of(inputs)), y)
    residual = proximity(weights @ inputs.resid_pre, y)
    ffn = torch.zeros(()).double() if inputs.ffn is None else proximity(weights @ inputs.ffn, y)
    total = pairs.sum() + residual + ffn
    if total == 0:  # all parts get equal shares
        pairs[:n_keys], residual = 1, residual + 1
        ffn = ffn if inputs.ffn is None else ffn + 1
        total = pairs.sum() + residual + ffn

    narrow = inputs if kernel == "reference" else inputs.to(torch.float32)
    row = summed_row(narrow, weights)
    scores = score_given(KERNELS[kernel], row, inputs.rows[-1:], 0.0)
    tolerance = {"rtol": 0, "atol": 1e-12 if kernel == "reference" else 1e-5}
    torch.testing.assert_close(
        dense(scores, n_keys)[0].double(), (pairs / total)[:n_keys], **tolerance
    )
    torch.testing.assert_close(scores.residual[0].double(), residual / total, **tolerance)
    torch.testing.assert_close(scores.head_total[0].double(), (pairs / total).sum(0), **tolerance)
    if inputs.ffn is not None:
        torch.testing.assert_close(scores.ffn[0].double(), ffn / total, **tolerance)


@pytest.mark.parametrize("kernel", ["reference", "eager", "cpu", "triton"])
def test_given_rows_are_scored_as_rows_are(kernel: str) -> None:
    """Given weights of q and k give the scores of computed ones."""
    R, S, V = (5, 11, 8) if kernel == "triton" else (9, 31, 7)
    inputs = random_inputs(R, S, 4, 2, 8, V, 33, flags={"ffn", "softcap"})
    expected = reference.score_attention(inputs, 0.01)
    v = inputs.v.repeat_interleave(2, dim=1)
    u = (reference.attention_pattern(inputs).transpose(1, 2)[..., None] * v).float()
    rows = given_rows(u, *(x.float() for x in (inputs.W_O, inputs.resid_pre, inputs.y, inputs.ffn)))
    scores = score_given(loaded(kernel), rows, inputs.rows, 0.01)
    for name in ("residual", "ffn", "head_total", "linear"):
        torch.testing.assert_close(
            getattr(scores, name).double(), getattr(expected, name), rtol=0, atol=2e-5, msg=name
        )
    torch.testing.assert_close(dense(scores, S).double(), dense(expected, S), rtol=0, atol=1e-5)
    assert len(scores.edges.row) == len(expected.edges.row)


def loaded(kernel: str) -> ModuleType:
    if kernel == "triton":
        pytest.importorskip("triton")
        from ifr_fast.kernels.triton import kernel as triton

        return triton
    return KERNELS[kernel]


@pytest.mark.parametrize("kernel", ["reference", "eager", "cpu"])
@pytest.mark.parametrize("keep", [0.0, 0.4])
def test_an_unattributed_row_shares_equally_among_its_own_keys(kernel: str, keep: float) -> None:
    """All parts of row 1 point away from it, and each of its 1 + 2 H gets an equal share."""
    W_O = torch.ones(2, 1, 1)
    u = torch.zeros(2, 4, 2, 1)
    u[0, 0], u[0, 1] = -1.0, -1.0
    u[1, :3] = 1.0
    y, resid_pre = torch.tensor([[4.0], [6.0]]), torch.tensor([[-1.0], [0.0]])
    scores = score_given(
        KERNELS[kernel], given_rows(u, W_O, resid_pre, y), torch.tensor([1, 2]), keep
    )
    assert scores.unattributed.tolist() == [True, False]
    torch.testing.assert_close(scores.residual, torch.tensor([0.2, 0.0]))
    torch.testing.assert_close(scores.head_total, torch.tensor([[0.4, 0.4], [0.5, 0.5]]))
    edges = sorted(zip(*(x.tolist() for x in scores.edges[:3]), strict=True))
    first = [] if keep >= 0.4 else [(0, 0, 0.4), (0, 1, 0.4)]
    second = [] if keep >= 0.34 else [(1, j, 1 / 3) for j in range(3)]
    assert [edge[:2] for edge in edges] == [edge[:2] for edge in first + second]
    assert [e[2] for e in edges] == pytest.approx([e[2] for e in first + second], abs=1e-6)


def test_parts_that_do_not_add_up_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(4, 9, 2, 1, 3, 5, 64)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(64, generator=generator).double()
    inputs = inputs._replace(y=inputs.resid_pre + parts_of(inputs).sum((1, 2)) + bias)
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 40)  # blocks of two rows
    errors = rows_closure(inputs, bias)
    assert errors.shape == (4,)
    check_closure({0: errors})
    for row in range(4):  # each of them alone
        y = inputs.y.clone()
        y[row] += 0.01 * y[row].norm() * torch.randn(64, generator=generator).double()
        assert (rows_closure(inputs._replace(y=y), bias) > 1).nonzero().tolist() == [[row]]
    with pytest.raises(IfrError, match="layer 0"):
        check_closure({0: rows_closure(inputs, 0 * bias)})
