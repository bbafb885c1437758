"""One grid for all kernels: implementations x shapes x flags x dtypes, and one oracle.

Inputs and the oracle's scores are made once a process and shared by the implementations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from random_inputs import random_inputs
from torch import Tensor

from ifr_fast.kernels import eager, reference
from ifr_fast.kernels.contract import AttentionScores, FFNScores, LayerInputs
from ifr_fast.kernels.cpu import kernel as cpu

try:
    from ifr_fast.kernels.triton import kernel as triton
except ImportError:
    triton = None  # type: ignore[assignment]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLAGS = ["window", "softcap", "sinks", "alibi_slopes", "row_scale", "value_gate", "ffn"]
FLAGS += ["offset", "floor"]
NONE, ALL = frozenset[str](), frozenset(FLAGS)
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
Shape = tuple[int, ...]  # R, S, H, H_kv, K, V, D


class Case(NamedTuple):
    """Random inputs (random_inputs.py) whose values float32 can hold, or both half precisions."""

    shape: Shape
    flags: frozenset[str] = NONE
    half: bool = False
    window: int | None = None  # in place of the flag's
    seed: int = 0
    last: bool = False  # the row at the end of the text

    @property
    def n_keys(self) -> int:
        return self.shape[1]


@cache
def inputs_of(case: Case) -> LayerInputs:
    """The case's inputs in float64; not to be written to."""
    dtype = BF16 if case.half else F32
    inputs = random_inputs(*case.shape, seed=case.seed, dtype=dtype, flags=case.flags)
    inputs = inputs.to(dtype).to(F16 if case.half else F32).to(F64)
    if case.window is not None:
        inputs = inputs._replace(window=case.window)
    return inputs._replace(rows=torch.tensor([case.n_keys - 1])) if case.last else inputs


@cache
def oracle(case: Case, keep: float = 0.0) -> AttentionScores:
    """The oracle's scores of a case."""
    with threads(1):  # more cost more than they save at these sizes
        return reference.score_attention(inputs_of(case), keep)


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Implementation(NamedTuple):
    """A kernel, and how far it may be from the oracle."""

    name: str
    score: Callable[[LayerInputs, float], AttentionScores]
    score_ffn: Callable[[Tensor, Tensor], FFNScores]
    tolerance: dict[torch.dtype, float]  # of importances, by the dtypes that it takes
    sums: tuple[float, float]  # relative and absolute, of heads' weights beside their token's
    bits: bool = True  # the layout of the inputs in memory changes no bit

    def of(self, inputs: LayerInputs, keep: float = 0.0, dtype: torch.dtype = F32) -> Any:
        """Scores of the inputs in a dtype, without the padding of edges."""
        scores = self.score(inputs.to(dtype), keep)
        used = scores.edges.weight != 0
        assert (scores.edges.head_weight[~used] == 0).all()
        return scores._replace(edges=scores.edges._make(x[used] for x in scores.edges))

    def check(self, case: Case, dtype: torch.dtype = F32, keep: float = 0.0) -> None:
        """Scores a case and compares with the oracle."""
        got = self.of(inputs_of(case), keep, dtype)
        self.assert_close(got, oracle(case, keep), case.n_keys, dtype, keep)

    def assert_close(
        self,
        got: AttentionScores,
        expected: AttentionScores,
        n_keys: int,
        dtype: torch.dtype = F32,
        keep: float = 0.0,
    ) -> None:
        assert_scores_close(got, expected, n_keys, self.tolerance[dtype], self.sums, keep)


def _cpu(isa: str) -> Implementation:
    def score(inputs: LayerInputs, keep: float) -> AttentionScores:
        with mock.patch.object(cpu, "ISA", isa):
            return cpu.score_attention(inputs, keep)

    def score_ffn(resid_mid: Tensor, resid_post: Tensor) -> FFNScores:
        with mock.patch.object(cpu, "ISA", isa):
            return cpu.score_ffn(resid_mid, resid_post)

    tolerance = {F32: 1e-5, BF16: 1e-5, F16: 1e-5}
    return Implementation(f"cpu-{isa}", score, score_ffn, tolerance, (1e-5, 1e-7))


def on_device(inputs: LayerInputs, dtype: torch.dtype = F32) -> LayerInputs:
    """The inputs in a dtype on the device of the Triton kernels; rows stay on the CPU."""
    moved: dict[str, Any] = {
        name: x.to(DEVICE)
        for name, x in inputs.to(dtype)._asdict().items()
        if isinstance(x, Tensor) and name != "rows"
    }
    return inputs._replace(**moved)


