"""The Triton kernels against the float64 oracle: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import assert_graph_agrees, importances
from random_inputs import random_inputs
from tiny import account, tiny_model, tiny_text
from torch import Tensor

from ifr_fast import Tracer
from ifr_fast.kernels import breakpoints, reference
from ifr_fast.kernels.contract import AttentionScores, LayerInputs, visible

pytest.importorskip("triton")

from ifr_fast.kernels.triton import (
    compact,
    correct,
    kernel,
    linear,
    lists,
    prepare,
    proximity,
    reach,
    room,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}  # of importances
FLAGS = ["window", "softcap", "sinks", "alibi_slopes", "row_scale", "value_gate", "ffn"]
FLAGS += ["offset", "floor"]
SHAPES = [  # R, S, H, H_kv, K, V, D
    (1, 1, 1, 1, 4, 4, 5),
    (2, 2, 6, 3, 8, 10, 33),
    (7, 7, 6, 1, 8, 16, 24),
    (17, 17, 3, 3, 5, 3, 17),
    (35, 67, 3, 1, 24, 40, 70),
    (3, 131, 4, 2, 12, 40, 165),
]


def make_inputs(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    flags: set[str] | frozenset[str] = frozenset(),
) -> LayerInputs:
    """Float64 inputs (R, S, H, H_kv, K, V, D) whose values `dtype` can hold."""
    inputs = random_inputs(*shape, seed=seed, dtype=dtype, flags=flags)
    return inputs.to(dtype).to(torch.float64)


def on_device(inputs: LayerInputs, dtype: torch.dtype = torch.float32) -> LayerInputs:
    """The inputs in `dtype`, on the device; rows stay on the CPU."""
    moved: dict[str, Any] = {
        name: x.to(DEVICE)
        for name, x in inputs.to(dtype)._asdict().items()
        if isinstance(x, Tensor) and name != "rows"
    }
    return inputs._replace(**moved)


def score(
    inputs: LayerInputs, keep: float = 0.0, dtype: torch.dtype = torch.float32
) -> AttentionScores:
    """What the kernels make of the inputs, on the CPU, without the padding of edges."""
    scores = kernel.score_attention(on_device(inputs, dtype), keep)
    assert all(not x.dtype.is_floating_point or x.dtype == torch.float32 for x in scores.edges)
    used = scores.edges.weight != 0
    assert (scores.edges.head_weight[~used] == 0).all()
    edges = scores.edges._make(x[used].cpu() for x in scores.edges)
    return AttentionScores(
        *(x if x is None or isinstance(x, tuple) else x.cpu() for x in scores._replace(edges=edges))
    )


def dense(scores: AttentionScores, S: int) -> Tensor:
    """Head importances [R, H, S] of a result that kept every edge."""
    R, H = scores.head_total.shape
    out = scores.head_total.new_zeros(R, H, S)
    out[scores.edges.row, :, scores.edges.source] = scores.edges.head_weight
    return out


def assert_scores_close(
    got: AttentionScores, expected: AttentionScores, S: int, tolerance: float
) -> None:
    """All values, edges by their (row, source); both results kept every edge with weight > 0."""
    assert torch.equal(got.unattributed, expected.unattributed)
    atol = tolerance * (1 + expected.linear.abs().max().item())
    for name in ("linear", "total"):
        a, b = getattr(got, name), getattr(expected, name)
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=atol, msg=name)
    for name in ("residual", "ffn", "head_total"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance, msg=name)
    torch.testing.assert_close(
        dense(got, S).double(), dense(expected, S).double(), rtol=0, atol=tolerance
    )
    torch.testing.assert_close(
        got.edges.weight, got.edges.head_weight.sum(-1), rtol=1e-4, atol=1e-6
    )
    order = got.edges.row * S + got.edges.source
    assert (order.diff() > 0).all(), "edges must ascend by row, then source"
    total = got.residual + got.head_total.sum(-1)
    if got.ffn is not None:
        total = total + got.ffn
    torch.testing.assert_close(total, torch.ones_like(total))


def check(inputs: LayerInputs, dtype: torch.dtype = torch.float32) -> AttentionScores:
    """Scores the inputs and compares with the oracle; gives the oracle's."""
    S, expected = inputs.k.shape[0], reference.score_attention(inputs, 0.0)
    assert_scores_close(score(inputs, dtype=dtype), expected, S, TOLERANCE[dtype])
    return expected


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_agrees_with_the_oracle(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(make_inputs(*shape, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.usefixtures("poisoned")
def test_every_flag_agrees_with_the_oracle(flag: str, dtype: torch.dtype) -> None:
    check(make_inputs(9, 41, 4, 2, 8, 10, 70, dtype=dtype, flags={flag}), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_all_flags_together(dtype: torch.dtype) -> None:
    check(make_inputs(20, 70, 6, 2, 8, 10, 33, dtype=dtype, flags=set(FLAGS)), dtype)


@pytest.mark.parametrize(("R", "S", "window"), [(40, 80, 1), (40, 80, 33), (3, 200, 70)])
@pytest.mark.usefixtures("poisoned")
def test_windows(R: int, S: int, window: int) -> None:
    check(make_inputs(R, S, 2, 1, 8, 8, 40)._replace(window=window))


@pytest.mark.usefixtures("poisoned")
def test_a_frontier_shares_out_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, own = [], linear.launch

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        launched.append((kernel.__name__, grid))
        own(kernel, grid, *args, **kwargs)

    monkeypatch.setattr(linear, "launch", launch)
    inputs = make_inputs(2, 400, 3, 1, 8, 8, 40, flags={"sinks"})
    check(inputs)
    last = int(inputs.rows[-1])
    assert last > 128
    assert dict(launched)["log_sum_exp_kernel"] == (1, 3, last // 32 + 1)
    assert dict(launched)["linear_kernel"] == (1, last // 64 + 1)


def test_log_sum_exp_of_the_forward_pass() -> None:
    inputs = make_inputs(20, 50, 6, 3, 8, 8, 30)
    assert_scores_close(
        score(inputs._replace(log_sum_exp=log_sum_exp(inputs))),
        reference.score_attention(inputs, 0.0),
        50,
        TOLERANCE[torch.float32],
    )


def log_sum_exp(inputs: LayerInputs) -> Tensor:
    """[R, H], of inputs without flags."""
    H = inputs.q.shape[1]
    S, H_kv, _ = inputs.k.shape
    k = inputs.k.repeat_interleave(H // H_kv, dim=1)
    scores = torch.einsum("rhk,shk->rhs", inputs.q, k) * inputs.scale
    mask = visible(inputs.rows, S, None)[:, None]
    return scores.masked_fill(~mask, -math.inf).logsumexp(-1)


@pytest.mark.parametrize("keep", [0.02, 0.3, 1.0])
def test_keep_selects_edges_strictly_above_it(keep: float) -> None:
    inputs = make_inputs(20, 30, 6, 3, 8, 8, 30)
    everything, kept = score(inputs), score(inputs, keep)
    above = everything.edges.weight > keep
    assert 0 <= above.sum() < len(above)
    for a, b in zip(kept.edges, everything.edges, strict=True):
        assert torch.equal(a, b[above])
    padded = kernel.score_attention(on_device(inputs), keep).edges
    assert len(padded.row) == 20 * min(30, int(1 / keep))


@pytest.mark.usefixtures("poisoned")
def test_lists_hold_every_pair_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a line's pairs need a correction, most of them more than the candidates give."""
    inputs = make_inputs(20, 40, 2, 1, 8, 8, 120)
    inputs = inputs._replace(
        q=inputs.q / 4, v=inputs.v.abs() + 0.1, W_O=inputs.W_O.abs() + 0.1, y=inputs.y.abs() / 1000
    )
    inputs = inputs.to(torch.float32).to(torch.float64)
    counts: list[Tensor] = []
    own = lists.lists

    def watched(x: dict[str, Any]) -> None:
        own(x)
        counts.append(x["p_counts"])

    monkeypatch.setattr(lists, "lists", watched)
    monkeypatch.setitem(kernel.TILES, "N", 16)
    check(inputs)
    n_light, n_heavy = counts[0][1:].cpu()
    assert torch.equal(n_light + n_heavy, (inputs.rows + 1)[:, None].expand(20, 2).to(torch.int32))
    assert n_heavy.sum() > n_light.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flags", [set(), {"row_scale"}, {"value_gate", "row_scale"}], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_both_tiers_of_corrections(
    dtype: torch.dtype, flags: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few and many heavy pairs a block of rows, of lines with light ones too."""
    monkeypatch.setitem(kernel.TILES, "N", 16)
    monkeypatch.setattr(correct, "SHARES", 2)
    check(make_inputs(30, 90, 3, 1, 8, 20, 200, dtype=dtype, flags=flags), dtype)


@pytest.mark.usefixtures("poisoned")
def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "WORK_BYTES", 1)
    check(make_inputs(37, 45, 4, 2, 8, 8, 33, flags={"row_scale", "value_gate", "ffn"}))


def test_same_bits_every_time() -> None:
    inputs = make_inputs(20, 50, 4, 2, 8, 16, 70, dtype=torch.bfloat16)
    first, second = (score(inputs, 0.01, torch.bfloat16) for _ in range(2))
    for name in ("residual", "head_total", "unattributed"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    for a, b in zip(first.edges, second.edges, strict=True):
        assert torch.equal(a, b)


def test_strided_views() -> None:
    inputs = on_device(make_inputs(20, 30, 6, 3, 8, 8, 33))
    strided = inputs._replace(
        q=inputs.q.transpose(0, 1).contiguous().transpose(0, 1),
        k=inputs.k.transpose(0, 1).contiguous().transpose(0, 1),
        v=torch.cat([inputs.v, inputs.v], -1)[..., 8:],
        W_O=inputs.W_O.transpose(1, 2).contiguous().transpose(1, 2),
        y=torch.cat([inputs.y, inputs.y], -1)[:, 33:],
        resid_pre=inputs.resid_pre.T.contiguous().T,
    )
    expected = kernel.score_attention(inputs, 0.01)
    got = kernel.score_attention(strided, 0.01)
    assert torch.equal(got.head_total, expected.head_total)
    for a, b in zip(got.edges, expected.edges, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("poisoned")
def test_unattributed_rows() -> None:
    # y = 1 with parts 10 and -9: both overshoot or oppose, all proximities are 0.
    one = torch.ones(2, 1)
    inputs = LayerInputs(
        rows=torch.tensor([0, 1]),
        resid_pre=10 * one,
        y=one,
        q=torch.zeros(2, 1, 1),
        k=torch.zeros(2, 1, 1),
        v=-9 * torch.ones(2, 1, 1),
        W_O=torch.ones(1, 1, 1),
        scale=1.0,
    )
    scores = score(inputs, 0.01)
    assert scores.unattributed.all()
    torch.testing.assert_close(scores.residual, torch.tensor([1 / 2, 1 / 3]))
    torch.testing.assert_close(scores.head_total[:, 0], torch.tensor([1 / 2, 2 / 3]))
    assert scores.edges.row.tolist() == [0, 1, 1]
    assert scores.edges.source.tolist() == [0, 0, 1]
    torch.testing.assert_close(scores.edges.weight, torch.tensor([1 / 2, 1 / 3, 1 / 3]))
    torch.testing.assert_close(scores.edges.head_weight[:, 0], scores.edges.weight)

    ffn = kernel.score_ffn((10 * one).to(DEVICE), one.to(DEVICE))
    assert ffn.unattributed.all()
    assert ffn.residual.tolist() == ffn.ffn.tolist() == [0.5, 0.5]


@pytest.mark.usefixtures("poisoned")
def test_degenerate_values() -> None:
    inputs = make_inputs(20, 20, 4, 2, 8, 8, 48)
    y, W_O, v = inputs.y.clone(), inputs.W_O.clone(), inputs.v.clone()
    y[:, ::3] = 0.0
    y[:, 1::3] *= -0.0
    W_O[1] = 0
    W_O[:, :, 5] = 0
    v[3] = 0
    row_scale = torch.ones(20, dtype=torch.float64)
    row_scale[4], row_scale[5] = 0, -1
    check(inputs._replace(y=y, W_O=W_O, v=v, row_scale=row_scale))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("R", "D"), [(1, 1), (7, 33), (5, 1100)])
@pytest.mark.usefixtures("poisoned")
def test_ffn_agrees_with_the_oracle(R: int, D: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    mid = torch.randn(R, D, generator=g).to(dtype)
    post = (mid + torch.randn(R, D, generator=g)).to(dtype)
    got = kernel.score_ffn(mid.to(DEVICE), post.to(DEVICE))
    expected = reference.score_ffn(mid.double(), post.double())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), b.double(), rtol=0, atol=1e-5)


def test_no_rows() -> None:
    scores = kernel.score_attention(on_device(make_inputs(0, 5, 2, 1, 4, 4, 9)), 0.01)
    assert scores.residual.shape == (0,)
    assert scores.head_total.shape == (0, 2)
    assert scores.edges.head_weight.shape == (0, 2)
    assert kernel.score_ffn(*torch.empty(2, 0, 9, device=DEVICE)).ffn.shape == (0,)


def test_refuses_what_it_cannot_read() -> None:
    inputs = on_device(make_inputs(2, 3, 2, 1, 4, 4, 9))
    with pytest.raises(ValueError, match=r"y: .*float64"):
        kernel.score_attention(inputs._replace(y=inputs.y.double()), 0.01)
    with pytest.raises(ValueError, match=r"v: expected on (cpu|cuda).*meta"):
        kernel.score_attention(inputs._replace(v=inputs.v.to("meta")), 0.01)


# Each kernel by itself


def prepared(inputs: LayerInputs, dtype: torch.dtype, **names: Any) -> dict[str, Any]:
    """What the kernels are given for all rows at once, with room for results (all NaN)."""
    layer, of_rows = kernel._prepared(on_device(inputs, dtype))
    x = layer | of_rows | names | {"R": len(inputs.rows), "n_keys": inputs.k.shape[0]}
    return x | kernel._work(x)


def half_sum(g: Tensor, scale: Tensor) -> Tensor:
    """G [R, H, V] from its halves [R, H, HALVES, V]."""
    return g.double().sum(2) * scale.double()[..., None]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_prepare_alone(dtype: torch.dtype) -> None:
    inputs = make_inputs(5, 37, 3, 3, 8, 20, 150, dtype=dtype, flags={"row_scale", "value_gate"})
    inputs.W_O[0, :, 7] = 0
    x = prepared(inputs, dtype, N=32)
    prepare.weights(x)
    prepare.values(x)
    prepare.lines(x)
    x = {name: t.cpu() if isinstance(t, Tensor) else t for name, t in x.items()}

    rho = breakpoints.column_norms(inputs.W_O)
    for got in (x["p_rho_inv"], x["p_rho_inv_t"].T):
        torch.testing.assert_close(got.double(), torch.where(rho > 0, 1 / rho, 0))
    torch.testing.assert_close(x["p_v_norm"].double(), inputs.v.norm(dim=-1).T)

    g = breakpoints.value_space_signs(inputs.W_O, breakpoints.signs(inputs.y)).transpose(0, 1)
    g = g * inputs.value_gate * inputs.row_scale[:, None, None]
    got = half_sum(x["p_g"], x["p_lines"][1])
    rounding = {torch.float32: 2**-20, torch.bfloat16: 2**-15, torch.float16: 2**-19}[dtype]
    assert ((got - g).abs() <= rounding * g.abs().amax(-1, keepdim=True)).all()

    points = breakpoints.breakpoints(inputs.y, rho).transpose(0, 1)  # [R, H, D]
    points = points / inputs.row_scale.abs()[:, None, None]
    torch.testing.assert_close(x["p_lines"][2].double(), points.amin(-1))
    limit, n = x["p_lines"][3].double()[..., None], x["p_counts"][0]
    assert ((n > 0) & (n <= 32)).all()
    assert n.float().mean() > 12, "the search for the limit must use the room there is"
    used = torch.arange(32) < n[..., None]
    listed = torch.zeros(5, 3, 151, dtype=torch.bool)
    listed.scatter_(2, torch.where(used, x["p_candidates"], 150).long(), used)
    away = (points / limit - 1).abs() > 1e-5  # but for ties
    assert torch.equal(listed[..., :150] & away, (points < limit) & away)


@pytest.mark.parametrize("spread", [0.0, 1.5], ids=["even", "uneven"])
@pytest.mark.usefixtures("poisoned")
def test_nearest_coordinates_alone(spread: float) -> None:
    """Of wider rows, some coordinates are looked at: none that matters is among the others."""
    inputs = make_inputs(9, 20, 4, 2, 8, 8, 300, flags={"row_scale"})
    generator = torch.Generator().manual_seed(1)
    columns = (spread * torch.randn(300, generator=generator, dtype=torch.float64)).exp()
    inputs = inputs._replace(W_O=inputs.W_O * columns)
    inputs.W_O[0, :, 7] = 0
    inputs.W_O[1] = 0
    inputs.W_O[:, :, 11] = 0
    inputs.y[0, 11:13] = 0
    inputs.row_scale[3] = 0
    x = prepared(inputs, torch.float32, N=16, M=64)
    prepare.weights(x)
    prepare.values(x)
    prepare.lines(x)
    x = {name: t.cpu() if isinstance(t, Tensor) else t for name, t in x.items()}
    near = x["p_nearest"] < 300
    n_near = near.sum(1)[torch.arange(9) != 3]
    assert ((n_near > 0) & (n_near <= 64)).all()
    assert n_near.float().mean() > 24, "the search must use the room there is"
    rho = breakpoints.column_norms(inputs.W_O.float().double())
    points = breakpoints.breakpoints(inputs.y, rho).transpose(0, 1)  # [R, H, D]
    points = points / inputs.row_scale.abs()[:, None, None]
    points[3] = math.inf
    first, limit = x["p_lines"][2:].double()
    assert (first <= points.amin(-1) * (1 + 1e-6)).all()
    found = torch.zeros(9, 4, 301, dtype=torch.bool)
    used = torch.arange(16) < x["p_counts"][0][..., None]
    found.scatter_(2, torch.where(used, x["p_candidates"], 300).long(), used)
    away = (points / limit[..., None] - 1).abs() > 1e-5  # but for ties
    assert torch.equal(found[..., :300] & away, (points < limit[..., None]) & away)
    some = torch.arange(9) != 3
    n = x["p_counts"][0][some][:, [0, 2, 3]]
    assert n.float().mean() > (8 if spread == 0 else 3)


@pytest.mark.usefixtures("poisoned")
def test_one_float16_alone() -> None:
    """G of a bfloat16 model whose rows are many: half a unit in the last place of each number."""
    inputs = make_inputs(9, 37, 3, 3, 8, 20, 150, dtype=torch.bfloat16, flags={"row_scale"})
    x = prepared(inputs, torch.bfloat16)
    assert x["HALVED"]
    prepare.weights(x)
    prepare.values(x)
    prepare.lines(x)
    g = breakpoints.value_space_signs(inputs.W_O, breakpoints.signs(inputs.y)).transpose(0, 1)
    g = g * inputs.row_scale[:, None, None]
    got = half_sum(x["p_g"].cpu(), x["p_lines"][1].cpu())
    assert ((got - g).abs() <= 2**-11 * g.abs() + 2**-20 * g.abs().amax()).all()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.usefixtures("poisoned")
def test_half_values_alone(size: float) -> None:
    """Bfloat16 values as float16, by a power of two a KV head: exact, whatever their size."""
    inputs = make_inputs(8, 37, 6, 3, 8, 20, 30, dtype=torch.bfloat16)
    sizes = size * torch.tensor([1.0, 2.0**-40, 0.0])[:, None]
    inputs = inputs._replace(v=(inputs.v * sizes).to(torch.bfloat16).double())
    x = prepared(inputs, torch.bfloat16)
    prepare.values(x)
    assert x["p_v16"].dtype == torch.float16
    got = x["p_v16"].cpu().double() * x["p_v_scale"].cpu().double()[:, None]
    tiny = inputs.v.abs() < 2**-30 * inputs.v.abs().amax((0, 2))[:, None]
    assert torch.equal(got.where(~tiny, 0), inputs.v.where(~tiny, 0))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_nearest_coordinates_in_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel.TILES, "N", 16)
    monkeypatch.setitem(kernel.TILES, "M", 32)
    check(make_inputs(30, 90, 3, 1, 8, 20, 200, dtype=dtype, flags={"row_scale"}), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_reach_alone(dtype: torch.dtype) -> None:
    inputs = make_inputs(70, 70, 6, 3, 8, 20, 150, dtype=dtype)
    inputs.W_O[0, :, 7] = 0
    inputs.v[5] = 0
    x = prepared(inputs, dtype)
    prepare.weights(x)
    prepare.values(x)
    reach.reach(x)
    u = torch.einsum("shv,hvd->hsd", inputs.v.repeat_interleave(2, dim=1), inputs.W_O)
    rho = breakpoints.column_norms(inputs.W_O)[:, None]
    norm = inputs.v.repeat_interleave(2, dim=1).norm(dim=-1).T[..., None]
    cosines = torch.where((rho > 0) & (norm > 0), u / (rho * norm), 0)
    expected = cosines.abs().amax(-1) * norm[..., 0]
    torch.testing.assert_close(x["p_reach"].cpu().double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("R", "S"), [(40, 70), (2, 150)])
@pytest.mark.usefixtures("poisoned")
def test_linear_and_lists_alone(R: int, S: int) -> None:
    inputs = make_inputs(R, S, 4, 2, 8, 20, 150)
    x = prepared(inputs, torch.float32, N=16)
    prepare.weights(x)
    prepare.values(x)
    assert x["REACH"] == (R == 40)
    if x["REACH"]:
        reach.reach(x)
    prepare.lines(x)
    linear.log_sum_exp(x)
    linear.linear(x)
    alpha_left = x["p_proximity"].cpu()
    lists.lists(x)
    on_cpu = {name: t.cpu() if isinstance(t, Tensor) else t for name, t in x.items()}

    lse = on_cpu["p_lines"][0].double() * math.log(2)
    torch.testing.assert_close(lse, log_sum_exp(inputs), rtol=0, atol=1e-5)

    alpha = reference.attention_pattern(inputs)  # [R, H, S]
    v = inputs.v.repeat_interleave(2, dim=1)
    g = half_sum(on_cpu["p_g"], on_cpu["p_lines"][1])
    lin = alpha * torch.einsum("rhv,shv->rhs", g, v)
    size = v.norm(dim=-1).T  # [H, S]
    if x["REACH"]:
        u = torch.einsum("shv,hvd->hsd", v, inputs.W_O)
        size = (u.abs() / breakpoints.column_norms(inputs.W_O)[:, None]).amax(-1)
    a = alpha * size * breakpoints.ROUND_UP
    first, limit = on_cpu["p_lines"][2:].double()[..., None]
    mask = visible(inputs.rows, S, None)[:, None]
    needs = (lin > 0) & (a > first) & mask
    sure = ((a / first - 1).abs() > 1e-4) & ((a / limit - 1).abs() > 1e-4) & (lin.abs() > 1e-9)
    for tier, expected in enumerate((needs & (a <= limit), needs & (a > limit))):
        words = on_cpu["p_marks"][tier]
        bits = ((words[..., None] >> torch.arange(32)) & 1).flatten(-2)[..., :S].bool() & mask
        assert torch.equal(bits & sure, expected & sure)
        assert bits.any()
        left = alpha_left[..., :S][bits].double()
        torch.testing.assert_close(left, alpha[bits], rtol=1e-5, atol=1e-7)
        n = on_cpu["p_counts"][1 + tier]
        for r in range(R):
            for h in range(4):
                line = on_cpu["p_list"][r, h]
                line = line.flip(0) if tier else line
                keys = bits[r, h].nonzero().squeeze(1).tolist()
                assert line[: n[r, h]].tolist() == keys
    token = torch.where(mask[:, 0], on_cpu["p_token"][:, :S].double(), 0)
    words = on_cpu["p_marks"][0] | on_cpu["p_marks"][1]
    marked = ((words[..., None] >> torch.arange(32)) & 1).flatten(-2)[..., :S].bool()
    unlisted = torch.where(marked | ~mask, 0, lin.clamp(min=0))
    torch.testing.assert_close(token, unlisted.sum(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("step", [correct.light, correct.heavy], ids=["light", "heavy"])
@pytest.mark.usefixtures("poisoned")
def test_corrections_alone(step: Any) -> None:
    """All visible pairs listed by hand, in one tier; the candidates are all coordinates."""
    inputs = make_inputs(5, 23, 4, 2, 8, 20, 30, flags={"row_scale"})
    x = prepared(inputs, torch.float32, N=32)
    prepare.weights(x)
    prepare.values(x)
    reach.reach(x)
    prepare.lines(x)
    alpha = reference.attention_pattern(inputs)
    seen = visible(inputs.rows, 23, None)[:, None].expand_as(alpha)
    x["p_proximity"][..., :23] = alpha.where(seen, math.nan).to(DEVICE, torch.float32)
    front = step is correct.light
    for r, t in enumerate(inputs.rows.tolist()):
        line = torch.arange(t + 1, dtype=torch.int32, device=DEVICE)
        x["p_list"][r, :, slice(t + 1) if front else slice(-t - 1, None)] = line
        x["p_counts"][1, r] = (t + 1) * front
        x["p_counts"][2, r] = (t + 1) * (not front)
    step(x)
    v = inputs.v.repeat_interleave(2, dim=1)
    alpha = alpha * inputs.row_scale[:, None, None]
    parts = torch.einsum("rhs,shv,hvd->rhsd", alpha, v, inputs.W_O)
    expected = reference.proximity(parts, inputs.y[:, None, None])
    got = x["p_proximity"].cpu()
    torch.testing.assert_close(got[..., :23][seen].double(), expected[seen], rtol=1e-5, atol=1e-5)
    assert got[..., 23:].isnan().all()


@pytest.mark.usefixtures("poisoned")
def test_parts_alone() -> None:
    inputs = make_inputs(5, 9, 2, 1, 4, 4, 1500, flags={"ffn"})
    x = prepared(inputs, torch.float32)
    x |= {"p_residual": torch.empty(5, device=DEVICE), "p_of_ffn": torch.empty(5, device=DEVICE)}
    proximity.parts(x)
    for name, part in (("p_residual", inputs.resid_pre), ("p_of_ffn", inputs.ffn)):
        expected = reference.proximity(part, inputs.y)
        torch.testing.assert_close(x[name].cpu().double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("window", [None, 1500])
@pytest.mark.usefixtures("poisoned")
def test_fold_and_totals_alone(window: int | None) -> None:
    """Two tiles of keys, marks at random, proximities whole numbers."""
    S, H, BS = 2200, 2, 64
    inputs = make_inputs(3, S, H, 1, 4, 4, 9)._replace(window=window)
    mask = visible(inputs.rows, S, window)[:, None]
    g = torch.Generator().manual_seed(0)
    x = prepared(inputs, torch.float32, BS=BS)
    n_words = x["n_words"]
    marked = torch.rand(3, H, n_words * 32, generator=g) < 0.1
    words = (marked.view(3, H, n_words, 32).long() << torch.arange(32)).sum(-1)
    x["p_marks"][0] = words.where(words < 2**31, words - 2**32).to(DEVICE)
    x["p_marks"][1] = 0
    values = torch.randint(9, (3, H, n_words * 32), generator=g).float()
    x["p_proximity"].copy_(values.where(marked, math.nan))
    token = torch.randint(9, (3, n_words * 32), generator=g).float()
    x["p_token"].copy_(token)
    n_blocks = -(-S // BS)
    x["p_partial"] = torch.full((n_blocks, 3, H), math.nan, device=DEVICE)
    x["p_partial_lin"] = torch.full((n_blocks, 3, H), math.nan, device=DEVICE)
    seen = mask[:, 0].nonzero()
    partial = torch.zeros(n_blocks, 3, H)
    for r, j in {(int(r), int(j) // BS) for r, j in seen.tolist()}:
        partial[j, r] = j + 1
        x["p_partial"][j, r] = j + 1
        x["p_partial_lin"][j, r] = -(j + 1)
    x |= {"p_residual": torch.ones(3, device=DEVICE), "p_of_ffn": None, "p_log_sum_exp": None}
    x |= {"p_head_total": torch.empty(3, H, device=DEVICE)}
    x |= {"p_linear": torch.empty(3, device=DEVICE), "p_total": torch.empty(3, device=DEVICE)}
    x |= {"p_unattributed": torch.empty(3, dtype=torch.bool, device=DEVICE)}
    compact.fold(x)
    compact.totals(x)
    listed = torch.where(marked[..., :S] & mask, values[..., :S], 0)
    heads = listed.sum(-1) + partial.sum(0)
    total = 1 + heads.sum(-1)
    assert torch.equal(x["p_total"].cpu(), total)
    assert torch.equal(x["p_linear"].cpu(), -partial.sum((0, 2)))
    torch.testing.assert_close(x["p_head_total"].cpu(), heads / total[:, None])
    torch.testing.assert_close(x["p_residual"].cpu(), 1 / total)
    expected = torch.where(mask[:, 0], token[:, :S] + listed.sum(1), 0)
    assert torch.equal(torch.where(mask[:, 0], x["p_token"].cpu()[:, :S], 0), expected)


# Whole graphs


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_graphs_agree_with_the_oracle(family: str) -> None:
    model, text = tiny_model(family), tiny_text(17)
    graph = Tracer(model.to(DEVICE), impl="triton").trace(text, threshold=0.05)
    expected = [importances(layer) for layer in account(model.cpu(), text)]
    assert_graph_agrees(graph, expected, 1e-4 if DEVICE.type == "cuda" else 1e-5)
    assert len(graph.edges.layer) > 5
