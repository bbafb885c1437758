"""A model whose heads do what they were written to do, surveyed and analysed: the analyses name
exactly these heads, and nothing else.
"""

from __future__ import annotations

import pytest
import torch
from planted import (
    OFFSET_3,
    PREVIOUS,
    SAME,
    SINK,
    SUBWORD,
    TOKENS,
    H,
    L,
    planted_model,
    planted_texts,
    planted_tokenizer,
)

from ifr_fast import Tracer
from ifr_fast.survey import Source, Survey, survey
from ifr_fast.survey.analyses import Finding, frequency, head_roles


@pytest.fixture(scope="module")
def tracer() -> Tracer:
    return Tracer(planted_model(), planted_tokenizer())


@pytest.fixture(scope="module")
def surveyed(tracer: Tracer, tmp_path_factory: pytest.TempPathFactory) -> Survey:
    path = tmp_path_factory.mktemp("planted") / "survey"
    return survey(Source(planted_texts(60), corpus="planted"), path, model=tracer)


@pytest.fixture(scope="module")
def roles(surveyed: Survey) -> Finding:
    return head_roles(surveyed)


def test_the_heads_attend_where_they_were_written_to(tracer: Tracer) -> None:
    """By the model's own attention weights: the survey is not asked."""
    (text,) = planted_texts(1, seed=5)
    ids = torch.tensor([tracer.tokenizer(text)["input_ids"]])
    model = planted_model()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = torch.stack(model(ids, output_attentions=True).attentions)[:, 0]
    T = ids.shape[1]
    later = [t for t in range(2, T) if not TOKENS[ids[0, t]].startswith(" ")]
    first = [t for t in range(1, T) if t not in later]
    assert len(later) > 5
    for t in range(3, T):
        assert attention[PREVIOUS][t, t - 1] > 0.99
        assert attention[OFFSET_3][t, t - 3] > 0.95
    for t in range(1, T):
        assert attention[SINK][t, 0] > 0.95
    assert min(attention[SUBWORD][t, t - 1] for t in later) > 0.99
    assert min(attention[SUBWORD][t, 0] for t in first) > 0.99


def test_exactly_the_planted_heads_are_named(roles: Finding) -> None:
    named = {
        (row["layer"], row["head"]): row["role"]
        for row in roles.table.to_pylist()
        if row["role"] is not None
    }
    assert named == {
        PREVIOUS: "previous token",
        OFFSET_3: "offset 3",
        SUBWORD: "subword merging",
        SINK: "first token",
    }


def test_the_evidence_is_there(roles: Finding) -> None:
    of = {(row["layer"], row["head"]): row for row in roles.table.to_pylist()}
    assert of[PREVIOUS]["previous"] > 0.95
    assert of[PREVIOUS]["selectivity"] < 2  # in words as out of them
    assert of[SUBWORD]["subword"] > 0.95
    assert of[SUBWORD]["selectivity"] > 10
    assert of[OFFSET_3]["best_offset"] == 3
    assert of[OFFSET_3]["at_best_offset"] > 0.7  # the first tokens have none 3 before
    assert of[SINK]["first"] > 0.9
    for head in (PREVIOUS, SUBWORD, SINK, OFFSET_3):
        assert of[head]["low"] <= of[head]["score"] <= of[head]["high"]
        assert of[head]["other_heads"] < of[head]["low"] / 2
    assert of[SAME]["judged"]  # a decoy that carries as much as they do
    for line in ("Previous token head: L0H1 (", "Offset 3 head: L1H2 (",
                 "Subword merging head: L0H3 (", "First-token sink head: L1H0 ("):  # fmt: skip
        assert line in roles.statement


def test_planted_heads_are_the_active_ones(surveyed: Survey) -> None:
    table = frequency(surveyed).table.to_pylist()
    shares = {(row["layer"], row["head"]): row["frequency_0.04"] for row in table}
    assert len(shares) == L * H
    assert min(shares[PREVIOUS], shares[SINK]) > 0.7
