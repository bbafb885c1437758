"""Roles of heads: those that were put there, and no others."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_survey import H, L, blank_heads, rows, written

from ifr_fast.survey.analyses import (
    Rule,
    head_roles,
)
from ifr_fast.survey.schema import OFFSETS


def role_columns(n_documents: int = 12, rows_each: int = 40) -> dict[str, Any]:
    """Heads that spread their mass alike: offsets 0 to 9, a tenth each."""
    rng = np.random.default_rng(0)
    predictions = np.repeat(np.arange(n_documents), rows_each)
    columns = blank_heads(predictions, np.full(len(predictions), "c", object), L, H)
    n = len(columns["document"])
    by_offset = np.zeros((n, OFFSETS))
    by_offset[:, :10] = rng.uniform(0.8, 1.2, (n, 10))
    columns |= {
        "by_offset": by_offset,
        "edges": np.full(n, 30),
        "word_targets": np.full(n, 10),
        "first": by_offset.sum(1) * 0.12,
        "punctuation": by_offset.sum(1) * 0.1,
        "word_mass": by_offset.sum(1) * 0.25,
        "same_word": by_offset.sum(1) * 0.25 * 0.2,
    }
    return columns


def give(columns: dict[str, Any], head: tuple[int, int], **shares: float) -> None:
    """Puts shares of a head's mass: offset_D, first, punctuation, word (pieces), same_word."""
    mine = (columns["layer"] == head[0]) & (columns["head"] == head[1])
    mass = columns["by_offset"][mine].sum(1)
    for name, share in shares.items():
        if name.startswith("offset_"):
            columns["by_offset"][mine] = (1 - share) / 10 * mass[:, None] * (np.arange(33) < 10)
            columns["by_offset"][mine, int(name.removeprefix("offset_"))] += share * mass
        elif name == "word":
            columns["word_mass"][mine] = share * mass
        else:
            columns[name][mine] = share * mass


def finish(columns: dict[str, Any]) -> dict[str, Any]:
    columns["edge_mass"] = columns["by_offset"].sum(1)
    columns["mass"] = columns["edge_mass"] * 1.3
    return columns


def predictions_of(heads: dict[str, Any]) -> dict[str, Any]:
    mine = (heads["layer"] == 0) & (heads["head"] == 0)
    counts = heads["rows"][mine]
    document = np.repeat(heads["document"][mine], counts)
    return {"document": document, "corpus": np.full(len(document), "c", object)}


def named(finding: Any) -> dict[tuple[int, int], str]:
    return {
        (row["layer"], row["head"]): row["role"]
        for row in finding.table.to_pylist()
        if row["role"] is not None
    }


def test_roles_are_what_was_put_there(tmp_path: Path) -> None:
    heads = role_columns()
    give(heads, (0, 1), offset_1=0.8, word=0.25, same_word=0.22)  # alike in words and out of them
    give(heads, (0, 2), offset_1=0.8, word=0.8, same_word=0.78)  # in words alone
    give(heads, (1, 0), offset_5=0.9)
    give(heads, (1, 3), first=0.85)
    give(heads, (2, 1), punctuation=0.7)
    give(heads, (2, 2), offset_0=0.95)
    give(heads, (2, 3), offset_1=0.4)  # less than most of it
    finish(heads)
    survey = written(tmp_path, predictions_of(heads), heads, labels=[])
    finding = head_roles(survey)
    assert named(finding) == {
        (0, 1): "previous token",
        (0, 2): "subword merging",
        (1, 0): "offset 5",
        (1, 3): "first token",
        (2, 1): "punctuation",
        (2, 2): "own token",
    }
    (row,) = rows(finding, layer=1, head=0)
    by_offset = heads["by_offset"].reshape(-1, L * H, OFFSETS).sum(0)
    edge_mass = by_offset.sum(-1)
    assert row["score"] == pytest.approx(by_offset[4, 5] / edge_mass[4], rel=1e-5)
    others = [i for i in range(L * H) if i != 4]
    expected = by_offset[others, 5].sum() / edge_mass[others].sum()
    assert row["other_heads"] == pytest.approx(expected, rel=1e-5)
    # 40 targets: of those from 5 on, each gives 1 / (t + 1) to what is 5 before.
    assert row["uniform"] == pytest.approx(sum(1 / (t + 1) for t in range(5, 40)) / 40)
    (row,) = rows(finding, layer=1, head=3)
    assert row["uniform"] == pytest.approx(sum(1 / (t + 1) for t in range(1, 40)) / 40)
    (row,) = rows(finding, layer=0, head=2)
    assert row["selectivity"] == pytest.approx((0.8 / 10) / (0.2 / 30), rel=1e-5)
    assert finding.excerpt.num_rows == 6


def test_no_role_without_mass_edges_or_a_difference_from_others(tmp_path: Path) -> None:
    heads = role_columns()
    for head in product(range(L), range(H)):
        give(heads, head, offset_1=0.85)  # what all heads do is no one's role
    give(heads, (1, 1), offset_7=0.9)
    finish(heads)
    quiet = (heads["layer"] == 1) & (heads["head"] == 1)
    survey = written(tmp_path / "alike", predictions_of(heads), heads, labels=[])
    assert named(head_roles(survey)) == {(1, 1): "offset 7"}
    assert named(head_roles(survey, rule=Rule(min_score=0.95))) == {}
    for change in ({"mass": 0.01, "edge_mass": 0.01}, {"edges": 0.05}, {"mass": 10.0}):
        changed = {name: np.array(x) for name, x in heads.items()}
        for name, factor in change.items():
            changed[name][quiet] = changed[name][quiet] * factor
        path = tmp_path / "-".join(change) / str(change)
        survey = written(path, predictions_of(changed), changed, labels=[])
        assert named(head_roles(survey)) == {}
