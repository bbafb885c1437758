"""The Triton kernels one by one, and their driver: on a GPU or, without one, interpreted."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from kernel_grid import (
    DEVICE,
    TRITON,
    Case,
    assert_bits_equal,
    inputs_of,
    log_sum_exp,
    on_device,
)
from oracle import assert_graph_agrees, importances
from paths import ROOT
from tiny import account, tiny_model, tiny_text
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ifr_fast import Tracer
from ifr_fast.kernels import breakpoints, reference
from ifr_fast.kernels.contract import LayerInputs, visible
from ifr_fast.kernels.rows import on_device as on_device_of_rows
from ifr_fast.scoring.implementations import load_kernel

pytest.importorskip("triton")

from ifr_fast.kernels.triton import (
    compact,
    correct,
    kernel,
    launch,
    linear,
    lists,
    prepare,
    proximity,
    reach,
    records,
    room,
    tiles,
)
from ifr_fast.kernels.triton.records import Block

DTYPES = list(TRITON.tolerance)


def make_inputs(
    *shape: int, dtype: torch.dtype = torch.float32, flags: frozenset[str] = frozenset()
) -> LayerInputs:
    """Float64 inputs (R, S, H, H_kv, K, V, D) that `dtype` can hold; a copy to write to."""
    inputs = inputs_of(Case(shape, flags, half=dtype != torch.float32))
    copied = {name: x.clone() for name, x in inputs._asdict().items() if isinstance(x, Tensor)}
    return inputs._replace(**copied)


def check(inputs: LayerInputs, dtype: torch.dtype = torch.float32) -> None:
    expected = reference.score_attention(inputs, 0.0)
    TRITON.assert_close(TRITON.of(inputs, dtype=dtype), expected, len(inputs.k), dtype)


@pytest.mark.usefixtures("poisoned")
def test_a_frontier_shares_out_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, own = [], linear.launch

    def watched(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        launched.append((kernel.__name__, grid))
        own(kernel, grid, *args, **kwargs)

    monkeypatch.setattr(linear, "launch", watched)
    case = Case((2, 400, 3, 1, 8, 8, 40), frozenset({"sinks"}))
    TRITON.check(case)
    last = int(inputs_of(case).rows[-1])
    assert last > 128
    assert dict(launched)["log_sum_exp_kernel"] == (1, 3, last // 32 + 1)
    assert dict(launched)["linear_kernel"] == (1, last // 64 + 1)


@pytest.mark.usefixtures("poisoned")
def test_lists_hold_every_pair_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a line's pairs need a correction, most of them more than the candidates give."""
    inputs = make_inputs(12, 40, 2, 1, 8, 8, 120)
    inputs = inputs._replace(
        q=inputs.q / 4, v=inputs.v.abs() + 0.1, W_O=inputs.W_O.abs() + 0.1, y=inputs.y.abs() / 1000
    )
    inputs = inputs.to(torch.float32).to(torch.float64)
    counts: list[Tensor] = []
    own = lists.lists

    def watched(x: Block) -> None:
        own(x)
        counts.append(x.work.counts)

    monkeypatch.setattr(lists, "lists", watched)
    monkeypatch.setattr(tiles, "CANDIDATES", 16)
    check(inputs)
    n_light, n_heavy = counts[0][1:].cpu()
    assert torch.equal(n_light + n_heavy, (inputs.rows + 1)[:, None].expand(12, 2).to(torch.int32))
    assert n_heavy.sum() > n_light.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "flags",
    [frozenset(), frozenset({"row_scale"}), frozenset({"value_gate", "row_scale"})],
    ids=lambda x: "+".join(x),
)
@pytest.mark.usefixtures("poisoned")
def test_both_tiers_of_corrections(
    dtype: torch.dtype, flags: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few and many heavy pairs a block of rows, of lines with light ones too."""
    monkeypatch.setattr(tiles, "CANDIDATES", 16)
    monkeypatch.setattr(tiles, "SHARES", 2)
    TRITON.check(Case((23, 90, 3, 1, 8, 20, 200), flags, dtype != torch.float32), dtype)


@pytest.mark.usefixtures("poisoned")
def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "WORK_BYTES", 1)
    TRITON.check(Case((37, 45, 2, 1, 8, 8, 33), frozenset({"row_scale", "value_gate", "ffn"})))


@pytest.mark.parametrize("keep", [0.0, 0.003])
@pytest.mark.usefixtures("poisoned")
def test_edges_of_a_block_are_packed_where_all_could_take_too_much(
    keep: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, slots = Case((37, 45, 2, 1, 8, 8, 33), frozenset({"ffn"})), []
    whole = TRITON.of(inputs_of(case), keep)
    monkeypatch.setattr(room, "EDGE_BYTES", 1)
    monkeypatch.setattr(room, "WORK_BYTES", 1)
    own = records.Rows.with_room_for_edges

    def watched(rows: records.Rows) -> records.Rows:
        slots.append((rows.R, rows.n_keys))
        return own(rows)

    monkeypatch.setattr(records.Rows, "with_room_for_edges", watched)
    TRITON.check(case, keep=keep)
    assert [n for n, _ in slots] == [16, 16, 5], "room for a block's edges at a time"
    scores = kernel.score_attention(on_device(inputs_of(case)), keep)
    assert (scores.edges.weight > keep).all(), "no padding is kept"
    assert_bits_equal(TRITON.of(inputs_of(case), keep), whole)


def test_rows_on_a_gpu_are_had_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pinned:
        def __init__(self, rows: Tensor) -> None:
            self.rows = rows

        def to(self, device: torch.device, *, non_blocking: bool) -> Any:
            return device, self.rows, non_blocking

    gpu = torch.device("cuda:1")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: Pinned(x))
    own = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *args, device: (device, own(*args)))
    device, rows = on_device_of_rows(own(5, 9), gpu)
    assert (device, rows.tolist()) == (gpu, [5, 6, 7, 8])
    for others in ([3, 5, 8], [3, 5, 4, 6]):
        device, rows, non_blocking = on_device_of_rows(torch.tensor(others), gpu)
        assert (device, rows.tolist(), non_blocking) == (gpu, others, True)


def test_room_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's blocks of rows take a power of two of bytes, a quarter of what is free at most."""
    held = {"memory_reserved": 5 << 30, "memory_allocated": 4 << 30}
    for name, n in held.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, n=n: n)
    for free, expected in ((1, 2), (30, 4), (31, 8), (50, 8), (500, 16)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free << 30, 80 << 30))
        assert room.block_bytes(torch.device("cuda")) == expected << 30
    assert room.block_bytes(torch.device("cpu")) == room.WORK_BYTES
    H, S, slots = 32, 8192, 25
    rows = room.block_rows(H, S, 4 << 30, slots)
    assert rows % room.ROWS == 0
    assert rows * (9 * H * S + slots * (12 + 4 * H)) <= 4 << 30


