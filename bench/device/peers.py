"""Other ways to score: plain torch, every part formed, and FlashTrace's functions."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path

import torch
from counts import random_llama
from device.common import KEEP, Check
from device.kernels import llama
from device.layer import SHARE, random_layer

from ifr_fast import Tracer
from ifr_fast.kernels import eager, reference
from ifr_fast.kernels.triton import kernel


def run(check: Check) -> None:
    """Appends each way's time beside ours, of the same rows in the same run."""
    for name, of, T in (("plain torch", eager, 2048), ("materializing", reference, 512)):
        T = 24 if check.stand_in else T
        inputs = random_layer(check.model, T, T, check.device, torch.bfloat16)
        ours = check.milliseconds(partial(kernel.score_attention, inputs, KEEP), 5)
        slow = inputs.to(torch.float32) if of is reference else inputs
        check.found(kind="peer", what=name, T=T, ours=ours, layers=1)
        theirs = check.milliseconds(partial(of.score_attention, slow, KEEP), 1)
        check.found(
            kind="peer", what=name, T=T, ours=ours, layers=1, ms=theirs, ratio=theirs / ours
        )
    if importlib.util.find_spec("flashtrace") is None:
        check.found(kind="peer", what="FlashTrace", failed="flashtrace is not installed here")
    else:
        flashtrace(check)


def flashtrace(check: Check) -> None:
    """FlashTrace's functions on two layers; a ratio only where importances agree."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "peers"))
    import peers as others  # bench/peers/peers.py

    T = 12 if check.stand_in else 512
    config = llama(check.model, 2, T)
    ids = torch.randint(config.vocab_size, (T,), generator=torch.Generator().manual_seed(0))
    model = random_llama(config, SHARE, ids.to(check.device), check.device, torch.float32)
    tracer = Tracer(model, None, impl="triton")
    rows = others.compare(tracer, ids, False, 1 if check.stand_in else 3, 1)
    ours = {row.method.removeprefix("ifr_fast, "): 1e3 * row.seconds for row in rows[:2]}
    for row in rows[2:]:
        mine = ours["one position" if "one position" in row.method else "all positions"]
        line = {"what": row.method, "T": T, "ours": mine, "ms": 1e3 * row.seconds, "layers": 2}
        check.found(kind="peer", **line, ratio=row.ratio, deviation=row.deviation)
