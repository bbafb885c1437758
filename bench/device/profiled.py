"""The program that counters.py watches: one layer, scored once."""

from __future__ import annotations

import torch
from device.common import KEEP, Check
from device.layer import random_layer

from ifr_fast.kernels.triton import kernel


def run(check: Check) -> None:
    """Scores a layer."""
    T = 24 if check.stand_in else 8192
    kernel.score_attention(random_layer(check.model, T, T, check.device, torch.bfloat16), KEEP)
    check.synchronize()
