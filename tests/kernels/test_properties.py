"""Properties that every kernel has, beside agreeing with the oracle on the grid."""

from __future__ import annotations

import pytest
import torch
from kernel_grid import (
    BF16,
    F16,
    F32,
    F64,
    Case,
    Implementation,
    assert_bits_equal,
    every,
    inputs_of,
    log_sum_exp,
    oracle,
)
from random_inputs import random_inputs

from ifr_fast.kernels import eager, reference
from ifr_fast.kernels.contract import LayerInputs
from ifr_fast.kernels.rows import block_of

PLAIN = Case((9, 30, 6, 3, 8, 8, 33))
TEXT = Case((21, 21, 6, 3, 8, 8, 33))  # every row of it


@every()
def test_keep_selects_edges_strictly_above_it(impl: Implementation) -> None:
    everything = impl.of(inputs_of(PLAIN))
    for keep in (0.02, 0.3, 1.0):
        kept = impl.of(inputs_of(PLAIN), keep)
        above = everything.edges.weight > keep
        assert 0 <= above.sum() < len(above)
        for a, b in zip(kept.edges, everything.edges, strict=True):
            assert torch.equal(a, b[above])


def all_from_one_key(seed: int) -> LayerInputs:
    """A row that is the sum of its heads' parts, of its own position: the sum of their importances
    is 1, and rounding puts it above 1 for some seeds.
    """
    inputs = random_inputs(1, 1, 24, 1, 4, 8, 33, seed=seed, dtype=F32)
    y = torch.einsum("v,hvd->d", inputs.v[0, 0], inputs.W_O)[None]
    return inputs._replace(resid_pre=torch.zeros_like(y), y=y)


@every()
def test_no_sum_of_importances_is_above_one(impl: Implementation) -> None:
    weights = []
    for seed in range(9):
        scores = impl.of(all_from_one_key(seed), 0.0)
        weights += [scores.edges.weight.item(), scores.head_total.max().item()]
        assert scores.edges.head_weight.max() <= 1
        if max(weights[-2:]) == 1:  # perhaps cut off
            assert len(impl.of(all_from_one_key(seed), 1.0).edges.weight) == 0
    assert max(weights) == 1


@every()
def test_same_bits_every_time(impl: Implementation) -> None:
    dtype = BF16 if impl.name == "triton" else F32
    case = Case((20, 50, 4, 2, 8, 16, 70), half=dtype == BF16)
    first, second = (impl.of(inputs_of(case), 0.01, dtype) for _ in range(2))
    assert_bits_equal(first, second)


@every()
def test_rows_do_not_depend_on_each_other(impl: Implementation) -> None:
    pick = torch.tensor([0, 3, 13, 14, 20])
    got = impl.of(block_of(inputs_of(TEXT), pick), 0.01)
    everything = impl.of(inputs_of(TEXT), 0.01)
    for name in ("residual", "head_total"):
        a, b = getattr(got, name), getattr(everything, name)[pick]
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for i, row in enumerate(pick):
        a, b = got.edges.row == i, everything.edges.row == row
        assert torch.equal(got.edges.source[a], everything.edges.source[b])


@every()
def test_permuting_kv_groups_permutes_heads(impl: Implementation) -> None:
    inputs, groups = inputs_of(PLAIN), torch.tensor([2, 0, 1])
    heads = torch.tensor([4, 5, 0, 1, 2, 3])
    permuted = inputs._replace(
        q=inputs.q[:, heads], k=inputs.k[:, groups], v=inputs.v[:, groups], W_O=inputs.W_O[heads]
    )
    a, b = impl.of(inputs), impl.of(permuted)
    torch.testing.assert_close(b.head_total, a.head_total[:, heads])
    torch.testing.assert_close(
        b.edges.head_weight, a.edges.head_weight[:, heads], rtol=0, atol=1e-5
    )


@every()
def test_strided_views(impl: Implementation) -> None:
    inputs = inputs_of(PLAIN).to(F32)
    strided = inputs._replace(
        q=inputs.q.transpose(0, 1).contiguous().transpose(0, 1),
        k=inputs.k.transpose(0, 1).contiguous().transpose(0, 1),
        v=torch.cat([inputs.v, inputs.v], -1)[..., 8:],
        W_O=inputs.W_O.transpose(1, 2).contiguous().transpose(1, 2),
        y=torch.cat([inputs.y, inputs.y], -1)[:, 33:],
        resid_pre=inputs.resid_pre.T.contiguous().T,
    )
    got, expected = impl.of(strided, 0.01), impl.of(inputs, 0.01)
    if impl.bits:
        assert_bits_equal(got, expected)
    else:
        impl.assert_close(got, oracle(PLAIN, 0.01), 30, keep=0.01)


