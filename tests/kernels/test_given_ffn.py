"""Two given parts of a node against the oracle's proximities in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ifr_fast.kernels import given_ffn, reference
from ifr_fast.kernels.given_ffn import score_given_ffn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "D"), [(0, 5), (1, 1), (7, 33), (130, 64)])
def test_agrees_with_the_oracle(R: int, D: int, dtype: torch.dtype) -> None:
    residual, ffn, bias = torch.randn(3, R, D, generator=torch.Generator().manual_seed(R + D))
    y = residual + ffn + bias
    got = score_given_ffn(*(x.to(dtype) for x in (residual, ffn, y)))
    assert got.residual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = [x.to(dtype).double() for x in (residual, ffn, y)]
    of_residual, of_ffn = (reference.proximity(part, exact[2]) for part in exact[:2])
    total = of_residual + of_ffn
    torch.testing.assert_close(got.unattributed, total == 0)
    for mine, theirs in ((got.residual, of_residual), (got.ffn, of_ffn)):
        expected = torch.where(total == 0, 0.5, theirs / total)
        torch.testing.assert_close(mine.double(), expected, rtol=0, atol=1e-5)


@given(
    R=st.integers(1, 9),
    D=st.integers(1, 20),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_importances_sum_to_one(R: int, D: int, dtypes: tuple[torch.dtype, ...], seed: int) -> None:
    parts = torch.randn(3, R, D, generator=torch.Generator().manual_seed(seed))
    got = score_given_ffn(*(x.to(dtype) for x, dtype in zip(parts, dtypes, strict=True)))
    assert ((got.residual + got.ffn - 1).abs() < 1e-6).all()
    assert (got.residual >= 0).all()
    assert (got.ffn >= 0).all()


def test_without_a_bias_it_is_the_kernels_own() -> None:
    residual, ffn = torch.randn(2, 9, 40, dtype=torch.float64)
    got = score_given_ffn(residual, ffn, residual + ffn)
    for mine, theirs in zip(got, reference.score_ffn(residual, residual + ffn), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_nothing_is_attributed_where_all_proximities_are_0() -> None:
    y = torch.ones(3, 4)
    got = score_given_ffn(-y, -2 * y, y)
    assert got.unattributed.all()
    assert (got.residual == 0.5).all()
    assert (got.ffn == 0.5).all()


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = torch.randn(3, 50, 7)
    whole = score_given_ffn(*parts)
    monkeypatch.setattr(given_ffn, "BLOCK_ELEMENTS", 21)
    for mine, theirs in zip(score_given_ffn(*parts), whole, strict=True):
        assert torch.equal(mine, theirs)
