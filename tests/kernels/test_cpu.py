"""The native CPU kernel's own ways: one row, decode steps, threads, instruction sets, refusals."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_grid import (
    ALL,
    FLAGS,
    ISAS,
    NONE,
    Case,
    assert_bits_equal,
    assert_scores_close,
    inputs_of,
    oracle,
    threads,
)
from torch import Tensor

from ifr_fast.kernels import reference
from ifr_fast.kernels.contract import LayerInputs
from ifr_fast.kernels.cpu import kernel

pytestmark = pytest.mark.skipif(
    kernel.unavailable() is not None, reason="the extension was not compiled"
)

TOLERANCE = 1e-5  # of importances


def make_inputs(*shape: int, seed: int = 0) -> LayerInputs:
    return inputs_of(Case(shape, seed=seed))


def float32(inputs: LayerInputs) -> LayerInputs:
    return inputs.to(torch.float32)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernel, "ISA", request.param)
    return request.param


ONE_ROW = [  # S, H, H_kv, K, V, D
    (1, 1, 1, 1, 1, 1),
    (2, 6, 3, 8, 10, 33),
    (63, 6, 1, 5, 3, 17),
    (500, 4, 4, 12, 40, 65),
    (2049, 9, 3, 64, 64, 100),
]


def last_row(*shape: int, flags: frozenset[str] = NONE) -> Case:
    """The row at the end of the text alone: S, H, H_kv, K, V, D."""
    return Case((1, *shape), flags, last=True)


def in_a_cache(x: Tensor) -> Tensor:
    """[S, H_kv, n] as the front of a longer, poisoned store of [H_kv, room, n]."""
    store = x.new_full((x.shape[1], len(x) + 37, x.shape[2]), float("nan"))
    store[:, : len(x)] = x.transpose(0, 1)
    return store.transpose(0, 1)[: len(x)]


@pytest.mark.parametrize(
    "flags", [NONE, *(frozenset({name}) for name in FLAGS), ALL], ids=lambda x: "+".join(x)
)
@pytest.mark.parametrize("shape", ONE_ROW, ids=str)
@pytest.mark.usefixtures("poisoned", "isa")
def test_one_row_agrees_with_the_oracle(shape: tuple[int, ...], flags: frozenset[str]) -> None:
    case = last_row(*shape, flags=flags)
    inputs = inputs_of(case)
    x = float32(inputs)
    x = x._replace(k=in_a_cache(x.k), v=in_a_cache(x.v))
    assert_scores_close(kernel.score_attention(x, 0.0), oracle(case), shape[0], TOLERANCE)

    layer, scores = step_layer(x)
    z = attended(layer, x)
    alpha = reference.attention_pattern(inputs)
    heads_of_kv = shape[1] // shape[2]
    output = torch.einsum("rhs,shv->rhv", alpha, inputs.v.repeat_interleave(heads_of_kv, 1))
    torch.testing.assert_close(z.double()[0], output, rtol=1e-5, atol=1e-5)
    score_step(layer, x)
    # A step does not know other tools' arithmetic.
    ours = case._replace(flags=flags - {"offset", "floor"})
    assert_scores_close(scores.take(), oracle(ours), shape[0], TOLERANCE)


def step_layer(x: LayerInputs) -> tuple[kernel.StepLayer, kernel.StepScores]:
    """A layer in which the last of the inputs' keys and values is still to come, and room after."""
    scores = kernel.StepScores(x.q.shape[1])
    S = len(x.k)
    k, v = (of.new_full((S + 5, *of.shape[1:]), float("nan")) for of in (x.k, x.v))
    k[: S - 1], v[: S - 1] = x.k[:-1], x.v[:-1]
    return kernel.StepLayer(k, v, S - 1, x.W_O, x.alibi_slopes, scores), scores


def attended(layer: kernel.StepLayer, x: LayerInputs) -> Tensor:
    return layer.attend(
        x.q[:, :, None], x.k[-1:].transpose(0, 1)[None], x.v[-1:].transpose(0, 1)[None], x.scale,
        window=x.window, softcap=x.softcap, sinks=x.sinks,
    )  # fmt: skip


def score_step(layer: kernel.StepLayer, x: LayerInputs, keep: float = 0.0) -> None:
    layer.score(x.resid_pre, x.y, keep, row_scale=x.row_scale, value_gate=x.value_gate, ffn=x.ffn)


