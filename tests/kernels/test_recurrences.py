"""kernels/recurrences: weights of linear attention against the recurrences of transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_grid import Case, inputs_of
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear as kimi_linear
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from ifr_fast.kernels import eager, reference
from ifr_fast.kernels.contract import LayerInputs
from ifr_fast.kernels.cpu import kernel as cpu
from ifr_fast.kernels.recurrences.gated_delta import GatedDelta
from ifr_fast.kernels.recurrences.state_space import StateSpace

H, K, V = 3, 8, 5
DECAYS = {"slow": 0.01, "fast": 3.0, "at once": 50.0, "none": 0.0}


def random_delta(T: int, decay: float = 1.0, seed: int = 0) -> tuple[GatedDelta, Tensor]:
    """A recurrence in float64, and values [T, H, V]."""
    torch.manual_seed(seed)
    q, k = (torch.nn.functional.normalize(torch.randn(T, H, K).double(), dim=-1) for _ in range(2))
    g, beta = -decay * torch.rand(T, H, 1).double(), torch.rand(T, H).double()
    return GatedDelta(q * K**-0.5, k, g, beta), torch.randn(T, H, V).double()


def step_by_step(of: GatedDelta) -> Tensor:
    """M [H, T, T] by the recurrence itself, on the unit vectors."""
    T = len(of.q)
    state = torch.zeros(H, K, T, dtype=torch.float64)
    rows = []
    for t, (q, k, g, beta) in enumerate(zip(*of, strict=True)):
        state = state * g.exp()[..., None]
        unit = torch.zeros(T, dtype=torch.float64)
        unit[t] = 1
        left = unit - torch.einsum("hkt,hk->ht", state, k)
        state = state + torch.einsum("hk,ht->hkt", k * beta[:, None], left)
        rows.append(torch.einsum("hkt,hk->ht", state, q))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 130])
def test_weights_are_those_of_the_recurrence(T: int, decay: str) -> None:
    of, _ = random_delta(T, DECAYS[decay])
    expected = step_by_step(of)
    torch.testing.assert_close(of.weights(torch.arange(T), T), expected, rtol=0, atol=1e-12)
    found = of.to(torch.float32).weights(torch.arange(T), T)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert not found.triu(1).any()


@pytest.mark.parametrize("T", [1, 63, 65, 130])
def test_outputs_are_those_of_transformers(T: int) -> None:
    of, v = random_delta(T)
    q, k, g, beta = (x.float()[None] for x in of._replace(g=of.g[..., 0]))
    expected, _ = qwen3_next.torch_chunk_gated_delta_rule(
        q * K**0.5, k, v.float()[None], g=g, beta=beta
    )
    weights = of.to(torch.float32).weights(torch.arange(T), T)
    found = torch.einsum("htj,jhv->thv", weights, v.float())
    torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.sets(st.integers(0, 129), min_size=1, max_size=9), st.integers(0, 3))
def test_rows_do_not_depend_on_each_other(rows: set[int], seed: int) -> None:
    of, _ = random_delta(130, seed=seed)
    some = torch.tensor(sorted(rows))
    found = of.weights(some, int(some[-1]) + 1)
    for i, t in enumerate(some.tolist()):
        alone = of.weights(some[i : i + 1], t + 1)[:, 0]
        torch.testing.assert_close(found[:, i, : t + 1], alone, rtol=0, atol=1e-12)
        assert not found[:, i, t + 1 :].any()


def test_a_head_alone() -> None:
    of, _ = random_delta(70)
    rows = torch.tensor([3, 66])
    found = of.head(1).weights(rows, 70)[0]
    torch.testing.assert_close(found, of.weights(rows, 70)[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 15, 16, 17, 65])
def test_decays_of_each_channel(T: int, decay: str) -> None:
    of, _ = random_delta(T)
    of = of._replace(g=-DECAYS[decay] * torch.rand(T, H, K).double())
    expected = step_by_step(of)
    torch.testing.assert_close(of.weights(torch.arange(T), T), expected, rtol=0, atol=1e-12)
    found = of.to(torch.float32).weights(torch.arange(T), T)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_outputs_of_kimi_delta_attention() -> None:
    of, v = random_delta(70)
    of = of._replace(g=-torch.rand(70, H, K).double())
    q, k, g, beta = (x.float()[None] for x in of)
    expected, _ = kimi_linear.chunk_kimi_delta_attention(
        q * K**0.5, k, v.float()[None], g=g, beta=beta
    )
    weights = of.to(torch.float32).weights(torch.arange(70), 70)
    found = torch.einsum("htj,jhv->thv", weights, v.float())
    torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-5)


# State spaces


def random_space(T: int, decay: float = 1.0) -> tuple[StateSpace, Tensor]:
    """One in float64 of 4 heads in 2 groups, and values [T, 4, V]."""
    torch.manual_seed(T)
    C, B = torch.randn(T, 2, K).double(), torch.randn(T, 2, K).double()
    dt = torch.rand(T, 4).double()
    a, D = -decay * torch.rand(4).double() * dt, torch.randn(4).double().expand(T, 4)
    return StateSpace(C, B, a, dt, D), torch.randn(T, 4, V).double()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 2, 63, 130])
def test_weights_are_those_of_the_state_space(T: int, decay: str) -> None:
    of, v = random_space(T, DECAYS[decay])
    state, rows = torch.zeros(4, K, V, dtype=torch.float64), []
    for C, B, a, dt, D, value in zip(*of, v, strict=True):
        C, B = (x.repeat_interleave(2, 0) for x in (C, B))
        state = state * a.exp()[:, None, None] + torch.einsum("h,hk,hv->hkv", dt, B, value)
        rows.append(torch.einsum("hkv,hk->hv", state, C) + D[:, None] * value)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        weights = of.to(dtype).weights(torch.arange(T), T).double()
        found = torch.einsum("htj,jhv->thv", weights, v)
        torch.testing.assert_close(found, torch.stack(rows), rtol=0, atol=tolerance)
        assert not weights.triu(1).any()


def test_some_rows_and_heads_of_a_state_space() -> None:
    of, _ = random_space(70)
    rows = torch.tensor([0, 31, 69])
    whole = of.weights(torch.arange(70), 70)
    found = of.weights(rows, 70)
    torch.testing.assert_close(found, whole[:, rows], rtol=0, atol=1e-12)
    assert found.is_contiguous()
    for head in range(4):
        alone = of.head(head).weights(rows, 70)[0]
        torch.testing.assert_close(alone, found[head], rtol=0, atol=1e-12)


# In kernels


def with_pattern(dtype: torch.dtype = torch.float64) -> tuple[LayerInputs, Tensor]:
    """Inputs whose weights are given, and these: of either sign, sums far from 1."""
    case = Case((20, 40, H, H, K, V, 33), frozenset({"value_gate", "row_scale"}))
    inputs = inputs_of(case)
    of, _ = random_delta(40, 0.1)
    inputs = inputs._replace(
        q=inputs.q[..., :0], k=inputs.k[..., :0], pattern=of, sinks=None, log_sum_exp=None
    )
    return inputs.to(dtype), of.weights(inputs.rows, 40)


def test_the_oracle_reads_the_weights() -> None:
    inputs, weights = with_pattern()
    scores = reference.score_attention(inputs, 0.0)
    u = torch.einsum("rhv,jhv,hvd->rhjd", inputs.value_gate, inputs.v, inputs.W_O)
    parts = inputs.row_scale[:, None, None, None] * weights.transpose(0, 1)[..., None] * u
    y = inputs.y[:, None, None]
    gained = (y.abs().sum(-1) - (y - parts).abs().sum(-1)).clamp(min=0)
    residual = inputs.y.abs().sum(-1) - (inputs.y - inputs.resid_pre).abs().sum(-1)
    total = gained.sum((1, 2)) + residual.clamp(min=0)
    expected = gained.sum(2) / total[:, None]
    assert weights.min() < -1e-3
    torch.testing.assert_close(scores.head_total, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_eager_agrees_with_the_oracle(dtype: torch.dtype, poisoned: None) -> None:
    inputs, _ = with_pattern(dtype)
    expected = reference.score_attention(inputs.to(torch.float64), 0.0)
    found = eager.score_attention(inputs, 0.0)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for name in ("residual", "head_total"):
        a, b = getattr(found, name).double(), getattr(expected, name)
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    dense = [torch.zeros(20, 40, H, dtype=torch.float64) for _ in range(2)]
    for into, (row, source, _, heads) in zip(dense, (found.edges, expected.edges), strict=True):
        into[row, source] = heads.double()
    torch.testing.assert_close(*dense, rtol=0, atol=tolerance)


def test_kernels_of_softmax_refuse_them() -> None:
    inputs, _ = with_pattern(torch.float32)
    with pytest.raises(ValueError, match="pattern: expected None"):
        cpu.score_attention(inputs, 0.0)
