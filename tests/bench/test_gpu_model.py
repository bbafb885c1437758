"""bench/gpu_model: its arithmetic, and its formulas against counts of the kernels themselves."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import roofline
import torch
import triton
import triton.language as tl
from counts import Counts, count
from gpu_model import attribution, counts_model, forward, shapes
from gpu_model.interpreted import counting
from gpu_model.shapes import LLAMA_8B, LLAMA_70B, TARGETS, Work
from gpu_model.triton_work import Launch, Lists, asked, blocks_of, launching, lengths
from random_inputs import random_inputs

from ifr_fast.kernels.triton import kernel, room

interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="expected: kernels run on a device here"
)


@triton.jit
def product_kernel(
    p_a, p_b, p_c, p_sum, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """C [M, N] = 2^(a [M, K] @ b [K, N]), and row sums of the product."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_m, m_n = o_m[:, None] < M, o_n[None, :] < N
    b_c = tl.zeros([BM, BN], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_a = tl.load(p_a + o_m[:, None] * K + o_k, mask=m_m & (o_k < K)[None, :], other=0.0)
        b_b = tl.load(p_b + o_k[:, None] * N + o_n, mask=(o_k < K)[:, None] & m_n, other=0.0)
        b_c = tl.dot(b_a, b_b, b_c, input_precision="ieee")
    tl.store(p_c + o_m[:, None] * N + o_n, tl.exp2(b_c), mask=m_m & m_n)
    tl.atomic_add(p_sum + o_m, tl.sum(b_c, 1), mask=o_m < M)


@interpreted
def test_counting_a_product() -> None:
    M, N, K, BM, BN, BK = 37, 50, 70, 16, 32, 32
    a, b = torch.randn(M, K).half() / 8, torch.randn(K, N).half() / 8
    c, row_sum = torch.empty(M, N), torch.zeros(M)
    with counting() as work:
        product_kernel[3, 2](a, b, c, row_sum, M, N, K, BM, BN, BK)
    product = a.float() @ b.float()
    torch.testing.assert_close(c, product.exp2())
    torch.testing.assert_close(row_sum, product.sum(1))

    done = work["product_kernel"]
    assert (done.launches, done.programs) == (1, 6)
    assert done.loads == 2 * M * K + 3 * K * N  # two column blocks read a, three row blocks b
    assert done.loaded == 2 * done.loads
    assert (done.stores, done.stored) == (M * N, 4 * M * N)
    assert (done.atomics, done.atomic) == (2 * M, 4 * 2 * M)
    assert done.products == {"fp16": 6 * 3 * BM * BN * BK}
    assert done.special == 6 * BM * BN
    assert done.distinct_loaded == 2 * (M * K + K * N)
    assert done.distinct_stored == 4 * (M * N + M)


SHAPES = {
    "tiles": {"R": 128, "S": 128, "H": 2, "H_kv": 1, "K": 64, "V": 64, "D": 128},
    "odd": {"R": 70, "S": 91, "H": 3, "H_kv": 1, "K": 24, "V": 40, "D": 70},
    "wide": {"R": 40, "S": 128, "H": 2, "H_kv": 1, "K": 32, "V": 32, "D": 600},
    "few rows": {"R": 16, "S": 153, "H": 4, "H_kv": 2, "K": 32, "V": 16, "D": 24},
    "recorded sums": {"R": 40, "S": 64, "H": 3, "H_kv": 3, "K": 16, "V": 16, "D": 40},
    "one row": {"R": 1, "S": 1, "H": 2, "H_kv": 1, "K": 16, "V": 32, "D": 40},
}


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_formulas_are_what_the_kernels_do(
    shape: str, dtype: torch.dtype, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products, bytes loaded and bytes stored agree exactly, kernel by kernel."""
    if shape == "odd":
        monkeypatch.setattr(room, "WORK_BYTES", 1 << 16)  # several blocks
    inputs = random_inputs(**SHAPES[shape], dtype=dtype).to(dtype)
    if shape == "recorded sums":
        inputs = inputs._replace(log_sum_exp=torch.full(inputs.q.shape[:2], 3.0))
    launches: list[Launch] = []
    found: dict[str, list[float]] = {}

    def note(launch: Launch) -> None:
        launches.append(launch)
        if launch.kernel == "head_weights_kernel":
            flush(lengths([one for one in launches if len(one.rows)]))

    def flush(of: Lists) -> None:
        for launch in launches:
            work = asked(launch, of)
            sums = found.setdefault(launch.kernel, [0, 0, 0, 0])
            parts = (work.products, work.loaded, work.stored, work.vector + work.masks)
            sums[:] = [x + y for x, y in zip(sums, parts, strict=True)]
        launches.clear()

    with counting() as counted, launching(inputs, note):
        kernel.score_attention(inputs, 0.01)
        kernel.score_ffn(inputs.resid_pre, inputs.y)
    flush(Lists())

    unused = set() if shape != "few rows" else {"reach_kernel"}
    unused |= {"log_sum_exp_kernel", "combine_kernel"} if shape == "recorded sums" else set()
    halved = dtype == torch.bfloat16 and shape != "few rows"
    unused |= set() if halved else {"half_values_kernel"}
    assert found.keys() == counted.keys() == attribution.STEPS.keys() - unused
    for name, work in counted.items():
        products, loaded, stored, _ = found[name]
        assert (products, loaded, stored) == (work.products.total(), work.loaded, work.stored), name
        assert work.atomics == 0
    if shape == "tiles" and dtype != torch.float32:  # which the coefficients are for
        for name, work in counted.items():
            # The interpreter's own casts of operands are none of the kernel's.
            vector = work.vector - work.operands
            assert found[name][3] == pytest.approx(vector, rel=0.15), name


def test_launches_without_data_are_the_same() -> None:
    shape = {"R": 70, "S": 300, "H": 4, "H_kv": 2, "K": 32, "V": 16, "D": 96}
    inputs = random_inputs(**shape, dtype=torch.bfloat16).to(torch.bfloat16)
    on_meta = inputs._replace(
        **{
            name: x.to("meta")
            for name, x in inputs._asdict().items()
            if isinstance(x, torch.Tensor) and name != "rows"
        }
    )
    on_cpu: list[Launch] = []
    with launching(inputs, on_cpu.append, run=False):
        kernel.score_attention(inputs, 0.04)
        kernel.score_ffn(inputs.resid_pre, inputs.y)
    found: list[Launch] = []
    blocks_of(on_meta, 0.04, 90, found.extend)
    assert len(found) == len(on_cpu) > 10
    for a, b in zip(found, on_cpu, strict=True):
        assert (a.kernel, a.grid, a.rows.tolist()) == (b.kernel, b.grid, b.rows.tolist())


def test_parameters() -> None:
    """Those that the models are known to have, less embeddings, head and norms."""
    of_8b = 8_030_261_248 - 2 * 128_256 * 4096 - 65 * 4096
    of_70b = 70_553_706_496 - 2 * 128_256 * 8192 - 161 * 8192
    assert LLAMA_8B.L * LLAMA_8B.layer_parameters == of_8b
    assert LLAMA_70B.L * LLAMA_70B.layer_parameters == of_70b


def test_forward_pass() -> None:
    T = 8192
    work = forward.forward(LLAMA_8B, T)
    parameters = 8_030_261_248 - 2 * 128_256 * 4096 - 65 * 4096
    assert work["linear maps"][0].matrix == 2 * parameters * T
    # Causal: half of 4 T^2 H K, and the diagonal.
    assert work["attention"][0].matrix == 4 * 32 * 32 * 128 * T * (T + 1) / 2
    assert work["head"][0].matrix == 2 * 4096 * 128_256
    total = sum(w.matrix for w, _ in work.values())
    assert total == pytest.approx(2 * 7.5e9 * T + 2 * 32 * 4096 * T * T, rel=0.08)


def test_naive_and_materializing() -> None:
    T, m = 1024, LLAMA_8B
    naive = forward.naive_l1(m, T)
    assert naive.vector == 32 * 2 * (T * (T + 1) / 2) * 32 * 4096
    assert forward.materializing(m, T).memory == 32 * 2 * 2 * T * T * 32 * 4096


def test_time_is_the_largest_ceiling() -> None:
    h100 = TARGETS["H100"]
    assert Work(matrix=h100.matrix).seconds(h100, shapes.PEAK) == 1
    assert Work(vector=h100.fp32).seconds(h100, shapes.PEAK) == 2
    assert Work(special=h100.fp32 / 16).seconds(h100, shapes.PEAK) == 1
    both = Work(matrix=h100.matrix, memory=3 * h100.memory)
    assert both.seconds(h100, shapes.PEAK) == pytest.approx(3)
    half = shapes.PEAK._replace(memory=0.5)
    assert both.seconds(h100, half) == pytest.approx(6)


def test_fit_finds_the_exponents() -> None:
    entries: list[dict[str, Any]] = [
        {
            "T": 512,
            "D": D,
            "H": D // 64,
            "V": 64,
            "mean": {"share": share, "x": D**1.5 * share**0.4},
        }
        for D in (256, 1024)
        for share in (0.1, 0.3)
    ]
    entries.append({"T": 64, "D": 256, "H": 4, "V": 64, "mean": {"share": 1.0, "x": 1.0}})
    growth = counts_model.fit(entries, lambda mean: mean["x"])
    assert growth == pytest.approx((1.5, 0.4))


def test_extension_scales_visits() -> None:
    counts = counts_model.Counts(json.loads(roofline.COUNTS.read_text()))
    assert 1.3 < counts.visits.width < 1.7  # D sqrt(H V), as H V = D
    assert 0.9 < counts.visits.share < 1.2
    here = counts.measured(8192)["mean"]["by_norm"]["visited"]
    by_width = LLAMA_8B.D / 576
    for extension, growth in (("low", 1.0), ("high", 32 * 128**0.5 / (9 * 64**0.5))):
        wide = counts.extended(LLAMA_8B, 8192, extension, lambda mean: mean["by_norm"]["visited"])
        assert wide == pytest.approx(here * by_width * growth)
    with pytest.raises(ValueError, match="extension: expected low, mid or high"):
        counts.visits_growth(LLAMA_8B, "middle")


def brute_force(inputs: Any, by_reach: bool) -> tuple[float, float]:
    """Pairs listed and coordinates visited per row, pair by pair."""
    listed = visited = 0
    R, H, _ = inputs.q.shape
    group = H // inputs.k.shape[1]
    rho = inputs.W_O.square().sum(1).sqrt()
    for r, t in enumerate(inputs.rows.tolist()):
        for h in range(H):
            k, v = inputs.k[: t + 1, h // group], inputs.v[: t + 1, h // group]
            alpha = (k @ inputs.q[r, h] * inputs.scale).softmax(-1)
            s = torch.where(inputs.y[r] >= 0, 1.0, -1.0)
            for j in range(t + 1):
                u = v[j] @ inputs.W_O[h]
                size = (u.abs() / rho[h]).max() if by_reach else v[j].norm()
                a = alpha[j] * size * (1 + 2**-10)
                n = int((inputs.y[r].abs() < a * rho[h]).sum()) if s @ u > 0 else 0
                listed += n > 0
                visited += n
    return listed / R, visited / R


def test_counts_pair_by_pair() -> None:
    inputs = random_inputs(9, 40, 4, 2, 8, 8, 24).to(torch.float32)
    found: Counts = count(inputs)
    for pairs, by_reach in ((found.by_norm, False), (found.by_reach, True)):
        listed, visited = brute_force(inputs, by_reach)
        assert (pairs.listed, pairs.visited) == pytest.approx((listed, visited))
        assert sum(pairs.by_size) == pytest.approx(listed)
        assert sum(pairs.visits_by_size) == pytest.approx(visited)
        assert pairs.at_least_8 == pytest.approx(sum(pairs.by_size[3:]))
        for tier in pairs.tiers:  # D is at most the room of each: every pair is light
            assert (tier.light, tier.heavy) == (pytest.approx(listed), 0)
            assert tier.light_lines <= tier.light_tiles[0]
            assert tier.light_tiles[0] <= tier.light_lines * math.ceil(40 / 16)
    visited = found.by_norm.visited
    assert visited <= found.native_visited <= 1.2 * visited
    assert found.by_reach.visited < visited


def test_prints_and_writes(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "roofline.json"
    monkeypatch.setattr("sys.argv", ["roofline.py", "--lengths", "8192", "--json", str(path)])
    roofline.main()
    out = capsys.readouterr().out
    document = json.loads(path.read_text())
    for claim in document["claims"]:
        assert claim["text"] in out
    shares = {row["model"]: row["all_positions"] for row in document["rows"]}
    for share in shares.values():
        assert share["low"] < share["mid"] < share["high"]
    kernels = document["kernels"]["Llama-3-8B, T = 8192"]["mid"]
    seconds = sum(work["seconds"] for work in kernels.values())
    assert seconds / document["rows"][0]["forward_seconds"] == pytest.approx(
        shares["Llama-3-8B"]["mid"]
    )
    assert all(math.isfinite(x) for work in kernels.values() for x in work.values())