@every()
@pytest.mark.usefixtures("poisoned")
def test_log_sum_exp_of_the_forward_pass(impl: Implementation) -> None:
    inputs = inputs_of(PLAIN)
    impl.assert_close(impl.of(inputs._replace(log_sum_exp=log_sum_exp(inputs))), oracle(PLAIN), 30)


@every()
@pytest.mark.usefixtures("poisoned")
def test_degenerate_values(impl: Implementation) -> None:
    case = Case((20, 20, 4, 2, 8, 8, 48))
    inputs = inputs_of(case)
    y, W_O, v = inputs.y.clone(), inputs.W_O.clone(), inputs.v.clone()
    y[:, ::3] = 0.0
    y[:, 1::3] *= -0.0
    W_O[1] = 0
    W_O[:, :, 5] = 0
    v[3] = 0
    row_scale = torch.ones(20, dtype=F64)
    row_scale[4], row_scale[5] = 0, -1
    inputs = inputs._replace(y=y, W_O=W_O, v=v)
    for x in (inputs, inputs._replace(row_scale=row_scale)):
        impl.assert_close(impl.of(x), reference.score_attention(x, 0.0), 20)


REFERENCE = Implementation(
    "reference", reference.score_attention, reference.score_ffn, {F64: 0, F32: 0}, (0, 0)
)


def parts_away_from_y(parallel: bool) -> LayerInputs:
    """y = 1 with parts 10 and -9 (or 10, -5 and -4): both lie farther from y than 0 does."""
    one = torch.ones(2, 1, 1, dtype=F64)
    return LayerInputs(
        rows=torch.tensor([0, 1]),
        resid_pre=10 * one[:, 0],
        y=one[:, 0],
        q=0 * one,
        k=0 * one,
        v=(-5 if parallel else -9) * one,
        W_O=one[:1],
        scale=1.0,
        ffn=-4 * one[:, 0] if parallel else None,
    )


@every()
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_rows_without_any_attribution_are_flagged(impl: Implementation, parallel: bool) -> None:
    inputs = parts_away_from_y(parallel)
    for of in (impl, REFERENCE):
        for dtype in of.tolerance.keys() & {F64, F32}:
            scores = of.of(inputs, 0.01, dtype)
            assert scores.unattributed.all()
            shares = torch.tensor([1 / 3, 1 / 4] if parallel else [1 / 2, 1 / 3], dtype=dtype)
            torch.testing.assert_close(scores.residual, shares)
            if parallel:
                torch.testing.assert_close(scores.ffn, shares)
            torch.testing.assert_close(scores.head_total[:, 0], shares * torch.tensor([1, 2]))
            assert scores.edges.row.tolist() == [0, 1, 1]
            assert scores.edges.source.tolist() == [0, 0, 1]
            torch.testing.assert_close(scores.edges.weight, shares[[0, 1, 1]])
            torch.testing.assert_close(scores.edges.head_weight[:, 0], scores.edges.weight)
            ffn = of.score_ffn(inputs.resid_pre.to(dtype), inputs.y.to(dtype))
            assert ffn.unattributed.all()
            assert ffn.residual.tolist() == ffn.ffn.tolist() == [0.5, 0.5]


@every()
def test_unattributed_rows_within_a_window_share_among_what_they_see(impl: Implementation) -> None:
    inputs = random_inputs(1, 9, 2, 1, 2, 2, 3, flags={"window"})
    inputs = inputs._replace(
        rows=torch.tensor([8]),
        v=torch.zeros_like(inputs.v),
        resid_pre=-torch.ones(1, 3, dtype=F64),
        y=torch.ones(1, 3, dtype=F64),
    )
    for of in (impl, REFERENCE):
        scores = of.of(inputs)
        assert scores.unattributed.all()
        assert scores.edges.source.tolist() == [6, 7, 8]
        torch.testing.assert_close(scores.residual, torch.tensor([1 / 7]))


@every("cpu", "triton")
def test_no_rows(impl: Implementation) -> None:
    scores = impl.of(inputs_of(Case((0, 5, 2, 1, 4, 4, 9))), 0.01)
    assert scores.residual.shape == (0,)
    assert scores.head_total.shape == (0, 2)
    assert scores.edges.head_weight.shape == (0, 2)
    assert impl.score_ffn(*torch.empty(2, 0, 9)).ffn.shape == (0,)


@every("cpu")
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision_is_scored_in_float32(impl: Implementation, dtype: torch.dtype) -> None:
    got = impl.of(inputs_of(Case((9, 30, 6, 3, 8, 8, 33), half=True)), 0.0, dtype)
    assert got.residual.dtype == got.edges.weight.dtype == F32


def test_eager_scores_half_precision_in_float32() -> None:
    inputs = inputs_of(Case((9, 30, 6, 3, 8, 8, 33), half=True))
    assert eager.score_attention(inputs.to(F16), 0.0).residual.dtype == F32
