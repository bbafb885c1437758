"""The log-sum-exp that the forward pass's own attention kernel gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ifr_fast.model import attention
from ifr_fast.model.attention import AttentionCall, attend, attend_and_sum
from ifr_fast.model.masks import causal_mask


def call_of(H: int, H_kv: int, K: int, V: int, dtype: torch.dtype, **options: Any) -> AttentionCall:
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 21, width, generator=g).to(dtype)
        for heads, width in ((H, K), (H_kv, K), (H_kv, V))
    )
    mask = causal_mask(None, torch.device("cpu"))
    values = {"softcap": None, "sinks": None, "alibi_slopes": None, **options}
    return AttentionCall(torch.nn.Identity(), q, k, v, mask, 0.7, **values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("H", "H_kv"), [(6, 2), (3, 3), (4, 1)])
def test_log_sum_exp_is_that_of_the_scores(H: int, H_kv: int, dtype: torch.dtype) -> None:
    call = call_of(H, H_kv, 16, 16, dtype)
    z, found = attend_and_sum(call, None)
    assert found is not None
    assert torch.equal(z, attend(call, None))
    k = call.k.double().repeat_interleave(H // H_kv, 1)
    scores = call.q.double() @ k.transpose(-1, -2) * call.scale
    scores.masked_fill_(torch.ones(21, 21).triu(1).bool(), -math.inf)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(
        found.double(), scores.logsumexp(-1).transpose(1, 2), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("column", [True, False])
def test_log_sum_exp_of_cudnn(column: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flash kernel stands in for cuDNN's, whose sums may have one more dimension."""
    call = call_of(6, 2, 16, 16, torch.float32)
    expected = attend_and_sum(call, None)

    def cudnn(
        q: Tensor, k: Tensor, v: Tensor, bias: None, summed: bool, dropout: float, causal: bool,
        *, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert summed
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        z, sums, *rest = flash(q, k, v, dropout, causal, scale=scale)
        return z, sums[..., None] if column else sums, *rest

    choice = SDPBackend.CUDNN_ATTENTION.value
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: choice)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", cudnn)
    for got, of_flash in zip(attend_and_sum(call, None), expected, strict=True):
        assert got is not None
        assert of_flash is not None
        assert torch.equal(got, of_flash)


@pytest.mark.parametrize("options", [{"is_causal": True}, {}], ids=str)
def test_grouped_queries_in_float32_on_a_gpu(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group at a time, as no fused kernel of torch takes grouped queries there."""
    call = call_of(6, 2, 16, 24, torch.float32)
    expected = attention.fused(call.q, call.k, call.v, call.scale, **options)
    own, heads = torch.nn.functional.scaled_dot_product_attention, []

    def watched(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Tensor:
        heads.append((q.shape[1], k.shape[1], k.stride(1)))
        return own(q, k, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(attention, "_by_group", lambda _: True)
    got = attention.fused(call.q, call.k, call.v, call.scale, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert heads == [(3, 3, 0)] * 2, "keys are shared, not copied"


@pytest.mark.parametrize(
    ("shape", "window", "options"),
    [
        ((4, 2, 16, 16), 5, {}),
        ((4, 2, 16, 24), None, {}),
        ((4, 2, 10, 10), None, {}),
        ((4, 2, 16, 16), None, {"softcap": 3.0}),
        ((4, 2, 16, 16), None, {"sinks": torch.zeros(4)}),
        ((4, 2, 16, 16), None, {"alibi_slopes": torch.ones(4)}),
    ],
    ids=["window", "other width of values", "odd width", "softcap", "sinks", "alibi"],
)
def test_log_sum_exp_is_not_given_where_scores_are_other_ones(
    shape: tuple[int, int, int, int], window: int | None, options: dict[str, Any]
) -> None:
    call = call_of(*shape, torch.float32, **options)
    call = call._replace(mask=causal_mask(window, torch.device("cpu")))
    z, found = attend_and_sum(call, window)
    assert found is None
    assert torch.equal(z, attend(call, window))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_log_sum_exp_is_not_given_in_half_precision_on_a_cpu(dtype: torch.dtype) -> None:
    """On a CPU the kernel's log-sum-exp in half precision is 1e-3 off."""
    call = call_of(4, 2, 16, 16, dtype)
    z, found = attend_and_sum(call, None)
    assert found is None
    assert torch.equal(z, attend(call, None))


def test_log_sum_exp_is_not_given_where_torch_would_choose_another_kernel() -> None:
    call = call_of(4, 2, 16, 16, torch.float32)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attend_and_sum(call, None)[1] is None