def test_work_is_bounded_where_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks take more where it is free, but not beside a `max_memory`."""
    monkeypatch.setattr(room, "WORK_BYTES", 1)
    monkeypatch.setattr(room, "block_bytes", lambda _: 1 << 20)
    sizes: list[int] = []
    own = kernel.block

    def watched(layer: records.Layer, rows: records.Rows) -> Block:
        sizes.append(rows.R)
        return own(layer, rows)

    monkeypatch.setattr(kernel, "block", watched)
    given = on_device(inputs_of(Case((37, 45, 2, 1, 8, 8, 33))), torch.float32)
    for bounded, expected in ((False, [37]), (True, [16, 16, 5])):
        load_kernel("triton", bounded=bounded).score_attention(given, 0.1)
        assert sizes == expected
        sizes.clear()
    tracer = Tracer(tiny_model("llama").to(DEVICE), impl="triton", max_memory="8GB")
    tracer.trace_all(tiny_text(17))
    assert sizes == [16, 1] * tracer.decoder.n_layers


def test_rows_that_are_many_stay_so_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The room for a block of rows changes no bit of the results."""
    case = Case((70, 70, 2, 1, 8, 8, 33))  # the rows of the last block would be few
    whole = TRITON.of(inputs_of(case), dtype=torch.bfloat16)
    monkeypatch.setattr(room, "WORK_BYTES", 1)
    assert_bits_equal(TRITON.of(inputs_of(case), dtype=torch.bfloat16), whole)


