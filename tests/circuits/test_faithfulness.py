"""Keep-only and remove-only, and the graphs that routes are compared with."""

from __future__ import annotations

import pytest
import torch
from circuit_tasks import small_task
from opened import tiny_tracer
from planted_circuit import induction_model, induction_task
from tiny import tiny_model, tiny_text

from ifr_fast import Tracer, circuits
from ifr_fast.circuits import (
    attention_selection,
    attention_weights,
    random_selection,
    selected,
    survival,
)
from ifr_fast.errors import FormatError


def test_attention_weights_are_those_of_the_model():
    for family in ("llama", "gpt2", "mistral", "gemma2", "bloom", "gpt_oss"):
        model = tiny_model(family).eval()
        text = tiny_text(12)
        got = attention_weights(Tracer(model).decoder, text)
        model.config._attn_implementation = "eager"
        with torch.no_grad():
            expected = model(input_ids=text[None], output_attentions=True).attentions
        torch.testing.assert_close(got, torch.cat(expected)[..., : len(text)], atol=1e-5, rtol=1e-4)


def test_selections():
    tracer = tiny_tracer("llama")
    text = tiny_text(10)
    graph = tracer.trace(text, threshold=0.03, granularity="head")
    weights = attention_weights(tracer.decoder, text)
    generator = torch.Generator().manual_seed(0)
    for unit in ("component", "position"):
        routes = selected(graph, unit)
        drawn = [random_selection(routes, generator) for _ in range(200)]
        for one in drawn:
            for mine, theirs in zip(routes, one, strict=True):
                of_layers = (x.reshape(len(x), -1).sum(-1) for x in (mine, theirs))
                assert torch.equal(*of_layers)
        mean = torch.stack([one.heads.double() for one in drawn]).mean(0).flatten(1)
        share = routes.heads.double().flatten(1).mean(-1, keepdim=True)
        assert (mean - share).abs().max() < 0.2
        by_attention = attention_selection(weights, routes)
        assert torch.equal(by_attention.heads.flatten(1).sum(-1), routes.heads.flatten(1).sum(-1))
        assert torch.equal(by_attention.ffn, routes.ffn)
    # In the top layer, the head with the largest weight into the last position is selected.
    one_head = selected(graph, "component")
    one_head.heads[:] = False
    one_head.heads[-1, 0] = True
    found = attention_selection(weights, one_head)
    strongest = int(weights[-1, :, -1].amax(-1).argmax())
    assert found.heads.nonzero().tolist() == [[2, strongest]]
    without = attention_selection(weights, one_head, first_token=False)
    strongest = int(weights[-1, :, -1, 1:].amax(-1).argmax())
    assert without.heads.nonzero().tolist() == [[2, strongest]]


def test_keeping_the_planted_circuit_keeps_the_prediction():
    """Components outside of the graph have the mean over texts in which nothing repeats. A random
    graph of the same size is not enough.
    """
    tracer = Tracer(induction_model())
    task = induction_task(4)
    values = circuits.mean_activations(tracer.decoder, induction_task(40, seed=1).twins)
    kept = survival(tracer, task, values, thresholds=(0.05,), draws=6)
    for unit in ("component", "position"):
        assert kept.beats_random(unit).all()
        assert float(kept.share(unit, "routes").mean()) > 0.5
        assert kept.logit_difference[unit, "random"].shape == (4, 1, 6)
    assert float(kept.empty[0].abs().mean()) < 0.2 * float(kept.full[0].mean())
    which = torch.arange(4)
    logits = circuits.run(tracer.decoder, task.texts)
    torch.testing.assert_close(kept.full[0], task.logit_difference(logits, which))
    torch.testing.assert_close(kept.full[1], task.probability(logits, which))
    removed = survival(tracer, task, values, mode="remove", thresholds=(0.05,), draws=6)
    assert float(removed.share("component", "routes").mean()) < 0.2
    assert removed.beats_random("component").all()


def test_survival_is_what_ablated_runs_say(tmp_path):
    tracer = tiny_tracer("llama")
    task = small_task(2)
    values = circuits.zero_activations(tracer.decoder)
    folder = tmp_path / "keep"
    kept = survival(tracer, task, values, thresholds=(0.02, 0.1), draws=2, checkpoint=folder)
    for i, text in enumerate(task.texts):
        for m, threshold in enumerate((0.02, 0.1)):
            graph = tracer.trace(text, threshold=threshold, granularity="head")
            for unit in ("component", "position"):
                heads, ffn = selected(graph, unit)
                logits = circuits.ablated_logits(
                    tracer.decoder, [text], values, ~heads[None], ~ffn[None]
                )
                expected = task.logit_difference(logits, torch.tensor([i]))
                got = kept.logit_difference[unit, "routes"][i, m : m + 1]
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert len(list(folder.iterdir())) == 2
    assert kept.solved.tolist() == (kept.full[0] > 0).tolist()
    for what, i in (("ld", 0), ("probability", 1)):
        routes, random = (kept.left("position", m, what) for m in ("routes", "random"))
        share = (routes - random) / kept.full[i][:, None]
        assert torch.equal(kept.beats_random("position", what), share > 0)
        # Two thresholds: the trapezoid's height is the mean of its sides.
        torch.testing.assert_close(
            kept.area("position", "routes", what), (routes / kept.full[i][:, None]).mean(1)
        )
        assert torch.equal(kept.area_beats_random("position", what), share.mean(1) > 0)
    again = survival(tracer, task, values, thresholds=(0.1, 0.02), draws=2, checkpoint=folder)
    for key, value in kept.probability.items():
        assert torch.equal(again.probability[key], value)
    with pytest.raises(FormatError, match="another model, task or setting"):
        survival(tracer, task, values, thresholds=(0.3,), draws=2, checkpoint=folder)
    with pytest.raises(ValueError, match="thresholds: is empty"):
        survival(tracer, task, values, thresholds=())
