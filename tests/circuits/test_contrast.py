"""Components of graphs, and contrasts between texts and between targets."""

from __future__ import annotations

import pytest
import torch
from opened import tiny_tracer
from tiny import tiny_text

from ifr_fast.circuits import Components, components, contrastive, membership


def test_components_and_membership():
    tracer = tiny_tracer("llama")
    graphs = tracer.trace([tiny_text(9), tiny_text(12, seed=1)], threshold=0.02)
    importance, frequency = components(graphs), components(graphs, "frequency")
    for i, graph in enumerate(graphs):
        assert torch.equal(importance.heads[i].float(), graph.head_importance())
        assert torch.equal(importance.ffn[i].float(), graph.ffn_importance())
        heads, ffn = membership(graph)
        expected = torch.zeros_like(heads)
        for layer, head, target, _, weight in zip(*graph.head_edges, strict=True):
            if weight > 0.02:
                expected[layer, head, target] = True
        assert torch.equal(heads, expected)
        assert torch.equal(frequency.heads[i] > 0, heads.any(-1))
        assert torch.equal(frequency.ffn[i] > 0, ffn.any(-1))
        assert 0 < int(ffn.sum()) == int((graph.edges.kind == 2).sum())


def test_contrasts_between_texts_and_between_targets():
    tracer = tiny_tracer("gpt2")
    texts = [tiny_text(8), tiny_text(11, seed=1)]
    twins = [tiny_text(8, seed=2), tiny_text(11, seed=3)]
    got = contrastive(tracer, texts, against=twins, threshold=0.02)
    expected = components(tracer.trace(texts, threshold=0.02)) - components(
        tracer.trace(twins, threshold=0.02)
    )
    assert torch.equal(got.heads, expected.heads)
    targets = contrastive(tracer, texts, position=-1, against_position=3, threshold=0.02)
    at_3 = components(tracer.trace(texts, position=3, threshold=0.02))
    of_last = components(tracer.trace(texts, threshold=0.02))
    assert torch.equal(targets.ffn, of_last.ffn - at_3.ffn)
    same = contrastive(tracer, texts, against=texts, threshold=0.02)
    assert not same.heads.any()
    with pytest.raises(ValueError, match="against: expected as many texts"):
        contrastive(tracer, texts)
    with pytest.raises(ValueError, match="heads' importances"):
        Components(got.heads, got.ffn) - Components(got.heads[:1], got.ffn[:1])
    with pytest.raises(ValueError, match="measure: expected"):
        components(tracer.trace(texts), "flow")
