"""One layer of a text of 131,072 tokens: few rows against float64, and the cost of one route."""

from __future__ import annotations

import torch
from device.common import Check
from device.correctness import LIMITS
from device.exact import dense, exact, worst
from device.kernels import forward_of, score
from device.layer import random_layer, some_rows

from ifr_fast.kernels.triton import kernel


def run(check: Check) -> None:
    """Appends errors and times of the last rows."""
    T = 300 if check.stand_in else 131072
    forward = check.milliseconds(forward_of(check, T), 1)
    check.found(kind="forward", T=T, ms=forward)
    if check.device.type == "cuda":
        torch.cuda.empty_cache()
    limit = LIMITS[torch.bfloat16]
    for R in (4,) if check.stand_in else (64, 910):
        inputs = random_layer(check.model, T, R, check.device, torch.bfloat16)
        inputs = inputs._replace(log_sum_exp=None)
        score(check, inputs, forward)
        chosen = torch.tensor([0, R - 1])
        few = some_rows(inputs, chosen)
        got = dense(kernel.score_attention(few, 0.0), torch.arange(2), T)
        totals = kernel.score_attention(inputs, 0.5)
        expected = exact(few)
        at = chosen.to(check.device)
        of_many = {
            "residual": float((totals.residual[at] - expected.residual).abs().max()),
            "head_total": float((totals.head_total[at] - expected.head_total).abs().max()),
        }
        for case, errors in (("rows alone", worst(got, expected)), (f"{R} rows", of_many)):
            right = all(error <= limit for error in errors.values())
            line = {"case": case, "dtype": "bfloat16", "T": T, "errors": errors, "limit": limit}
            check.found(kind="correctness", **line, right=right)