def _triton_score(inputs: LayerInputs, keep: float) -> AttentionScores:
    scores = triton.score_attention(on_device(inputs, inputs.y.dtype), keep)
    edges = scores.edges._make(x.cpu() for x in scores.edges)
    assert edges.weight.dtype == edges.head_weight.dtype == F32
    rest = (x if x is None or isinstance(x, tuple) else x.cpu() for x in scores)
    return AttentionScores(*rest)._replace(edges=edges)


def _triton_ffn(resid_mid: Tensor, resid_post: Tensor) -> FFNScores:
    scores = triton.score_ffn(resid_mid.to(DEVICE), resid_post.to(DEVICE))
    return FFNScores(*(x.cpu() for x in scores))


ISAS = cpu.isas() if cpu.unavailable() is None else []
EAGER = Implementation(
    "eager", eager.score_attention, eager.score_ffn,
    {F64: 1e-12, F32: 1e-5, BF16: 1e-5, F16: 1e-5}, (1e-5, 1e-7), bits=False,
)  # fmt: skip
CPUS = [_cpu(isa) for isa in ISAS]
TRITON = Implementation(
    "triton", _triton_score, _triton_ffn, {F32: 1e-5, BF16: 1e-3, F16: 1e-3}, (1e-4, 1e-6)
)
EVERY = [EAGER, *CPUS, *([TRITON] if triton is not None else [])]


def every(*names: str) -> Any:
    """Parametrizes a test over the implementations, all or those whose names begin so."""
    chosen = [x for x in EVERY if not names or x.name.startswith(names)]
    return pytest.mark.parametrize("impl", chosen, ids=[x.name for x in chosen])


def dense(scores: AttentionScores, n_keys: int) -> Tensor:
    """Head importances [R, H, S] of the edges, 0 elsewhere."""
    R, H = scores.head_total.shape
    out = scores.head_total.new_zeros(R, H, n_keys)
    out[scores.edges.row, :, scores.edges.source] = scores.edges.head_weight
    return out


def assert_scores_close(
    got: AttentionScores,
    expected: AttentionScores,
    n_keys: int,
    tolerance: float,
    sums: tuple[float, float] = (1e-5, 1e-7),
    keep: float = 0.0,
) -> None:
    """All values; edges by their (row, source), all but those within the tolerance of `keep`."""
    assert torch.equal(got.unattributed, expected.unattributed)
    slack = 10 if tolerance < 1e-9 else 1
    for name in ("linear", "total"):
        a, b = getattr(got, name).double(), getattr(expected, name).double()
        scale = 1 + max(x.abs().max().item() for x in (b, expected.linear))
        atol = slack * tolerance * scale
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    for name in ("residual", "ffn", "head_total"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(
                a.double(), b.double(), rtol=0, atol=tolerance,
                msg=lambda m, name=name: f"{name}: {m}",
            )  # fmt: skip
    a, b = dense(got, n_keys).double(), dense(expected, n_keys).double()
    in_a, in_b = (x.sum(1) > 0 for x in (a, b))
    for x, other in ((a, in_b), (b, in_a)):
        alone = x.sum(1)[~other]
        assert ((alone - keep).abs() < tolerance)[alone > 0].all(), "edges that one side lacks"
    both = (in_a & in_b)[:, None]
    torch.testing.assert_close(a * both, b * both, rtol=0, atol=tolerance)
    rtol, atol = sums
    torch.testing.assert_close(
        got.edges.weight, got.edges.head_weight.sum(-1), rtol=rtol, atol=atol
    )
    assert (got.edges.weight > keep).all()
    order = got.edges.row * n_keys + got.edges.source
    assert (order.diff() > 0).all(), "edges must ascend by row, then source"
    total = got.residual + got.head_total.sum(-1)
    if got.ffn is not None:
        total = total + got.ffn
    torch.testing.assert_close(total, torch.ones_like(total))


def assert_bits_equal(got: AttentionScores, expected: AttentionScores) -> None:
    for name in ("residual", "ffn", "head_total", "unattributed", "linear"):
        a, b = getattr(got, name), getattr(expected, name)
        assert a is b is None or torch.equal(a, b), name
    for name, a, b in zip(got.edges._fields, got.edges, expected.edges, strict=True):
        assert torch.equal(a, b), name


def log_sum_exp(inputs: LayerInputs) -> Tensor:
    """Log-sum-exp [R, H] of the scores of inputs without flags."""
    H = inputs.q.shape[1]
    S, H_kv, _ = inputs.k.shape
    k = inputs.k.repeat_interleave(H // H_kv, dim=1)
    scores = torch.einsum("rhk,shk->rhs", inputs.q, k) * inputs.scale
    hidden = torch.arange(S) > inputs.rows[:, None]
    return scores.masked_fill(hidden[:, None], float("-inf")).logsumexp(-1)