@pytest.mark.usefixtures("poisoned", "isa")
def test_steps_of_several_layers_are_taken_together() -> None:
    """Row after row of one text, in two layers whose scores are taken together."""
    inputs = [make_inputs(9, 40, 6, 3, 8, 12, 33, seed=seed) for seed in (1, 2)]
    scores = kernel.StepScores(6)
    layers = []
    for x in map(float32, inputs):
        k, v = (of.new_full((40, *of.shape[1:]), float("nan")) for of in (x.k, x.v))
        k[:3], v[:3] = x.k[:3], x.v[:3]
        layers.append(kernel.StepLayer(k, v, 3, x.W_O, None, scores))
    for row in range(3, 12):
        expected = []
        for layer, x in zip(layers, inputs, strict=True):
            of_row = x._replace(
                rows=torch.tensor([row]), resid_pre=x.resid_pre[row - 3 : row - 2],
                y=x.y[row - 3 : row - 2], q=x.q[row - 3 : row - 2],
                k=x.k[: row + 1], v=x.v[: row + 1],
            )  # fmt: skip
            expected.append(reference.score_attention(of_row, 0.01))
            attended(layer, float32(of_row))
            score_step(layer, float32(of_row), 0.01)
        got = scores.take()
        assert got.residual.shape == (2,)
        for i, want in enumerate(expected):
            mine = got.edges.row == i
            one = kernel.AttentionScores(
                got.residual[i : i + 1], None, got.head_total[i : i + 1],
                kernel.EdgeList(got.edges.row[mine] * 0, *(e[mine] for e in got.edges[1:])),
                got.unattributed[i : i + 1], got.linear[i : i + 1], got.total[i : i + 1],
            )  # fmt: skip
            assert_scores_close(one, want, row + 1, TOLERANCE, keep=0.01)
    assert scores.take().residual.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_step_may_lie_anyhow(dtype: torch.dtype) -> None:
    flags = frozenset({"sinks", "value_gate", "row_scale", "ffn"})
    inputs = inputs_of(last_row(70, 6, 3, 8, 12, 20, flags=flags))
    rounded = inputs.to(dtype)
    x = float32(rounded.to(torch.float64))
    (layer, scores), (other, others) = step_layer(x), step_layer(x)
    expected = attended(layer, x)
    score_step(layer, x)

    def apart(of: Tensor | None) -> Tensor | None:
        return None if of is None else of.repeat_interleave(3, dim=-1)[..., ::3].requires_grad_()

    new = {"q", "k", "v", "resid_pre", "y", "sinks", "row_scale", "value_gate", "ffn"}
    lying = rounded._replace(**{name: apart(getattr(rounded, name)) for name in new})
    assert torch.equal(attended(other, lying), expected)
    score_step(other, lying)
    assert_bits_equal(others.take(), scores.take())


def test_a_step_that_is_refused_changes_nothing() -> None:
    x = float32(inputs_of(last_row(7, 6, 3, 8, 8, 20)))
    (layer, scores), (other, others) = step_layer(x), step_layer(x)
    attended(layer, x)
    attended(other, x)
    for bad in ({"q": x.q[:, :5]}, {"k": x.k[..., :7]}, {"v": x.v[:, :2]}, {"window": 0}):
        with pytest.raises(ValueError, match=r"shape|window"):
            attended(layer, x._replace(**bad))
    score_step(layer, x)
    score_step(other, x)
    assert_bits_equal(scores.take(), others.take())


def test_steps_that_do_not_fit_are_refused() -> None:
    x = float32(inputs_of(last_row(7, 6, 3, 8, 8, 20)))
    layer, _ = step_layer(x)
    with pytest.raises(ValueError, match="no row has attended"):
        score_step(layer, x)
    with pytest.raises(ValueError, match=r"q: expected shape \[1, 6, 1, 8\]"):
        attended(layer, x._replace(q=x.q[:, :5]))
    for _ in range(6):
        attended(layer, x)
    with pytest.raises(ValueError, match="no room"):
        attended(layer, x)
    score_step(layer, x)
    with pytest.raises(ValueError, match="no row has attended"):
        score_step(layer, x)