def test_launches_are_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second GPU stands in: tensors without data, and the device that a launch would be on."""
    current = [0]

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        before, current[0] = current[0], x.get_device()
        yield
        current[0] = before

    launched: list[int] = []

    def noted(_: Any, grid: tuple[int, ...], given: Any, **tiles: Any) -> None:
        tensors = [x for record in given for x in record if isinstance(x, Tensor)]
        assert {str(x.device) for x in tensors} == {"cuda:1"}
        launched.append(current[0])

    for module in (prepare, reach, linear, lists, correct, proximity, compact):
        monkeypatch.setattr(module, "launch", noted)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(tiles, "INTERPRETED", True)
    monkeypatch.setattr(records, "_aligned", lambda x: x)
    # Tensors without data have no rows to read, and cannot be indexed where torch has no GPU.
    monkeypatch.setattr(records.Rows, "cut", lambda rows, *_: rows)
    monkeypatch.setattr(records, "on_device", lambda x, device: x.to(device))
    monkeypatch.setattr(kernel, "_row_blocks", lambda *_: [(slice(0, 40), 64)])
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = make_inputs(40, 64, 4, 2, 8, 8, 32, flags=frozenset({"ffn"})).to(torch.bfloat16)
        moved = {
            name: torch.empty(x.shape, dtype=x.dtype, device="cuda:1")
            for name, x in inputs._asdict().items()
            if isinstance(x, Tensor) and name != "rows"
        }
        moved["W_O"] = moved["W_O"].new_empty(4, 32, 8).transpose(1, 2)
        kernel.score_attention(inputs._replace(**moved), 0.04)
        kernel.score_ffn(moved["y"], moved["resid_pre"])
    assert len(launched) > 15
    assert set(launched) == {1}
    assert current == [0]


def test_refuses_what_it_cannot_read() -> None:
    inputs = on_device(make_inputs(2, 3, 2, 1, 4, 4, 9))
    with pytest.raises(ValueError, match=r"y: .*float64"):
        kernel.score_attention(inputs._replace(y=inputs.y.double()), 0.01)
    with pytest.raises(ValueError, match=r"v: expected on (cpu|cuda).*meta"):
        kernel.score_attention(inputs._replace(v=inputs.v.to("meta")), 0.01)


# Each kernel by itself


def prepared(inputs: LayerInputs, dtype: torch.dtype) -> Block:
    """The kernels' records for all rows at once, with room for results (all NaN)."""
    layer, rows = records.prepared(on_device(inputs, dtype), 0.0)
    return records.block(layer, rows.with_room_for_edges())


def on_cpu(record: Any) -> Any:
    return record._make(x.cpu() if isinstance(x, Tensor) else x for x in record)


