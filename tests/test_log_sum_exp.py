"""The log-sum-exp that the forward pass's own attention kernel gives: recorded, and scored with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny import tiny_text
from transformers import (  # fmt: skip
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from ifr_fast import Tracer
from ifr_fast.kernels import reference
from ifr_fast.model import attention
from ifr_fast.model.attention import AttentionCall, attend, attend_and_sum
from ifr_fast.model.masks import causal_mask
from ifr_fast.recording.layer_inputs import layer_inputs

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 50,
    "max_position_embeddings": 96,
}


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
def test_is_that_of_the_scores(H: int, H_kv: int, dtype: torch.dtype) -> None:
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
def test_is_not_given_where_scores_are_other_ones(
    shape: tuple[int, int, int, int], window: int | None, options: dict[str, Any]
) -> None:
    call = call_of(*shape, torch.float32, **options)
    call = call._replace(mask=causal_mask(window, torch.device("cpu")))
    z, found = attend_and_sum(call, window)
    assert found is None
    assert torch.equal(z, attend(call, window))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_is_not_given_in_half_precision_on_a_cpu(dtype: torch.dtype) -> None:
    """There the kernel's own is 1e-3 off."""
    call = call_of(4, 2, 16, 16, dtype)
    z, found = attend_and_sum(call, None)
    assert found is None
    assert torch.equal(z, attend(call, None))


def test_is_not_given_where_torch_would_choose_another_kernel() -> None:
    call = call_of(4, 2, 16, 16, torch.float32)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attend_and_sum(call, None)[1] is None


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**COMMON)).double().eval()
    for p in made.parameters():
        p.data.mul_(4) if p.ndim > 1 else p
    return made


def test_full_recordings_hold_it(tmp_path: Path) -> None:
    """In float64 scores with it are those without it, and the recording takes what was planned."""
    tracer, text = Tracer(model(), impl="reference"), tiny_text(23)
    full, lean = (tracer.record(text, mode=mode) for mode in ("full", "lean"))
    assert all(layer.log_sum_exp is None for layer in lean.layers)
    plan = tracer.plan(23)
    assert plan.full_bytes - plan.lean_bytes == 23 * 2 * 8 * (48 + 48 + 6)
    path = tmp_path / "full.safetensors"
    full.save(path)
    loaded = tracer.load_recording(path)
    rows = torch.tensor([0, 7, 22])
    for i, layer in enumerate(full.layers):
        assert layer.log_sum_exp is not None
        assert torch.equal(layer.log_sum_exp, loaded.layers[i].log_sum_exp)
        with_it, _ = layer_inputs(full, i, rows)
        assert torch.equal(with_it.log_sum_exp, layer.log_sum_exp[rows])
        expected = reference.attention_pattern(with_it._replace(log_sum_exp=None))
        k = with_it.k.repeat_interleave(3, 1)
        scores = torch.einsum("rhk,shk->rhs", with_it.q, k) * with_it.scale
        alpha = (scores - with_it.log_sum_exp[..., None]).exp()
        seen = torch.arange(23) <= rows[:, None]
        torch.testing.assert_close(alpha * seen[:, None], expected, rtol=0, atol=1e-12)


def test_scores_of_full_recordings_read_it() -> None:
    text = tiny_text(23)
    tracer = Tracer(model(), impl="eager")
    found = list(tracer.contributions(tracer.record(text, mode="full"), keep=0.0))
    expected = list(tracer.contributions(tracer.record(text, mode="lean"), keep=0.0))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.head_total, b.head_total, rtol=0, atol=1e-6)
    with mock.patch.object(attention, "may_sum", return_value=False):
        recording = tracer.record(text, mode="full")
    assert all(layer.log_sum_exp is None for layer in recording.layers)


@pytest.mark.parametrize(
    ("make", "held"),
    [
        (lambda: Gemma2ForCausalLM(Gemma2Config(**COMMON)), [False, False]),
        (lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=7)), [False, False]),
        (lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=60)), [True, True]),
    ],
    ids=["softcap", "window crossed", "window not crossed"],
)
def test_families(make: Any, held: list[bool]) -> None:
    torch.manual_seed(0)
    tracer = Tracer(make().eval(), impl="eager")
    recording = tracer.record(tiny_text(20), mode="full")
    assert [layer.log_sum_exp is not None for layer in recording.layers] == held
    tracer.trace(recording, threshold=0.05)
