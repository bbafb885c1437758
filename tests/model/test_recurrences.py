"""Models with linear attention, against their definition in float64 (definition.py), by which each
recurrence runs step by step.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from definition import importances_by_definition
from hybrids import HYBRIDS, N_TOKENS, hybrid, hybrid_text
from oracle import LayerImportance
from sweeping import _difference
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from ifr_fast import IfrError, Tracer, UnsupportedArchitectureError, circuits
from ifr_fast.drilldown.parts import head_output
from ifr_fast.model import recurrences
from ifr_fast.scoring.scores import LayerScores


@pytest.fixture(scope="module", params=sorted(HYBRIDS))
def traced(request: pytest.FixtureRequest) -> tuple[Tracer, list[LayerImportance]]:
    model = hybrid(request.param)
    return Tracer(model), importances_by_definition(model, hybrid_text())


@pytest.fixture(scope="module")
def tracer() -> Tracer:
    return Tracer(hybrid("qwen3_next"))


def largest(found: list[LayerScores], expected: list[LayerImportance]) -> float:
    assert len(found) == len(expected)
    return max(_difference(scores, expected[scores.layer]) for scores in found)


@pytest.mark.parametrize("mode", ["full", "lean"])
def test_every_weight_matches_the_definition(
    traced: tuple[Tracer, list[LayerImportance]], mode: str
) -> None:
    tracer, expected = traced
    recording = tracer.record(hybrid_text(), mode=mode)
    assert largest(list(tracer.contributions(recording, keep=0.0)), expected) < 1e-5


def test_some_weights_are_negative(traced: tuple[Tracer, list[LayerImportance]]) -> None:
    tracer, _ = traced
    layers = tracer.record(hybrid_text()).layers
    signed = [x.recurrence.pattern().weights(torch.arange(N_TOKENS), N_TOKENS) for x in layers
              if x.recurrence is not None]  # fmt: skip
    assert len(signed) == sum(block.recurrence_size > 0 for block in tracer.decoder.blocks) > 1
    assert min(float(x.min()) for x in signed) < -1e-3


def test_one_route_is_that_of_all(traced: tuple[Tracer, list[LayerImportance]]) -> None:
    tracer, _ = traced
    routes = tracer.trace_all(hybrid_text(), threshold=0.02)
    for position in (0, 5, 64, N_TOKENS - 1):
        alone = tracer.trace(hybrid_text(), position=position, threshold=0.02)
        of_all = routes[position]
        assert alone.edges.source.tolist() == of_all.edges.source.tolist()
        torch.testing.assert_close(alone.edges.weight, of_all.edges.weight, atol=1e-6, rtol=0)
        assert float(alone.prune(0.05).token_importance().sum()) <= 1 + 1e-5


def test_weights_of_all_paths_sum_to_one(tracer: Tracer) -> None:
    graph = tracer.trace(hybrid_text(20), threshold=0.0)
    assert float(graph.token_importance().sum()) == pytest.approx(1, abs=1e-4)


def test_a_value_is_that_of_its_source_alone(
    tracer: Tracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another value at one position changes the parts of that source, and no other's."""
    own, at = qwen3_next.torch_chunk_gated_delta_rule, 31
    before = tracer.record(hybrid_text(), mode="full").layers[0]
    assert before.recurrence is not None
    pattern = before.recurrence.pattern().weights(torch.arange(N_TOKENS), N_TOKENS)

    def moved(query, key, value, *args, **kwargs):
        value = value.clone()
        value[:, at] += 1
        return own(query, key, value, *args, **kwargs)

    monkeypatch.setattr(qwen3_next, "torch_chunk_gated_delta_rule", moved)
    after = tracer.record(hybrid_text(), mode="full").layers[0]
    assert after.z is not None
    assert before.z is not None
    difference = after.z - before.z  # [T, H, V]
    expected = pattern[:, :, at].T[..., None].expand_as(difference)
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-5)


