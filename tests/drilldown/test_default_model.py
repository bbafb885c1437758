"""Drill-downs of the default model, against its own float64 run."""

from __future__ import annotations

import pytest
from model_oracle import NAMES, Oracle, assert_close
from oracle import importances, proximity

from ifr_fast import Tracer


@pytest.mark.default_model
def test_drilldowns_on_the_default_model(smol: Tracer) -> None:
    text = "When Mary and John went to the store, John gave a drink to"
    recording = smol.record(text)
    oracle = Oracle(smol.model, NAMES["llama"], recording.token_ids)
    layer, position = 23, len(recording) - 1
    got = smol.contribution_map(recording, layer=layer, head=0)
    assert_close(got, importances(oracle.layers[layer]).heads[0])
    mary = 5099
    lenses = smol.logit_lens(recording, [(i, "post", -1) for i in (10, 29)])
    for lens, i in zip(lenses, (10, 29), strict=True):
        expected = oracle.lens(oracle.layers[i].resid_post[-1:])[0]
        assert_close(lens.logits, expected)
        assert lens.rank(mary) == int((expected > expected[mary]).sum()) + 1
    assert lenses[1].predictions[0].token == " Mary"
    found = smol.promoted_tokens(recording, layer=layer, head=0)
    assert_close(found.logits, oracle.direct(oracle.head(layer, 0, position).sum(0), position))
    assert " Mary" in [x.token for x in found.promoted]
    of, parts = oracle.layers[layer], oracle.neurons(layer)[position]
    neurons = proximity(parts, of.resid_post[position])
    total = neurons.sum() + proximity(of.resid_mid[position], of.resid_post[position])
    scores = smol.neurons(recording, layer=layer)
    assert_close(scores.importance[0], neurons / total)
