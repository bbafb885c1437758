"""Attributions to input tokens."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from circuit_tasks import word_tracer
from opened import tiny_tracer
from tiny import tiny_text

from ifr_fast import Tracer, circuits
from ifr_fast.circuits import attention_weights
from ifr_fast.circuits.inputs import METHODS, _curves, direct_reads


@pytest.mark.skipif(
    importlib.util.find_spec("flashtrace") is None, reason="expected: flashtrace is not installed"
)
def test_direct_reads_of_the_answer_are_flashtraces_importances():
    tracer = word_tracer()
    task = circuits.ioi(tracer.tokenizer, 3)
    for i in range(3):
        ours = METHODS["direct reads, answer appended"](tracer, task, i)
        torch.testing.assert_close(ours, METHODS["FlashTrace"](tracer, task, i), atol=1e-5, rtol=0)
        before = METHODS["direct reads"](tracer, task, i)
        assert (ours - before).abs().max() > 1e-3


def test_direct_reads_are_sums_over_heads_and_layers():
    tracer = tiny_tracer("gpt2")
    text = tiny_text(9).tolist()
    oracle = Tracer(tracer.model, impl="reference")
    expected = torch.zeros(9)
    for scores in oracle.contributions(text, keep=0):
        for _, target, source, weight in zip(*scores.head_edges, strict=True):
            expected[source] += weight if target == 8 else 0
    torch.testing.assert_close(direct_reads(tracer, text), expected, atol=1e-5, rtol=0)


def test_the_last_token_can_be_left_in_place():
    tracer = word_tracer()
    task = circuits.ioi(tracer.tokenizer, 1)
    text = task.texts[0]
    last_first = torch.arange(len(text)).float()
    others = last_first.clone()
    others[-1] = -1
    same = _curves(tracer, task, 0, {"a": last_first, "b": others}, 20, True)
    # The same texts run in other rows of a batch.
    expected = pytest.approx((same["b"].rise, same["b"].insertion), rel=1e-5)
    assert (same["a"].rise, same["a"].insertion) == expected
    apart = _curves(tracer, task, 0, {"a": last_first, "b": others}, 20, False)
    assert apart["a"].rise != apart["b"].rise


def test_attributions():
    tracer = word_tracer()
    task = circuits.ioi(tracer.tokenizer, 2)
    for name, method in METHODS.items():
        if name == "FlashTrace" and importlib.util.find_spec("flashtrace") is None:
            continue
        got = method(tracer, task, 1)
        assert got.shape == (len(task.texts[1]),)
        assert (got >= 0).all()
        assert got.sum() > 0
    # Rollout equals a product of matrices, and gradient x input equals autograd's.
    weights = attention_weights(tracer.decoder, task.texts[0]).double().mean(1)
    product = torch.eye(weights.shape[-1], dtype=torch.float64)
    for of_layer in weights:
        product = (of_layer + torch.eye(len(of_layer))) / 2 @ product
    torch.testing.assert_close(METHODS["attention rollout"](tracer, task, 0), product[-1].float())
    model, prompt = tracer.model, task.prompts[0]
    embedded = model.get_input_embeddings()(torch.tensor([prompt.token_ids])).detach()
    embedded.requires_grad_()
    log = model(inputs_embeds=embedded).logits[0, -1].log_softmax(-1)[prompt.right[0]]
    (gradient,) = torch.autograd.grad(log, embedded)
    expected = (gradient * embedded).sum(-1)[0].abs().detach()
    torch.testing.assert_close(
        METHODS["gradient x input"](tracer, task, 0), expected, atol=1e-5, rtol=1e-4
    )
    with pytest.raises(ValueError, match="methods: expected some of"):
        circuits.token_faithfulness(tracer, task, ["guessing"])
