"""The eager kernel against the float64 oracle, on values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_inputs import random_inputs
from tiny import tiny_model, tiny_text

from ifr_fast import Tracer
from ifr_fast.kernels import eager, reference

FLAGS = ["row_scale", "value_gate", "window", "softcap", "sinks", "alibi_slopes", "ffn"]
FLAGS += ["offset", "floor"]
SHAPES = [  # R, S, H, H_kv, K, V, D
    (1, 1, 1, 1, 1, 1, 1),
    (1, 1, 3, 1, 4, 4, 5),
    (2, 2, 2, 2, 8, 3, 17),
    (7, 63, 6, 3, 16, 8, 33),
    (63, 63, 4, 1, 8, 12, 65),
    (130, 130, 2, 2, 4, 5, 31),
    (3, 500, 4, 2, 8, 8, 40),
]
# Of importances, which are at most 1; the inputs are the same numbers in both dtypes.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-5,
    torch.float16: 1e-5,
}


def assert_scores_close(got, expected, keep, tolerance):
    """Every field, and every edge but those within the tolerance of `keep`."""
    for name in ("residual", "ffn", "head_total"):
        mine, theirs = getattr(got, name), getattr(expected, name)
        if theirs is None:
            assert mine is None
            continue
        torch.testing.assert_close(mine.double(), theirs.double(), atol=tolerance, rtol=0)
    assert torch.equal(got.unattributed, expected.unattributed)
    close_in_scale = 10 * tolerance * (1 + expected.linear.abs().max().item())
    for name in ("linear", "total"):
        mine, theirs = getattr(got, name), getattr(expected, name)
        torch.testing.assert_close(mine.double(), theirs.double(), atol=close_in_scale, rtol=0)
    total = got.residual + got.head_total.sum(-1) + (0 if got.ffn is None else got.ffn)
    torch.testing.assert_close(total, torch.ones_like(total), atol=10 * tolerance, rtol=0)

    def by_pair(edges):
        columns = (edges.row.tolist(), edges.source.tolist(), edges.weight.tolist())
        pairs = {(r, j): (w, i) for i, (r, j, w) in enumerate(zip(*columns, strict=True)) if w > 0}
        assert len(pairs) == sum(w > 0 for w in columns[2])
        return pairs

    mine, theirs = by_pair(got.edges), by_pair(expected.edges)
    for pair in mine.keys() ^ theirs.keys():
        weight, _ = mine.get(pair) or theirs[pair]
        assert abs(weight - keep) < tolerance
    both = sorted(mine.keys() & theirs.keys())
    for name in ("weight", "head_weight"):
        a = getattr(got.edges, name)[[mine[p][1] for p in both]]
        b = getattr(expected.edges, name)[[theirs[p][1] for p in both]]
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(shape, dtype, poisoned):
    inputs = random_inputs(*shape, dtype=dtype)
    expected = reference.score_attention(inputs, 0.01)
    got = eager.score_attention(inputs.to(dtype), 0.01)
    assert_scores_close(got, expected, 0.01, TOLERANCE[dtype])


@pytest.mark.parametrize("keep", [0.0, 0.03])
@pytest.mark.parametrize("flags", [*([f] for f in FLAGS), FLAGS], ids="+".join)
def test_flags(flags, keep, poisoned):
    for seed in range(3):
        inputs = random_inputs(9, 41, 4, 2, 8, 6, 19, seed=seed, flags=set(flags))
        expected = reference.score_attention(inputs, keep)
        assert_scores_close(eager.score_attention(inputs, keep), expected, keep, 1e-12)
        got = eager.score_attention(inputs.to(torch.float32), keep)
        assert_scores_close(got, expected, keep, 1e-5)


def test_log_sum_exp_replaces_the_softmax():
    inputs = random_inputs(9, 41, 4, 2, 8, 6, 19)
    k = inputs.k.repeat_interleave(2, dim=1)
    scores = torch.einsum("rhk,shk->rhs", inputs.q, k) * inputs.scale
    scores = scores.masked_fill(torch.arange(41) > inputs.rows[:, None, None], float("-inf"))
    given_sums = inputs._replace(log_sum_exp=scores.logsumexp(-1))
    expected = eager.score_attention(inputs, 0.01)
    assert_scores_close(eager.score_attention(given_sums, 0.01), expected, 0.01, 1e-12)


def test_small_blocks_and_pieces_change_nothing(monkeypatch):
    inputs = random_inputs(40, 57, 4, 2, 8, 6, 19)
    expected = eager.score_attention(inputs, 0.01)
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 500)
    monkeypatch.setattr(eager, "VISIT_ELEMENTS", 7)
    assert_scores_close(eager.score_attention(inputs, 0.01), expected, 0.01, 1e-12)


def test_devices_without_sparse_products(monkeypatch):
    inputs = random_inputs(40, 57, 4, 2, 8, 6, 19)
    expected = eager.score_attention(inputs, 0.01)
    monkeypatch.setattr(eager, "SPARSE_PRODUCTS", ())
    assert_scores_close(eager.score_attention(inputs, 0.01), expected, 0.01, 1e-12)


@pytest.mark.parametrize("keep", [0.0, 0.005, 0.03, 0.25, 1.0])
def test_padded_edges_are_the_listed_ones(keep, monkeypatch, poisoned):
    """What runs on a GPU, where no size may depend on the weights."""
    inputs = random_inputs(40, 57, 4, 2, 8, 6, 19).to(torch.float32)
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
def test_padding_is_in_no_graph(granularity, monkeypatch):
    tracer = Tracer(tiny_model("llama"), impl="eager")
    options = {"threshold": 0.05, "granularity": granularity}

    def results():
        graph, routes = (f(tiny_text(20), **options) for f in (tracer.trace, tracer.trace_all))
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


def test_rows_do_not_depend_on_each_other():
    inputs = random_inputs(57, 57, 4, 2, 8, 6, 19)
    whole = eager.score_attention(inputs, 0.01)
    rows = torch.tensor([0, 13, 14, 56])
    some = eager.score_attention(
        inputs._replace(
            rows=rows, resid_pre=inputs.resid_pre[rows], y=inputs.y[rows], q=inputs.q[rows]
        ),
        0.01,
    )
    torch.testing.assert_close(some.head_total, whole.head_total[rows], atol=1e-12, rtol=0)
    torch.testing.assert_close(some.residual, whole.residual[rows], atol=1e-12, rtol=0)


def test_permuting_heads_permutes_results():
    inputs = random_inputs(9, 41, 6, 6, 8, 6, 19)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    permuted = inputs._replace(
        q=inputs.q[:, order], k=inputs.k[:, order], v=inputs.v[:, order], W_O=inputs.W_O[order]
    )
    a, b = eager.score_attention(inputs, 0.01), eager.score_attention(permuted, 0.01)
    torch.testing.assert_close(a.head_total[:, order], b.head_total, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        a.edges.head_weight[:, order], b.edges.head_weight, atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("kernel", [eager, reference])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("parallel", [False, True])
def test_rows_without_any_attribution_are_flagged(kernel, dtype, parallel):
    """Y = 1 with parts 10 and -9: both lie farther from y than 0 does."""
    one = torch.ones(1, 1, 1, dtype=dtype)
    inputs = random_inputs(1, 1, 1, 1, 1, 1, 1)._replace(
        resid_pre=torch.full((1, 1), 10.0, dtype=dtype),
        y=torch.ones(1, 1, dtype=dtype),
        q=one,
        k=one,
        v=one * (-9 if not parallel else -5),
        W_O=one,
        ffn=torch.full((1, 1), -4.0, dtype=dtype) if parallel else None,
    )
    scores = kernel.score_attention(inputs, 0.0)
    share = 1 / (3 if parallel else 2)
    assert scores.unattributed.tolist() == [True]
    assert scores.residual.tolist() == pytest.approx([share])
    assert scores.head_total.flatten().tolist() == pytest.approx([share])
    assert scores.edges.weight.tolist() == pytest.approx([share])
    if parallel:
        assert scores.ffn.tolist() == pytest.approx([share])
    of_ffn = kernel.score_ffn(torch.full((1, 1), 10.0, dtype=dtype), torch.ones(1, 1, dtype=dtype))
    assert of_ffn.unattributed.tolist() == [True]
    assert (of_ffn.residual.tolist(), of_ffn.ffn.tolist()) == ([0.5], [0.5])


def test_unattributed_rows_within_a_window_share_among_what_they_see():
    inputs = random_inputs(1, 9, 2, 1, 2, 2, 3, flags={"window"})
    inputs = inputs._replace(
        rows=torch.tensor([8]),
        v=torch.zeros_like(inputs.v),
        resid_pre=-torch.ones(1, 3, dtype=torch.float64),
        y=torch.ones(1, 3, dtype=torch.float64),
    )
    for kernel in (eager, reference):
        scores = kernel.score_attention(inputs, 0.0)
        assert scores.unattributed.all()
        assert scores.edges.source.tolist() == [6, 7, 8]
        torch.testing.assert_close(scores.residual, torch.full((1,), 1 / 7, dtype=torch.float64))


@given(
    st.integers(0, 10_000),
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sets(st.sampled_from(FLAGS)),
    st.sampled_from([0.25, 1.0, 8.0]),
)
@settings(max_examples=80, deadline=None)
def test_agrees_with_the_oracle_on_anything(seed, S, H_kv, group, flags, size):
    R = 1 + seed % S
    inputs = random_inputs(R, S, H_kv * group, H_kv, 3, 4, 9, seed=seed, flags=flags)
    inputs = inputs._replace(v=inputs.v * size, y=inputs.y.where(inputs.y.abs() > 0.3, 0))
    expected = reference.score_attention(inputs, 0.02)
    assert_scores_close(eager.score_attention(inputs, 0.02), expected, 0.02, 1e-11)


def test_same_bits_every_time():
    inputs = random_inputs(63, 63, 4, 2, 8, 6, 19).to(torch.float32)
    first, second = (eager.score_attention(inputs, 0.01) for _ in range(2))
    assert torch.equal(first.head_total, second.head_total)
    assert torch.equal(first.edges.head_weight, second.edges.head_weight)
