"""The published tool's functions on tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_text
from torch import Tensor
from transparency_cases import TOLERANCE, attention_contributions, ran

from ifr_fast.compat import llm_transparency_tool as tool
from ifr_fast.compat.llm_transparency_tool import TransparentLlm, build_full_graph


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen3_next"])
def test_windows_norms_and_gates(family: str) -> None:
    """The tool has none of these; the arithmetic of their parts is the same."""
    ours = ran(family, 20, parity=True)
    for i in range(3):
        parts = ours.decomposed_attn(0, i) + 0.0
        assert type(parts) is Tensor
        formed = tool.get_attention_contributions(
            ours.residual_in(i), ours.residual_after_attn(i), parts[None], parity=True
        )
        for mine, theirs in zip(attention_contributions(ours, i), formed, strict=True):
            torch.testing.assert_close(mine, theirs[0], atol=TOLERANCE, rtol=0)
    build_full_graph(ours, 0, 0.04)  # the parts and folded biases add up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Half-precision activations are scored in float32."""
    ours = TransparentLlm(hf_model=tiny_model("qwen2", dtype=dtype).eval(), parity=True)
    ours.run([tiny_text(20)])
    formed = tool.get_attention_contributions(
        ours.residual_in(1),
        ours.residual_after_attn(1),
        ours.decomposed_attn(0, 1)[None] + 0.0,
        parity=True,
    )
    for mine, theirs in zip(attention_contributions(ours, 1), formed, strict=True):
        torch.testing.assert_close(mine, theirs[0], atol=TOLERANCE, rtol=0)
    build_full_graph(ours, 0, 0.04)


@given(st.integers(0, 10_000), st.integers(1, 3), st.booleans(), st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None)
def test_contributions_are_shares_of_what_they_bring_nearer(
    seed: int, k: int, parity: bool, norm: int
) -> None:
    torch.manual_seed(seed)
    parts = torch.randn(*range(2, 2 + k), 5, 2, 7, dtype=torch.float64)
    whole = parts.sum(tuple(range(k))) * torch.rand(5, 2, 1)
    gap = torch.linalg.vector_norm(parts - whole + (1e-6 if parity else 0), norm, -1)
    scores = torch.linalg.vector_norm(whole, norm, -1) - gap
    scores = scores.clamp(min=1e-5 if parity else 0)
    expected = scores / scores.sum(tuple(range(k)), keepdim=True)
    got = tool.get_contributions(parts, whole, norm, parity=parity)
    defined = ~expected.isnan()
    torch.testing.assert_close(got[defined], expected[defined], atol=1e-9, rtol=0)
    ones = torch.ones(5, 2, dtype=torch.float64)
    torch.testing.assert_close(got.sum(tuple(range(k))), ones)
    one_off = torch.randn(5, 2, 7, dtype=torch.float64)
    of_parts, of_one = tool.get_contributions_with_one_off_part(
        parts, one_off, whole, norm, parity=parity
    )
    both = torch.cat([parts.flatten(0, k - 1), one_off[None]])
    flat = tool.get_contributions(both, whole, norm, parity=parity)
    assert torch.equal(torch.cat([of_parts.flatten(0, k - 1), of_one[None]]), flat)


def test_where_nothing_brings_nearer_all_parts_share() -> None:
    parts, whole = torch.tensor([[10.0], [-9.0]]), torch.tensor([1.0])
    assert tool.get_contributions(parts, whole).tolist() == [0.5, 0.5]
    assert tool.get_contributions(parts, whole, parity=True).tolist() == [0.5, 0.5]


def test_thresholds_renormalize_each_position() -> None:
    blocks, residual = torch.tensor([0.2, 0.6, 0.05]), torch.tensor([0.8, 0.4, 0.03])
    ours = tool.apply_threshold_and_renormalize(0.3, blocks, residual)
    assert [x.tolist() for x in ours] == [[0, pytest.approx(0.6), 0], [1, pytest.approx(0.4), 0]]
    theirs = tool.apply_threshold_and_renormalize(0.3, blocks, residual, parity=True)
    assert theirs[0].tolist() == pytest.approx([0, 0.6, 0])
    assert theirs[1].tolist() == pytest.approx([0.8 / 1.4, 0.4, 0])
    of_heads = torch.tensor([[[0.5, 0.1]], [[0.04, 0.04]]])  # [pos, key_pos, head]
    for parity in (False, True):
        heads, residual = tool.apply_threshold_and_renormalize(
            0.1, of_heads, torch.tensor([0.3, 0.0]), parity=parity
        )
        assert heads[0].tolist() == [[pytest.approx(0.625), 0]]
        assert residual[0].item() == pytest.approx(0.375)
        assert bool(residual[1].isnan()) is parity


def test_decomposed_ffn() -> None:
    torch.manual_seed(0)
    neurons, mid = torch.randn(9, 5), torch.randn(5)
    post = mid + neurons.sum(0)
    got, residual = tool.get_decomposed_mlp_contributions(mid, post, neurons)
    scores = post.abs().sum() - (post - torch.cat([neurons, mid[None]])).abs().sum(-1)
    expected = scores.relu() / scores.relu().sum()
    assert isinstance(residual, float)
    torch.testing.assert_close(torch.cat([got, torch.tensor([residual])]), expected)
