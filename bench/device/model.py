"""A whole model of random weights: record, one route, all routes, end to end."""

from __future__ import annotations

import json
import time

import torch
from counts import random_llama
from device.common import KEEP, Check
from device.kernels import COUNTS, llama
from device.layer import SHARE
from gpu_model.attribution import attribution, route_rows
from gpu_model.counts_model import Counts
from gpu_model.forward import forward_seconds

from ifr_fast import Tracer
from ifr_fast.benchmark import measure


def run(check: Check) -> None:
    """Appends the times of each length."""
    lengths = check.lengths or ([12] if check.stand_in else [2048, 8192])
    m, counts = check.model, Counts(json.loads(COUNTS.read_text()))
    config = llama(m, m.L, max(lengths))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (max(lengths),), generator=generator)
    model = random_llama(config, SHARE, ids[:512].to(check.device), check.device, torch.bfloat16)
    start = time.perf_counter()
    tracer = Tracer(model, None, impl="triton")
    check.synchronize()
    check.found(kind="opening", layers=m.L, seconds=time.perf_counter() - start)
    for T in lengths:
        expected = {"forward": forward_seconds(m, T, check.target)}
        for name, rows in (("scoring", T), ("route", min(T, route_rows(counts)[0]))):
            of = attribution(m, T, rows, check.target, counts)
            expected[name] = of["mid"].total / expected["forward"]
        figures = measure(tracer, ids[:T], repeat=1 if check.stand_in else 3, threshold=KEEP)
        for name in ("forward", "record", "route", "scoring", "trace", "trace_all"):
            check.found(
                kind="model", T=T, what=name, seconds=getattr(figures, f"{name}_seconds"),
                units=figures.units(name), predicted=expected.get(name), mode=figures.mode,
            )  # fmt: skip
        check.found(kind="memory", T=T, added=figures.scoring_bytes, peak=figures.peak_bytes)
