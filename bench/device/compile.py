"""Compiles the kernels that later steps launch on all cores, into Triton's own cache.

Nothing runs: the driver launches on tensors without data, as in tests/support/aot.py.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

import torch
from device.common import KEEP, Check
from gpu_model.attribution import shapes_only
from gpu_model.shapes import LLAMA_8B


def launches() -> list[Any]:
    """Every launch of the steps, one by specialization."""
    import aot

    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for R, recorded in ((2048, True), (2048, False), (6, False)):
            x = shapes_only(LLAMA_8B, 2048, R, recorded=recorded).to(dtype)
            x = x._replace(log_sum_exp=torch.empty(R, 32, device="meta") if recorded else None)
            plain = x._replace(k=x.k.new_empty(8, 2048, 128).transpose(0, 1))
            flags = plain._replace(
                window=1000, softcap=30.0, sinks=x.q.new_empty(32), log_sum_exp=None
            )
            for case in (x, *([flags] if not recorded else [])):
                for one in aot.launches(case):
                    found.setdefault(one.key(), one)
    return list(found.values())


def compile_some(share: tuple[int, int]) -> int:
    """Compiles each n-th launch; returns how many."""
    import aot

    aot.use("sm_90")
    mine = launches()[share[0] :: share[1]]
    for one in mine:
        one.compile()
    return len(mine)


def run(check: Check) -> None:
    """Appends how many kernels there are, and the time that they took."""
    n = max(1, min(14, (os.cpu_count() or 1) - 1))
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(n) as pool:
        counts = pool.map(compile_some, [(i, n) for i in range(n)], chunksize=1)
    seconds = time.perf_counter() - start
    check.found(kind="compile", kernels=sum(counts), processes=n, seconds=seconds, keep=KEEP)
