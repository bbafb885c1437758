"""Every kernel against the float64 oracle: shapes, flags, windows, dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_grid import (
    ALL,
    BF16,
    CPUS,
    EAGER,
    EVERY,
    F16,
    F32,
    F64,
    FLAGS,
    Case,
    Implementation,
    Shape,
    every,
    threads,
)
from random_inputs import random_inputs

from ifr_fast.kernels import reference

pytestmark = pytest.mark.usefixtures("poisoned")

SMALL: list[Shape] = [  # R, S, H, H_kv, K, V, D
    (1, 1, 1, 1, 4, 4, 5),
    (2, 2, 6, 3, 8, 10, 33),
    (7, 7, 6, 1, 8, 16, 24),
    (17, 17, 3, 3, 5, 3, 17),
    (35, 67, 3, 1, 24, 40, 70),
    (3, 131, 4, 2, 12, 40, 165),
]
LARGE: list[Shape] = [  # Triton's interpreter is too slow for these
    (1, 1, 1, 1, 1, 1, 1),
    (1, 1, 3, 1, 4, 4, 5),
    (7, 63, 6, 3, 16, 8, 33),
    (63, 63, 4, 1, 8, 12, 65),
    (63, 63, 6, 6, 5, 3, 17),
    (130, 130, 6, 3, 16, 24, 70),
    (9, 130, 7, 1, 12, 40, 65),
    (25, 300, 9, 3, 64, 64, 100),
    (3, 500, 4, 2, 24, 72, 600),
]
FEW: Shape = (9, 41, 4, 2, 8, 10, 70)
BLOCKS: list[Shape] = [(40, 140, 6, 3, 8, 10, 33), (70, 70, 4, 4, 16, 16, 64)]
MIXED: Shape = (20, 70, 6, 2, 8, 10, 33)


Entry = tuple[Implementation, Case, torch.dtype]


def grid() -> list[Entry]:
    """Every (implementation, case, dtype) of shapes, flags and dtypes."""
    found: list[Entry] = []
    for impl in EVERY:
        of_triton, of_cpu = impl.name == "triton", impl.name.startswith("cpu")
        shapes = SMALL if of_triton else SMALL + LARGE
        dtypes = [F32] if of_cpu else list(impl.tolerance)
        found += [(impl, Case(x, half=is_half(t)), t) for x in shapes for t in dtypes]
        if of_cpu:
            found += [(impl, Case(MIXED, half=True), dtype) for dtype in (BF16, F16)]
        found += [(impl, Case(MIXED, ALL, is_half(t)), t) for t in impl.tolerance]
        if of_triton:
            found += [(impl, Case(FEW, frozenset({x}), True), BF16) for x in FLAGS]
        for shape in [FEW] if of_triton else BLOCKS:
            found += [(impl, Case(shape, frozenset({x})), F32) for x in FLAGS]
        windows = [(40, 80, 1), (40, 80, 33), (3, 200, 70)]
        if of_cpu:
            windows += [(R, S, n) for R, S in ((150, 200), (7, 600)) for n in (1, 16, 64, 100)]
        shape = (2, 1, 8, 8, 40)
        found += [(impl, Case((R, S, *shape), window=n), F32) for R, S, n in windows]
    return found


def is_half(dtype: torch.dtype) -> bool:
    return dtype in (BF16, F16)


def name_of(x: object) -> str | None:
    if isinstance(x, Implementation):
        return x.name
    if not isinstance(x, Case):
        return str(x).removeprefix("torch.")
    flags = "all" if x.flags == ALL else "+".join(x.flags)
    window = "" if x.window is None else f"window {x.window}"
    return f"{x.shape} {flags}{window}".rstrip()


@pytest.mark.parametrize(("impl", "case", "dtype"), grid(), ids=name_of)
def test_agrees_with_the_oracle(impl: Implementation, case: Case, dtype: torch.dtype) -> None:
    impl.check(case, dtype)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", [0.0, 0.03])
@pytest.mark.parametrize("flags", [*(frozenset({f}) for f in FLAGS), ALL], ids="+".join)
@pytest.mark.parametrize("impl", [EAGER, *CPUS[:1]], ids=lambda x: x.name)
def test_flags_and_edges_above_keep(
    impl: Implementation, flags: frozenset[str], keep: float, seed: int
) -> None:
    """Float64 is tested too if the kernel takes it."""
    case = Case((9, 41, 4, 2, 8, 6, 19), flags, seed=seed)
    for dtype in impl.tolerance.keys() & {F64, F32}:
        impl.check(case, dtype, keep)


@given(
    S=st.integers(1, 60),
    share=st.floats(0.02, 1),
    H_kv=st.integers(1, 3),
    group=st.integers(1, 4),
    K=st.integers(1, 20),
    V=st.integers(1, 20),
    D=st.integers(1, 70),
    flags=st.sets(st.sampled_from(FLAGS)),
    size=st.sampled_from([0.25, 1.0, 8.0]),
    keep=st.sampled_from([0.0, 0.02]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=80, deadline=None)
def test_agrees_with_the_oracle_on_anything(
    S: int, share: float, H_kv: int, group: int, K: int, V: int, D: int, flags: set[str],
    size: float, keep: float, seed: int,
) -> None:  # fmt: skip
    R, H = max(1, int(share * S)), H_kv * group
    inputs = random_inputs(R, S, H, H_kv, K, V, D, seed=seed, dtype=F32, flags=flags)
    inputs = inputs._replace(v=inputs.v * size, y=inputs.y.where(inputs.y.abs() > 0.3, 0))
    with threads(1):
        expected = reference.score_attention(inputs, keep)
        got = EAGER.of(inputs, keep, F64)
    EAGER._replace(tolerance={F64: 1e-11}).assert_close(got, expected, S, F64, keep)
    for impl in CPUS[:1]:
        impl.assert_close(impl.of(inputs, keep), expected, S, keep=keep)


@every()
@pytest.mark.parametrize(("R", "D"), [(1, 1), (7, 33), (5, 1100), (130, 64)])
def test_ffn_agrees_with_the_oracle(impl: Implementation, R: int, D: int) -> None:
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, R, D, generator=g)
    for dtype in impl.tolerance:
        mid = first.to(dtype)
        post = (mid.float() + second).to(dtype)
        got = impl.score_ffn(mid, post)
        expected = reference.score_ffn(mid.double(), post.double())
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=1e-5)