def half_sum(g: Tensor, scale: Tensor) -> Tensor:
    """g [R, H, V] from its halves [R, H, HALVES, V]."""
    return g.double().sum(2) * scale.double()[..., None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_prepare_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(
        5, 37, 3, 3, 8, 20, 150, dtype=dtype, flags=frozenset({"row_scale", "value_gate"})
    )
    inputs.W_O[0, :, 7] = 0
    monkeypatch.setattr(tiles, "CANDIDATES", 32)
    x = prepared(inputs, dtype)
    prepare.weights(x.layer)
    prepare.values(x.layer)
    prepare.lines(x)
    layer, work = on_cpu(x.layer), on_cpu(x.work)

    rho = breakpoints.column_norms(inputs.W_O)
    for got in (layer.rho_inv, layer.rho_inv_t.T):
        torch.testing.assert_close(got.double(), torch.where(rho > 0, 1 / rho, 0))
    torch.testing.assert_close(layer.v_norm.double(), inputs.v.norm(dim=-1).T)

    g = breakpoints.value_space_signs(inputs.W_O, breakpoints.signs(inputs.y)).transpose(0, 1)
    g = g * inputs.value_gate * inputs.row_scale[:, None, None]
    got = half_sum(work.g, work.lines[1])
    rounding = {torch.float32: 2**-20, torch.bfloat16: 2**-15, torch.float16: 2**-19}[dtype]
    assert ((got - g).abs() <= rounding * g.abs().amax(-1, keepdim=True)).all()

    points = breakpoints.breakpoints(inputs.y, rho).transpose(0, 1)  # [R, H, D]
    points = points / inputs.row_scale.abs()[:, None, None]
    torch.testing.assert_close(work.lines[2].double(), points.amin(-1))
    limit, n = work.lines[3].double()[..., None], work.counts[0]
    assert ((n > 0) & (n <= 32)).all()
    assert n.float().mean() > 12, "the search for the limit must use the room there is"
    used = torch.arange(32) < n[..., None]
    listed = torch.zeros(5, 3, 151, dtype=torch.bool)
    listed.scatter_(2, torch.where(used, work.candidates, 150).long(), used)
    away = (points / limit - 1).abs() > 1e-5  # but for ties
    assert torch.equal(listed[..., :150] & away, (points < limit) & away)


@pytest.mark.parametrize("spread", [0.0, 1.5], ids=["even", "uneven"])
@pytest.mark.usefixtures("poisoned")
def test_nearest_coordinates_alone(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only some coordinates of wider rows are read, and the others do not matter."""
    inputs = make_inputs(9, 20, 4, 2, 8, 8, 300, flags=frozenset({"row_scale"}))
    generator = torch.Generator().manual_seed(1)
    columns = (spread * torch.randn(300, generator=generator, dtype=torch.float64)).exp()
    inputs = inputs._replace(W_O=inputs.W_O * columns)
    inputs.W_O[0, :, 7] = 0
    inputs.W_O[1] = 0
    inputs.W_O[:, :, 11] = 0
    inputs.y[0, 11:13] = 0
    inputs.row_scale[3] = 0
    monkeypatch.setattr(tiles, "CANDIDATES", 16)
    monkeypatch.setattr(tiles, "NEAREST", 64)
    x = prepared(inputs, torch.float32)
    prepare.weights(x.layer)
    prepare.values(x.layer)
    prepare.lines(x)
    work = on_cpu(x.work)
    near = work.nearest < 300
    n_near = near.sum(1)[torch.arange(9) != 3]
    assert ((n_near > 0) & (n_near <= 64)).all()
    assert n_near.float().mean() > 24, "the search must use the room there is"
    rho = breakpoints.column_norms(inputs.W_O.float().double())
    points = breakpoints.breakpoints(inputs.y, rho).transpose(0, 1)  # [R, H, D]
    points = points / inputs.row_scale.abs()[:, None, None]
    points[3] = math.inf
    first, limit = work.lines[2:].double()
    assert (first <= points.amin(-1) * (1 + 1e-6)).all()
    found = torch.zeros(9, 4, 301, dtype=torch.bool)
    used = torch.arange(16) < work.counts[0][..., None]
    found.scatter_(2, torch.where(used, work.candidates, 300).long(), used)
    away = (points / limit[..., None] - 1).abs() > 1e-5  # but for ties
    assert torch.equal(found[..., :300] & away, (points < limit[..., None]) & away)
    some = torch.arange(9) != 3
    n = work.counts[0][some][:, [0, 2, 3]]
    assert n.float().mean() > (8 if spread == 0 else 3)


@pytest.mark.usefixtures("poisoned")
def test_one_float16_alone() -> None:
    """G of a bfloat16 model whose rows are many: half a unit in the last place of each number."""
    inputs = make_inputs(
        9, 37, 3, 3, 8, 20, 150, dtype=torch.bfloat16, flags=frozenset({"row_scale"})
    )
    x = prepared(inputs, torch.bfloat16)
    assert x.layer.v_scale is not None
    prepare.weights(x.layer)
    prepare.values(x.layer)
    prepare.lines(x)
    g = breakpoints.value_space_signs(inputs.W_O, breakpoints.signs(inputs.y)).transpose(0, 1)
    g = g * inputs.row_scale[:, None, None]
    got = half_sum(x.work.g.cpu(), x.work.lines[1].cpu())
    assert ((got - g).abs() <= 2**-11 * g.abs() + 2**-20 * g.abs().amax()).all()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.usefixtures("poisoned")
def test_half_values_alone(size: float) -> None:
    """Bfloat16 values as float16, by a power of two a KV head: exact, whatever their size."""
    inputs = make_inputs(8, 37, 6, 3, 8, 20, 30, dtype=torch.bfloat16)
    sizes = size * torch.tensor([1.0, 2.0**-40, 0.0])[:, None]
    inputs = inputs._replace(v=(inputs.v * sizes).to(torch.bfloat16).double())
    x = prepared(inputs, torch.bfloat16)
    prepare.values(x.layer)
    layer = on_cpu(x.layer)
    assert layer.v16.dtype == torch.float16
    got = layer.v16.double() * layer.v_scale.double()[:, None]
    tiny = inputs.v.abs() < 2**-30 * inputs.v.abs().amax((0, 2))[:, None]
    assert torch.equal(got.where(~tiny, 0), inputs.v.where(~tiny, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_nearest_coordinates_in_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CANDIDATES", 16)
    monkeypatch.setattr(tiles, "NEAREST", 32)
    case = Case((23, 90, 3, 1, 8, 20, 200), frozenset({"row_scale"}), dtype != torch.float32)
    TRITON.check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_reach_alone(dtype: torch.dtype) -> None:
    inputs = make_inputs(70, 70, 6, 3, 8, 20, 150, dtype=dtype)
    inputs.W_O[0, :, 7] = 0
    inputs.v[5] = 0
    x = prepared(inputs, dtype)
    prepare.weights(x.layer)
    prepare.values(x.layer)
    reach.reach(x.layer)
    u = torch.einsum("shv,hvd->hsd", inputs.v.repeat_interleave(2, dim=1), inputs.W_O)
    rho = breakpoints.column_norms(inputs.W_O)[:, None]
    norm = inputs.v.repeat_interleave(2, dim=1).norm(dim=-1).T[..., None]
    cosines = torch.where((rho > 0) & (norm > 0), u / (rho * norm), 0)
    expected = cosines.abs().amax(-1) * norm[..., 0]
    torch.testing.assert_close(x.layer.reach.cpu().double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("R", "S"), [(40, 70), (2, 150)])
@pytest.mark.usefixtures("poisoned")
def test_linear_and_lists_alone(R: int, S: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(R, S, 4, 2, 8, 20, 150)
    monkeypatch.setattr(tiles, "CANDIDATES", 16)
    x = prepared(inputs, torch.float32)
    prepare.weights(x.layer)
    prepare.values(x.layer)
    assert (R == 40) == x.layer.REACH
    if x.layer.REACH:
        reach.reach(x.layer)
    prepare.lines(x)
    linear.log_sum_exp(x)
    linear.linear(x)
    alpha_left = x.work.proximity.cpu().clone()
    lists.lists(x)
    work = on_cpu(x.work)

    lse = work.lines[0].double() * math.log(2)
    torch.testing.assert_close(lse, log_sum_exp(inputs), rtol=0, atol=1e-5)

    alpha = reference.attention_pattern(inputs)  # [R, H, S]
    v = inputs.v.repeat_interleave(2, dim=1)
    g = half_sum(work.g, work.lines[1])
    lin = alpha * torch.einsum("rhv,shv->rhs", g, v)
    size = v.norm(dim=-1).T  # [H, S]
    if x.layer.REACH:
        u = torch.einsum("shv,hvd->hsd", v, inputs.W_O)
        size = (u.abs() / breakpoints.column_norms(inputs.W_O)[:, None]).amax(-1)
    a = alpha * size * breakpoints.ROUND_UP
    first, limit = work.lines[2:].double()[..., None]
    mask = visible(inputs.rows, S, None)[:, None]
    needs = (lin > 0) & (a > first) & mask
    sure = ((a / first - 1).abs() > 1e-4) & ((a / limit - 1).abs() > 1e-4) & (lin.abs() > 1e-9)
    for tier, expected in enumerate((needs & (a <= limit), needs & (a > limit))):
        words = work.marks[tier]
        bits = ((words[..., None] >> torch.arange(32)) & 1).flatten(-2)[..., :S].bool() & mask
        assert torch.equal(bits & sure, expected & sure)
        assert bits.any()
        left = alpha_left[..., :S][bits].double()
        torch.testing.assert_close(left, alpha[bits], rtol=1e-5, atol=1e-7)
        n = work.counts[1 + tier]
        for r in range(R):
            for h in range(4):
                line = work.pairs[r, h]
                line = line.flip(0) if tier else line
                keys = bits[r, h].nonzero().squeeze(1).tolist()
                assert line[: n[r, h]].tolist() == keys
    token = torch.where(mask[:, 0], work.token[:, :S].double(), 0)
    words = work.marks[0] | work.marks[1]
    marked = ((words[..., None] >> torch.arange(32)) & 1).flatten(-2)[..., :S].bool()
    unlisted = torch.where(marked | ~mask, 0, lin.clamp(min=0))
    torch.testing.assert_close(token, unlisted.sum(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("step", [correct.light, correct.heavy], ids=["light", "heavy"])
@pytest.mark.usefixtures("poisoned")
def test_corrections_alone(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All visible pairs listed by hand, in one tier; the candidates are all coordinates."""
    inputs = make_inputs(5, 23, 4, 2, 8, 20, 30, flags=frozenset({"row_scale"}))
    monkeypatch.setattr(tiles, "CANDIDATES", 32)
    x = prepared(inputs, torch.float32)
    prepare.weights(x.layer)
    prepare.values(x.layer)
    reach.reach(x.layer)
    prepare.lines(x)
    alpha = reference.attention_pattern(inputs)
    seen = visible(inputs.rows, 23, None)[:, None].expand_as(alpha)
    x.work.proximity[..., :23] = alpha.where(seen, math.nan).to(DEVICE, torch.float32)
    front = step is correct.light
    for r, t in enumerate(inputs.rows.tolist()):
        line = torch.arange(t + 1, dtype=torch.int32, device=DEVICE)
        x.work.pairs[r, :, slice(t + 1) if front else slice(-t - 1, None)] = line
        x.work.counts[1, r] = (t + 1) * front
        x.work.counts[2, r] = (t + 1) * (not front)
    step(x)
    v = inputs.v.repeat_interleave(2, dim=1)
    alpha = alpha * inputs.row_scale[:, None, None]
    parts = torch.einsum("rhs,shv,hvd->rhsd", alpha, v, inputs.W_O)
    expected = reference.proximity(parts, inputs.y[:, None, None])
    got = x.work.proximity.cpu()
    torch.testing.assert_close(got[..., :23][seen].double(), expected[seen], rtol=1e-5, atol=1e-5)
    assert got[..., 23:].isnan().all()


@pytest.mark.usefixtures("poisoned")
def test_parts_alone() -> None:
    inputs = make_inputs(5, 9, 2, 1, 4, 4, 1500, flags=frozenset({"ffn"}))
    x = prepared(inputs, torch.float32)
    proximity.parts(x)
    for got, part in ((x.rows.residual, inputs.resid_pre), (x.rows.of_ffn, inputs.ffn)):
        expected = reference.proximity(part, inputs.y)
        torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("window", [None, 1500])
@pytest.mark.usefixtures("poisoned")
def test_fold_and_totals_alone(window: int | None) -> None:
    """Two tiles of keys, marks at random, proximities whole numbers."""
    S, H, BS = 2200, 2, 64
    inputs = make_inputs(3, S, H, 1, 4, 4, 9)._replace(window=window)
    mask = visible(inputs.rows, S, window)[:, None]
    g = torch.Generator().manual_seed(0)
    x = prepared(inputs, torch.float32)
    n_blocks, n_words = -(-S // BS), x.work.n_words
    some = torch.full((2, n_blocks, 3, H), math.nan, device=DEVICE)
    x = x._replace(work=x.work._replace(BS=BS, partial=some[0], partial_lin=some[1]))
    rows, work = x.rows, x.work
    marked = torch.rand(3, H, n_words * 32, generator=g) < 0.1
    words = (marked.view(3, H, n_words, 32).long() << torch.arange(32)).sum(-1)
    work.marks[0] = words.where(words < 2**31, words - 2**32).to(DEVICE)
    work.marks[1] = 0
    values = torch.randint(9, (3, H, n_words * 32), generator=g).float()
    work.proximity.copy_(values.where(marked, math.nan))
    token = torch.randint(9, (3, n_words * 32), generator=g).float()
    work.token.copy_(token)
    seen = mask[:, 0].nonzero()
    partial = torch.zeros(n_blocks, 3, H)
    for r, j in {(int(r), int(j) // BS) for r, j in seen.tolist()}:
        partial[j, r] = j + 1
        work.partial[j, r] = j + 1
        work.partial_lin[j, r] = -(j + 1)
    rows.residual.fill_(1)
    compact.fold(x)
    compact.totals(x)
    listed = torch.where(marked[..., :S] & mask, values[..., :S], 0)
    heads = listed.sum(-1) + partial.sum(0)
    total = 1 + heads.sum(-1)
    assert torch.equal(rows.total.cpu(), total)
    assert torch.equal(rows.linear.cpu(), -partial.sum((0, 2)))
    torch.testing.assert_close(rows.head_total.cpu(), heads / total[:, None])
    torch.testing.assert_close(rows.residual.cpu(), 1 / total)
    expected = torch.where(mask[:, 0], token[:, :S] + listed.sum(1), 0)
    assert torch.equal(torch.where(mask[:, 0], work.token.cpu()[:, :S], 0), expected)


def test_records_have_no_name_twice() -> None:
    """Kernels find their parameters by name among all of them."""
    kinds = (records.Layer, records.Rows, records.Work, linear.Splits)
    names = [name for kind in kinds for name in kind._fields]
    assert len(names) == len(set(names))


def test_launches_pick_parameters_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sizes(NamedTuple):
        R: int
        floor: float

    class Tensors(NamedTuple):
        y: str
        rest: str

    seen: list[Any] = []

    class Kernel:
        @staticmethod
        def fn(p_y, floor, R, BT):  # type: ignore[no-untyped-def]
            pass

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: seen.append((grid, args, options))

    given = (Sizes(3, 0.5), Tensors("y", "rest"))
    for BT in (16, 32):
        launch.launch(Kernel(), (1, 2), given, num_warps=4, BT=BT)
    launch.launch(Kernel(), (0, 2), given, num_warps=4, BT=16)

    @contextmanager
    def around(name: str) -> Iterator[None]:
        seen.append(f"before {name}")
        yield
        seen.append(f"after {name}")

    monkeypatch.setattr(launch, "around", around)
    launch.launch(Kernel(), (1, 2), given, num_warps=4, BT=64)
    assert [seen.pop(i) for i in (2, -1)] == ["before fn", "after fn"]
    seen.pop()
    assert seen == [((1, 2), ("y", 0.5, 3, BT), {"num_warps": 4}) for BT in (16, 32)]


def test_host_code_is_typed() -> None:
    """mypy cannot ask for it: jitted functions beside it have no Python types."""
    folder = ROOT / "kernels" / "triton"
    for path in folder.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            name = f"{path.name}: {function.name}"
            if any("jit" in ast.unparse(decorator) for decorator in function.decorator_list):
                assert ast.get_docstring(function), name
            else:
                arguments = [a for a in ast.walk(function.args) if isinstance(a, ast.arg)]
                assert function.returns is not None, name
                assert all(a.annotation or a.arg == "self" for a in arguments), name


# Whole graphs


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_graphs_agree_with_the_oracle(family: str) -> None:
    model, text = tiny_model(family), tiny_text(17)
    graph = Tracer(model.to(DEVICE), impl="triton").trace(text, threshold=0.05)
    expected = [importances(layer) for layer in account(model.cpu(), text)]
    assert_graph_agrees(graph, expected, 1e-4 if DEVICE.type == "cuda" else 1e-5)
    assert len(graph.edges.layer) > 5