@pytest.mark.parametrize("W_O", ["[H, D, V]", "[D, H, V]", "[H, V, D]"])
@pytest.mark.parametrize("R", [1, 3])
@pytest.mark.usefixtures("poisoned", "isa")
def test_output_maps_are_read_as_they_lie(W_O: str, R: int) -> None:
    order = {"[H, D, V]": (0, 2, 1), "[D, H, V]": (1, 2, 0), "[H, V, D]": (0, 1, 2)}[W_O]
    case = Case((R, 70, 6, 2, 8, 16, 45))
    inputs = inputs_of(case)
    back = tuple(order.index(i) for i in range(3))
    stored = {"[D, H, V]": inputs.W_O.permute(2, 0, 1)}.get(W_O, inputs.W_O.permute(order))
    stored = stored.contiguous().permute((1, 2, 0) if W_O == "[D, H, V]" else back)
    assert torch.equal(stored, inputs.W_O)
    got = kernel.score_attention(float32(inputs)._replace(W_O=stored.float()), 0.0)
    assert_scores_close(got, oracle(case), 70, TOLERANCE)


@pytest.mark.usefixtures("isa")
def test_bits_of_one_row_do_not_depend_on_threads_or_the_run() -> None:
    flags = frozenset({"sinks", "softcap"})
    x = float32(inputs_of(last_row(1500, 6, 3, 16, 24, 300, flags=flags)))

    def step() -> tuple[Tensor, kernel.AttentionScores]:
        layer, scores = step_layer(x)
        z = attended(layer, x)
        score_step(layer, x, 0.01)
        return z, scores.take()

    with threads(1):
        computed, (z, given) = kernel.score_attention(x, 0.01), step()
    for n in (1, 2, 3):
        with threads(n):
            assert_bits_equal(kernel.score_attention(x, 0.01), computed)
            again = step()
            assert torch.equal(again[0], z)
            assert_bits_equal(again[1], given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_row_in_half_precision(dtype: torch.dtype) -> None:
    case = last_row(300, 6, 3, 16, 24, 70)._replace(half=True)
    got = kernel.score_attention(inputs_of(case).to(dtype), 0.0)
    assert_scores_close(got, oracle(case), 300, TOLERANCE)


@pytest.mark.usefixtures("isa")
def test_bits_do_not_depend_on_threads_or_the_run() -> None:
    inputs = float32(make_inputs(150, 150, 6, 3, 16, 16, 70))
    with threads(1):
        expected = kernel.score_attention(inputs, 0.01)
    for n in (1, 2, 3):
        with threads(n):
            assert_bits_equal(kernel.score_attention(inputs, 0.01), expected)


# Its argument: a file for the scores of fixed inputs on three threads. Prints the pool.
SCORE_ON_THREE_THREADS = """
import sys, torch
from ifr_fast.kernels.contract import LayerInputs
from ifr_fast.kernels.cpu import kernel
torch.set_num_threads(3)
inputs = LayerInputs(**torch.load(sys.argv[1]))
for _ in range(20):
    torch.ones(1 << 17).exp()  # an operation of torch on its pool
    scores = kernel.score_attention(inputs, 0.01)
    ffn = kernel.score_ffn(inputs.resid_pre, inputs.y)
torch.save([scores.residual, scores.head_total, *scores.edges, *ffn], sys.argv[2])
print(kernel.pool())
"""


@pytest.mark.parametrize(
    "setting",
    ["IFR_FAST_CPU_POOL=none", "IFR_FAST_CPU_POOL=", "OMP_THREAD_LIMIT=1", "OMP_DYNAMIC=1"],
)
def test_bits_do_not_depend_on_the_pool_of_threads(setting: str, tmp_path: Path) -> None:
    inputs = float32(make_inputs(400, 400, 6, 3, 16, 16, 300))
    torch.save({k: x for k, x in inputs._asdict().items() if x is not None}, tmp_path / "inputs")
    with threads(1):
        scores = kernel.score_attention(inputs, 0.01)
        ffn = kernel.score_ffn(inputs.resid_pre, inputs.y)
    name, value = setting.split("=")
    done = subprocess.run(
        [sys.executable, "-c", SCORE_ON_THREE_THREADS, tmp_path / "inputs", tmp_path / "scores"],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    got = torch.load(tmp_path / "scores")
    expected = [scores.residual, scores.head_total, *scores.edges, *ffn]
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert done.stdout.strip() == ("" if value == "none" else kernel.pool())


@pytest.mark.skipif(
    sys.platform != "linux" or "backend: OpenMP" not in torch.__config__.parallel_info(),
    reason="torch has no OpenMP pool to share",
)
@pytest.mark.skipif("IFR_FAST_CPU_POOL" in os.environ, reason="the pool is chosen from outside")
def test_runs_on_the_pool_that_torch_uses() -> None:
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert Path(kernel.pool()).resolve() in {
        Path(name).resolve() for name in mapped if re.search(r"lib(gomp|i?omp)", name)
    }


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.usefixtures("isa")
def test_frontier_rows_equal_those_rows_of_the_whole(window: int | None) -> None:
    inputs = float32(make_inputs(150, 150, 6, 3, 16, 16, 70)._replace(window=window))
    whole = kernel.score_attention(inputs, 0.01)
    pick = torch.tensor([0, 3, 17, 64, 65, 99, 128, 149])
    some = kernel.score_attention(
        inputs._replace(
            rows=inputs.rows[pick],
            resid_pre=inputs.resid_pre[pick],
            y=inputs.y[pick],
            q=inputs.q[pick],
        ),
        0.01,
    )
    assert torch.equal(some.residual, whole.residual[pick])
    assert torch.equal(some.head_total, whole.head_total[pick])
    for i, row in enumerate(pick):
        a, b = some.edges.row == i, whole.edges.row == row
        assert torch.equal(some.edges.source[a], whole.edges.source[b])
        assert torch.equal(some.edges.head_weight[a], whole.edges.head_weight[b])


def test_counts_what_it_did() -> None:
    inputs = make_inputs(30, 30, 6, 3, 8, 8, 33)
    _, counters = kernel.score_attention_counted(float32(inputs), 0.01)
    assert counters.pairs == 6 * 30 * 31 // 2
    assert 0 < counters.listed <= counters.pairs
    assert counters.listed <= counters.visited <= 33 * counters.listed
    assert set(counters.seconds) == set(kernel.STAGES)


def edit(**changes: Callable[[Tensor], object]) -> Callable[[LayerInputs], LayerInputs]:
    return lambda x: x._replace(**{k: change(getattr(x, k)) for k, change in changes.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(y=lambda y: y.double()), "y: .*float64"),
        (edit(y=lambda y: y.to("meta")), "y: .*meta"),
        (edit(q=lambda q: q[:, :5]), "multiple of"),
        (edit(v=lambda v: v[:-1]), "v: expected shape"),
        (edit(W_O=lambda w: w[:, :, 1:]), "W_O: expected shape"),
        (edit(resid_pre=lambda x: x[1:]), "resid_pre: expected shape"),
        (edit(rows=lambda rows: rows.flip(0)), "rows must be strictly ascending"),
        (edit(rows=lambda rows: rows + 1), "rows must be strictly ascending"),
        (edit(window=lambda _: 0), "window must be at least 1"),
        (edit(softcap=lambda _: 0.0), "softcap must be above 0"),
    ],
)
def test_refuses_what_it_cannot_read(
    change: Callable[[LayerInputs], LayerInputs], message: str
) -> None:
    inputs = float32(make_inputs(20, 20, 6, 3, 8, 8, 33))
    with pytest.raises(ValueError, match=message):
        kernel.score_attention(change(inputs), 0.01)


@pytest.mark.parametrize("name", ISAS)
def test_the_environment_forces_an_instruction_set(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("IFR_FAST_CPU_ISA", name)
        importlib.reload(kernel)
        forced = kernel.ISA
    importlib.reload(kernel)
    assert forced == name


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "ISA", "vax")
    with pytest.raises(ValueError, match="vax"):
        kernel.score_attention(float32(make_inputs(2, 2, 1, 1, 4, 4, 5)), 0.01)


def test_without_the_extension_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "ifr_fast.kernels.cpu._native", None)  # import fails
        importlib.reload(kernel)
    try:
        assert "C++17 compiler" in (kernel.unavailable() or "")
        with pytest.raises(ImportError, match="impl='cpu' needs the compiled extension"):
            kernel.score_attention(float32(make_inputs(2, 2, 1, 1, 4, 4, 5)), 0.01)
    finally:
        importlib.reload(kernel)
    assert kernel.unavailable() is None
