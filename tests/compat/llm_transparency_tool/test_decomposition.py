"""The decomposed attention, a tensor that is formed only when it is read."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from transparency_cases import TOLERANCE, attention_contributions, ran

from ifr_fast.compat import llm_transparency_tool as tool
from ifr_fast.compat.llm_transparency_tool import build_full_graph, model
from ifr_fast.compat.llm_transparency_tool.decomposition import DecomposedAttention


def test_the_decomposition_is_formed_only_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ran("llama", 20)
    formed = []
    own = model.formed_parts
    monkeypatch.setattr(model, "formed_parts", lambda inputs: formed.append(1) or own(inputs))
    parts = ours.decomposed_attn(0, 1)
    assert isinstance(parts.unsqueeze(0), DecomposedAttention)
    heads, _ = attention_contributions(ours, 1)
    build_full_graph(ours)
    build_full_graph(ours, 0, 0.04)
    assert formed == []
    again, _ = tool.get_attention_contributions(
        ours.residual_in(1), ours.residual_after_attn(1), parts.unsqueeze(0).clone()
    )
    assert len(formed) == 1
    torch.testing.assert_close(heads, again[0], atol=TOLERANCE, rtol=0)
    assert parts[3, 2].shape == (6, 36)
    assert len(formed) == 1


def test_the_decomposition_leaves_torch_as_any_tensor_does() -> None:
    ours = ran("llama", 5)
    parts = ours.decomposed_attn(0, 1)
    expected = parts.clone()
    assert type(expected) is torch.Tensor
    assert expected.abs().sum() > 0
    stored = io.BytesIO()
    torch.save(parts, stored)
    stored.seek(0)
    for got in (
        torch.from_numpy(parts.cpu().numpy()),
        torch.tensor(parts.tolist()),
        copy.deepcopy(parts),
        torch.load(stored, weights_only=True),
        pickle.loads(pickle.dumps(parts)),
    ):
        assert type(got) is torch.Tensor
        assert torch.equal(got, expected)
