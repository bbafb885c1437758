"""Recordings of one pass: the model's own logits and states, and the log-sum-exp of full ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from opened import tiny_tracer
from tiny import tiny_model, tiny_text
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from ifr_fast import IfrError, Tracer
from ifr_fast.kernels import reference
from ifr_fast.model import attention
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


@pytest.mark.parametrize("mode", ["full", "lean"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gpt_neox"])
def test_recorded_logits_are_the_models(family: str, mode: str) -> None:
    tracer, text = tiny_tracer(family), tiny_text(20)
    with torch.no_grad():
        logits = tracer.model(input_ids=text[None]).logits[0]
    recording = tracer.record(text, mode=mode)
    torch.testing.assert_close(recording.logits, logits[-1], atol=1e-5, rtol=1e-5)
    rows = torch.tensor([0, 3, 11, 19])
    of_head = tracer.decoder.head(recording.states[rows])
    torch.testing.assert_close(of_head, logits[rows], atol=1e-5, rtol=1e-5)
    for position in (0, 7, 19):
        probabilities = logits[position].softmax(-1)
        for graph in (
            tracer.trace(recording, position=position),
            tracer.trace(text, position=position),
        ):
            best = probabilities.argsort(descending=True)[:5].tolist()
            assert [p.token_id for p in graph.predictions] == best
            assert [p.probability for p in graph.predictions] == pytest.approx(
                probabilities[best].tolist(), abs=1e-5
            )


def test_text_that_overflows_in_half_precision_names_the_dtype() -> None:
    model = tiny_model("gpt2", dtype=torch.float16)
    with torch.no_grad():  # position 40 is beyond the length of any probe
        model.transformer.wpe.weight[40] = 6e4
        model.transformer.wte.weight[5] = 6e4
    tracer = Tracer(model)
    text = torch.full((41,), 7)
    text[40] = 5
    with pytest.raises(IfrError, match=r"not finite.*float16"):
        tracer.trace(text)
    assert len(tracer.trace(text[:40]).predictions) == 5


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**COMMON)).double().eval()
    for p in made.parameters():
        p.data.mul_(4) if p.ndim > 1 else p
    return made


def test_full_recordings_hold_the_log_sum_exp(tmp_path: Path) -> None:
    """Weights made with it are those made without it, in float64. The plan counts its bytes."""
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
        with_it = layer_inputs(full, i, rows).inputs
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
def test_families_whose_recordings_hold_it(make: Any, held: list[bool]) -> None:
    torch.manual_seed(0)
    tracer = Tracer(make().eval(), impl="eager")
    recording = tracer.record(tiny_text(20), mode="full")
    assert [layer.log_sum_exp is not None for layer in recording.layers] == held
    tracer.trace(recording, threshold=0.05)
