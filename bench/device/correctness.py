"""Six rows of a layer against float64, new tensors poisoned, twice with the same bits."""

from __future__ import annotations

import torch
from device.common import Check, poisoned
from device.exact import dense, exact, worst
from device.layer import random_layer, some_rows

from ifr_fast.kernels.contract import LayerInputs
from ifr_fast.kernels.triton import kernel
from ifr_fast.model.attention import AttentionCall, attend_and_sum
from ifr_fast.model.masks import causal_mask

LIMITS = {torch.bfloat16: 1e-3, torch.float32: 1e-5}  # of importances


def run(check: Check) -> None:
    """Appends the errors of each case."""
    T = 26 if check.stand_in else 8192
    for dtype, limit in LIMITS.items():
        inputs = random_layer(check.model, T, T, check.device, dtype)
        compare(check, "all rows", inputs, limit)
        compare(check, "few rows", some_rows(inputs, chosen_rows(T)), limit)
        log_sum_exp(check, inputs)
        generator = torch.Generator(check.device).manual_seed(1)
        sinks = torch.randn(check.model.H, generator=generator, device=check.device).to(dtype)
        flags = {"window": T // 8, "softcap": 30.0, "sinks": sinks, "log_sum_exp": None}
        compare(check, "window, softcap, sinks", inputs._replace(**flags), limit)
        del inputs
        if check.device.type == "cuda":
            torch.cuda.empty_cache()


def chosen_rows(T: int) -> torch.Tensor:
    return torch.tensor(sorted({0, 5, T // 8, T // 2 - 1, T * 3 // 4, T - 1}))


def compare(check: Check, case: str, inputs: LayerInputs, limit: float) -> None:
    """Every pair of six rows: the whole layer is scored twice with keep = 0."""
    R = len(inputs.rows)
    chosen = chosen_rows(R) if R > 6 else torch.arange(R)
    with poisoned():
        scores = kernel.score_attention(inputs, 0.0)
        got = dense(scores, chosen, len(inputs.k))
        kept = [scores.residual, scores.head_total, scores.linear, *scores.edges]
        again = kernel.score_attention(inputs, 0.0)
        twice = [again.residual, again.head_total, again.linear, *again.edges]
        same = all(torch.equal(a, b) for a, b in zip(kept, twice, strict=True))
    del scores, again, kept, twice
    errors = worst(got, exact(some_rows(inputs, chosen)))
    right = same and all(error <= limit for error in errors.values())
    dtype = str(inputs.q.dtype).removeprefix("torch.")
    line = {"case": case, "dtype": dtype, "T": len(inputs.k), "errors": errors, "limit": limit}
    check.found(kind="correctness", **line, same_bits=same, right=right)


def log_sum_exp(check: Check, inputs: LayerInputs) -> None:
    """The sums that the forward pass's own kernel gives, against plain float32 attention."""
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))
    mask = causal_mask(None, check.device)
    call = AttentionCall(torch.nn.Identity(), q, k, v, mask, inputs.scale, None, None)
    _, found = attend_and_sum(call, None)
    expected = inputs.log_sum_exp
    assert expected is not None
    error = None if found is None else float((found[0] - expected).abs().max())
    dtype = str(inputs.q.dtype).removeprefix("torch.")
    right = found is None or (error is not None and error <= 0.02)
    line = {"case": "log-sum-exp", "dtype": dtype, "given": found is not None, "limit": 0.02}
    check.found(kind="correctness", **line, errors={"sums": error or 0.0}, right=right)
