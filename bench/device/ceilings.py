"""The speeds that the device reaches: copying, multiplying, reading its last cache, launching."""

from __future__ import annotations

import time
from typing import Any

import torch
import triton
import triton.language as tl
from device.common import Check


@triton.jit
def read_kernel(p_x, p_out, n, repeat, BLOCK: tl.constexpr):
    """Reads x [n] `repeat` times, all programs together, each time from another place on."""
    o = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    per_program = n // tl.num_programs(0)
    for i in range(repeat):
        start = (tl.program_id(0) + i) % tl.num_programs(0) * per_program
        for j in range(0, per_program, BLOCK):
            b_sum += tl.load(p_x + start + j + o)
    tl.store(p_out + tl.program_id(0), tl.sum(b_sum))


@triton.jit
def empty_kernel(p_x):
    """Does nothing."""


def run(check: Check) -> None:
    """Appends each speed beside the vendor's."""
    small, device, target = check.stand_in, check.device, check.target
    n = 1 << 20 if small else 1 << 29
    source = torch.randn(n, device=device)
    copy = torch.empty_like(source)
    ms = check.milliseconds(lambda: copy.copy_(source))
    found(check, "copy, TB/s", 8 * n / ms / 1e9, target.memory / 1e12)
    n = 128 if small else 8192
    a, b = torch.randn(2, n, n, device=device).to(torch.bfloat16)
    ms = check.milliseconds(lambda: a @ b)
    found(check, "bfloat16 product, TFLOP/s", 2 * n**3 / ms / 1e9, target.matrix / 1e12)
    programs, block, repeat = (4, 256, 2) if small else (528, 1024, 200)
    size = programs * block * (2 if small else 11)  # 24 MB
    x, sums = torch.randn(size, device=device), torch.empty(programs, device=device)
    grid: Any = read_kernel[(programs,)]
    ms = check.milliseconds(lambda: grid(x, sums, size, repeat, BLOCK=block))
    found(check, "last cache, TB/s", 4 * size * repeat / ms / 1e9, 0.4 * target.shared / 1e12)
    n = 20 if small else 1000
    job: Any = empty_kernel[(1,)]
    job(x)
    check.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        job(x)
    queued = time.perf_counter() - start
    check.synchronize()
    seconds = time.perf_counter() - start
    found(check, "empty launch, us", 1e6 * seconds / n, 5.0, host=1e6 * queued / n)


def found(check: Check, what: str, measured: float, expected: float, **more: float) -> None:
    check.found(kind="ceiling", what=what, measured=measured, expected=expected, **more)
