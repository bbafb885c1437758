"""The identity behind the kernels, and the breakpoint argument (kernels/breakpoints.py)."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ifr_fast.kernels import eager
from ifr_fast.kernels.breakpoints import breakpoints, column_norms, signs, value_space_signs
from ifr_fast.kernels.reference import proximity

value = st.one_of(
    st.just(0.0),
    st.just(-0.0),
    st.floats(-8, 8).map(lambda x: round(x * 1024) / 1024),
)


@st.composite
def node_and_part(draw):
    """Y and a part: unrelated, equal, opposite, a multiple, larger, zero."""
    y = torch.tensor(draw(st.lists(value, min_size=1, max_size=12)), dtype=torch.float64)
    how = draw(st.sampled_from(["any", "equal", "opposite", "twice", "half", "large", "zero"]))
    if how == "any":
        p = torch.tensor(
            draw(st.lists(value, min_size=len(y), max_size=len(y))), dtype=torch.float64
        )
    else:
        factor = {"equal": 1, "opposite": -1, "twice": 2, "half": 0.5, "large": 64, "zero": 0}[how]
        p = y * factor
    return y, p


@given(node_and_part())
@settings(max_examples=500, deadline=None)
def test_norm_difference_is_lin_minus_correction(pair):
    y, p = pair
    s = signs(y)
    assert set(s.tolist()) <= {1.0, -1.0}
    lin = (s * p).sum()
    correction = 2 * (s * p - y.abs()).clamp(min=0).sum()
    difference = y.abs().sum() - (y - p).abs().sum()
    # Dyadic values: every sum is exact.
    assert difference == lin - correction
    assert correction >= 0
    if lin <= 0:
        assert proximity(p, y) == 0


def test_signs_of_zeros():
    assert signs(torch.tensor([0.0, -0.0, 1e-40, -1e-40])).tolist() == [1, 1, 1, -1]


@given(st.integers(0, 10_000), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_only_coordinates_past_their_breakpoint_flip(seed, dead, zeros):
    g = torch.Generator().manual_seed(seed)
    H, V, D, S = 2, 3, 7, 5
    W_O = torch.randn(H, V, D, generator=g, dtype=torch.float64)
    if dead:
        W_O[:, :, ::2] = 0  # coordinates that no part of these heads can move
    y = torch.randn(1, D, generator=g, dtype=torch.float64)
    if zeros:
        y[:, ::3] = 0
    v = torch.randn(S, V, generator=g, dtype=torch.float64) * 3
    points = breakpoints(y, column_norms(W_O))
    assert not points.isnan().any()
    s = signs(y)
    lin = torch.einsum("hrv,sv->hs", value_space_signs(W_O, s), v)
    for h in range(H):
        parts = v @ W_O[h]  # [S, D]
        flips = s * parts > y.abs()
        a = torch.linalg.vector_norm(v, dim=-1)
        assert not (flips & (a[:, None] <= points[h])).any()
        torch.testing.assert_close(lin[h], (parts * s).sum(-1), rtol=1e-12, atol=1e-12)
        below = a < points[h].min()
        torch.testing.assert_close(
            proximity(parts[below], y), lin[h][below].clamp(min=0), rtol=1e-12, atol=1e-12
        )


@given(node_and_part(), node_and_part())
@settings(max_examples=200, deadline=None)
def test_ffn_importances_sum_to_one(first, second):
    D = min(len(first[0]), len(second[0]))
    mid = torch.stack([first[0][:D], second[0][:D]])
    post = torch.stack([first[1][:D], second[1][:D]])
    scores = eager.score_ffn(mid, post)
    torch.testing.assert_close(
        scores.residual + scores.ffn, torch.ones(2, dtype=torch.float64), rtol=1e-12, atol=0
    )
    flat = (proximity(mid, post) == 0) & (proximity(post - mid, post) == 0)
    assert torch.equal(scores.unattributed, flat)
    assert (scores.ffn[flat] == 0.5).all()