def test_what_the_probe_finds(tracer: Tracer) -> None:
    first, second, third = tracer.decoder.blocks
    assert [block.W_O.shape[0] for block in (first, second, third)] == [4, 6, 4]
    assert tracer.decoder.n_heads == 6
    assert (first.value_span, second.value_span) == (4, 1)
    assert first.head_scaled
    assert first.gate_site is not None
    assert not second.head_scaled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = hybrid("qwen3_5", dtype=dtype)
    tracer = Tracer(model)
    found = list(tracer.contributions(hybrid_text(40), keep=0.0))
    for scores in found:
        sums = scores.residual + scores.head_total.sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-4)
    if dtype == torch.float64:
        assert largest(found, importances_by_definition(model, hybrid_text(40))) < 1e-5


def test_batches_and_memory(tracer: Tracer) -> None:
    texts = [hybrid_text(n, seed=n).tolist() for n in (70, 12, 33)]
    for graph, text in zip(tracer.trace(texts, threshold=0.05), texts, strict=True):
        alone = tracer.trace(text, threshold=0.05)
        assert graph.edges.source.tolist() == alone.edges.source.tolist()
        torch.testing.assert_close(graph.edges.weight, alone.edges.weight, atol=1e-5, rtol=0)
    plan = tracer.plan(N_TOKENS)
    assert tracer.record(hybrid_text(), mode="lean").nbytes == plan.lean_bytes


def test_drilling_down(tracer: Tracer) -> None:
    recording = tracer.record(hybrid_text(), mode="full")
    of_heads = [tracer.contribution_map(recording, layer=0, head=h) for h in range(4)]
    whole = tracer.contribution_map(recording, layer=0)
    torch.testing.assert_close(torch.stack(of_heads).sum(0), whole, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="head: expected -4 to 3, got 5"):
        tracer.contribution_map(recording, layer=0, head=5)
    of_sources = [head_output(recording, 0, 2, 65, source) for source in range(66)]
    torch.testing.assert_close(
        torch.stack(of_sources).sum(0), head_output(recording, 0, 2, 65), atol=1e-4, rtol=1e-4
    )
    moved = recording.layers[0].resid_mid[65] - recording.layers[0].resid_pre[65]
    heads = torch.stack([head_output(recording, 0, h, 65) for h in range(4)]).sum(0)
    torch.testing.assert_close(heads, moved, atol=1e-3, rtol=1e-3)


def test_an_own_forward_pass_is_not_disturbed(tracer: Tracer) -> None:
    own = qwen3_next.torch_chunk_gated_delta_rule
    model, ids = tracer.model, hybrid_text()[None]
    before = model(ids).logits
    tracer.trace(hybrid_text())
    assert qwen3_next.torch_chunk_gated_delta_rule is own
    assert torch.equal(model(ids).logits, before)


# Refusals


def test_wrong_weights_do_not_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recurrence that is not the one of its name is refused by its sums."""
    tracer = Tracer(hybrid("qwen3_5"))
    own = recurrences.GatedDelta.weights

    def without_one(self, rows, n_keys):
        weights = own(self, rows, n_keys)
        weights[..., 40] *= 1.2
        return weights

    monkeypatch.setattr(recurrences.GatedDelta, "weights", without_one)
    with pytest.raises(IfrError, match="do not add up"):
        tracer.trace_all(hybrid_text())


def test_explicit_implementations_without_a_kernel() -> None:
    model = hybrid("qwen3_5")
    with pytest.raises(ValueError, match="impl: 'cpu' has no kernel for this model's linear"):
        Tracer(model, impl="cpu")
    for impl in ("eager", "reference"):
        assert Tracer(model, impl=impl).impl == impl


def test_what_cannot_be_done_says_so(tracer: Tracer, tmp_path: Path) -> None:
    recording = tracer.record(hybrid_text(12))
    for act in (
        lambda: recording.save(tmp_path / "x.safetensors"),
        lambda: tracer.record(hybrid_text(12), path=tmp_path / "y.safetensors"),
        lambda: list(tracer.generate([1, 2, 3], max_new_tokens=2)),
        lambda: circuits.observe(tracer.decoder, [[1, 2, 3]]),
    ):
        with pytest.raises(UnsupportedArchitectureError, match="has linear attention, and"):
            act()
    assert list(tmp_path.iterdir()) == []
    assert b"Qwen3Next" not in pickle.dumps(tracer.trace(hybrid_text(12)))
