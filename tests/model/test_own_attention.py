"""Models outside the attention interface: a product that is attention goes to the handler, with its
scale and mask; every other product is left unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from opened import tiny_importances, tiny_tracer
from same_graph import assert_within
from tiny import FAMILIES, tiny_text
from torch import Tensor, nn

from ifr_fast import UnsupportedArchitectureError
from ifr_fast.model.attention import AttentionCall, attend_rows
from ifr_fast.model.own_attention import attention_through
from ifr_fast.survey.sweep import sweep

H, T, K, V = 3, 7, 4, 5
LOWEST = torch.finfo(torch.float32).min
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


class Module(nn.Module):
    """Computes a function of q [1, H, T, K], k, v [1, H, T, V], inside some module."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.inner, self.compute = nn.Identity(), compute

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.compute(self.inner(q), k, v)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, H, T, n, generator=generator) for n in (K, K, V))


def watched(compute: Compute) -> tuple[Tensor, list[AttentionCall]]:
    """The function's output when its attention is overridden, and the calls that were seen."""
    calls: list[AttentionCall] = []

    def answer(call: AttentionCall) -> Tensor:
        calls.append(call)
        return attend_rows(call, call.q, torch.arange(call.q.shape[2]))

    module = Module(compute)
    with attention_through(module, answer):
        output = module(*inputs())
    assert type(output) is Tensor
    return output, calls


hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
additive = torch.zeros(1, 1, T, T).masked_fill(hidden, LOWEST)
alibi = torch.tensor([0.5, 0.25, 0.1])[:, None, None] * torch.arange(T)


def _added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(K) + additive, dim=-1) @ v


def _mask_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = additive + torch.matmul(q, k.transpose(2, 3))
    return torch.matmul(nn.functional.softmax(weights / 2, dim=-1, dtype=torch.float32), v)


def _filled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3))
    scores.mul_(0.5)
    scores *= 3
    scores.masked_fill_(hidden, -torch.inf)
    weights = nn.Dropout(0.5).eval()(nn.Softmax(dim=-1)(scores))
    return torch.matmul(weights.to(v.dtype), v)


def _where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.where(~hidden, q @ k.mT, torch.tensor(LOWEST))
    return scores.float().softmax(-1) @ v


def _floored(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.max(q @ k.mT + additive, torch.tensor(LOWEST))
    return scores.float().softmax(-1).type_as(scores) @ v


def _zeroed_and_hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = (~hidden).float()
    return torch.softmax((q @ k.mT) * seen + -1e4 * (1 - seen), dim=-1) @ v


def _biased_and_merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x[0] for x in (q, k, v))
    scores = alibi.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=2.0, alpha=0.5)
    weights = torch.softmax(scores.view(1, H, T, -1) + additive, dim=-1)
    return torch.bmm(weights.view(H, T, T), v)


def _one_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k[:, :1].mT + additive, dim=-1) @ v[:, :1]


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=additive, scale=0.7)


def _fused_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize(
    "compute",
    [
        _added,
        _mask_first,
        _filled_in_place,
        _where,
        _floored,
        _zeroed_and_hidden,
        _biased_and_merged,
        _one_key_head,
        _fused,
        _fused_causal,
    ],
)
def test_attention_is_seen(compute: Compute) -> None:
    output, calls = watched(compute)
    torch.testing.assert_close(output, compute(*inputs()), atol=1e-5, rtol=1e-5)
    (call,) = calls
    assert isinstance(call.module, Module)
    assert call.q.shape == (1, H, T, K)
    assert call.k.shape[1] == call.v.shape[1]
    assert bool(call.mask.is_causal(T, None))
    assert call.mask.window(T) is None
    if compute is _biased_and_merged:
        torch.testing.assert_close(call.alibi_slopes, torch.tensor([1.0, 0.5, 0.2]))
        assert call.scale == 0.5
    else:
        assert call.alibi_slopes is None


def _capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(q @ k.mT) + additive, dim=-1) @ v


def _scaled_by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * torch.rand(1, H, 1, 1, generator=torch.Generator()), -1) @ v


def _softmax_over_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, dim=-2) @ v


def _weights_changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.mT, dim=-1)
    return (weights * 2 + weights.sum() + weights[..., :1]) @ v


def _no_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT) @ v


def _twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return torch.cat([scores, scores + scores, scores.transpose(-1, -2)], dim=-1) + scores.max()


def _filled_with_something(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT).masked_fill(hidden, 0.5), dim=-1) @ v


def _split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT).view(1, H, T * T), dim=-1).view(1, H, T, T) @ v


@pytest.mark.parametrize(
    "compute",
    [
        _capped,
        _scaled_by_head,
        _softmax_over_rows,
        _weights_changed,
        _no_softmax,
        _twice,
        _filled_with_something,
        _split,
    ],
)
def test_other_products_are_left_alone(compute: Compute) -> None:
    output, calls = watched(compute)
    assert calls == []
    assert torch.equal(output, compute(*inputs()))


def test_position_biases_that_are_not_linear_are_refused() -> None:
    bias = torch.randn(1, H, 1, T, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedArchitectureError, match="not linear in the distance"):
        watched(lambda q, k, v: torch.softmax(q @ k.mT + bias + additive, dim=-1) @ v)


def test_scores_that_are_zeroed_and_not_hidden_are_refused() -> None:
    seen = (~hidden).float()
    with pytest.raises(UnsupportedArchitectureError, match="scores by 0 and does not hide them"):
        watched(lambda q, k, v: torch.softmax((q @ k.mT) * seen + (seen - 1), -1) @ v)


def test_a_forward_that_breaks_leaves_nothing_behind() -> None:
    class BreakError(Exception):
        pass

    def breaking(*_: Tensor) -> Tensor:
        raise BreakError

    module = Module(breaking)
    with attention_through(module, lambda call: call.v), pytest.raises(BreakError):
        module(*inputs())
    q, k, _ = inputs()
    assert type(q @ k.mT) is Tensor
    for each in module.modules():
        assert not each._forward_hooks
        assert not each._forward_pre_hooks


@pytest.mark.parametrize("family", [name for name, f in FAMILIES.items() if f.values is not None])
def test_no_product_is_touched_outside_of_the_forward(family: str) -> None:
    """Scoring multiplies matrices of its own between replays."""
    tracer = tiny_tracer(family, impl="eager")
    lean = tracer.record(tiny_text(9), mode="lean")
    with lean.replaying():
        q, k, _ = inputs()
        assert type(q @ k.mT) is Tensor
    assert lean.layers[0].q is None
    assert lean.nbytes < tracer.record(tiny_text(9), mode="full").nbytes


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("family", [name for name, f in FAMILIES.items() if f.values is not None])
def test_layers_are_scored_while_the_forward_pass_is_at_them(family: str, impl: str) -> None:
    """Products of the kernel are no attention of the model."""
    tracer, text = tiny_tracer(family, impl=impl), tiny_text(12)
    swept = sweep(tracer.decoder, [text], 0.02, tracer.kernel)
    layers = tiny_importances(family, 12)
    for i, layer in enumerate(layers):
        assert_within(swept.residual[i], layer.residual[:-1])
        assert_within(swept.ffn[i], layer.ffn[:-1])
