"""Parts of speech and function words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic_survey import TAGS, H, L, made_up, rows, written

from ifr_fast.survey.analyses import (
    NotApplicableError,
    function_words,
    parts_of_speech,
)


@pytest.fixture(autouse=True)
def no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure's t-SNE map takes longer than all numbers; the report's tests draw it."""
    monkeypatch.setattr("sklearn.manifold.TSNE.fit_transform", lambda _, x: x[:, :2])


def test_parts_of_speech_are_told_where_they_differ(tmp_path: Path) -> None:
    """Each tag has a head of its own; words say nothing of tags here."""
    columns = made_up(30, 20)
    for i, tag in enumerate(TAGS):
        columns["head_importance"][columns["label_pos"] == tag, 1, i] += 0.3
    finding = parts_of_speech(written(tmp_path, columns), permutations=60, per_class=60)
    for measure, least in (
        ("nearest neighbours", 0.9),
        ("nearest neighbours, other words", 0.9),
        ("silhouette", 0.2),
    ):
        (row,) = [r for r in rows(finding, measure=measure) if r["class"] is None]
        assert row["value"] > least > row["shuffled_most"] + 0.1
        assert row["p"] == pytest.approx(1 / 61)
    assert "far better than chance" in finding.statement


def test_parts_of_speech_are_not_told_where_they_do_not_differ(tmp_path: Path) -> None:
    finding = parts_of_speech(written(tmp_path, made_up(30, 20)), permutations=60)
    for row in (r for r in finding.table.to_pylist() if r["class"] is None):
        assert abs(row["value"] - row["shuffled"]) < 0.08
        assert row["p"] > 0.01
    assert "far better" not in finding.statement


def test_neighbours_must_be_other_documents_and_other_words(tmp_path: Path) -> None:
    """Vectors that tell the document, or the word, but not the class beyond it."""
    columns = made_up(30, 20)
    columns["head_importance"] *= 0.01
    tag_of = dict(
        zip(["the", " cat", ".", ",", " sat", "\n", " of", " red"], TAGS * 2, strict=True)
    )
    columns["label_pos"] = np.array([tag_of[t] for t in columns["token"]], object)
    for i, word in enumerate(tag_of):
        columns["head_importance"][columns["token"] == word, i // H, i % H] += 0.3
    finding = parts_of_speech(written(tmp_path / "word", columns), permutations=20)
    (near,) = [r for r in rows(finding, measure="nearest neighbours") if r["class"] is None]
    (other,) = [
        r for r in rows(finding, measure="nearest neighbours, other words") if r["class"] is None
    ]
    assert near["value"] > 0.95
    assert other["value"] < 0.5
    columns = made_up(30, 20)
    of_document = np.random.default_rng(2).integers(0, 4, 40)
    columns["label_pos"] = np.array(TAGS, object)[of_document[columns["document"]]]
    columns["head_importance"] *= 0.01
    columns["head_importance"].reshape(-1, L * H)[
        np.arange(len(columns["document"])), columns["document"] % 12
    ] += 0.3
    finding = parts_of_speech(written(tmp_path / "document", columns), permutations=20)
    (row,) = [r for r in rows(finding, measure="nearest neighbours") if r["class"] is None]
    assert row["value"] < 0.6  # by rows of its own document every one would be found


def test_the_label_may_be_of_the_next_token(tmp_path: Path) -> None:
    columns = made_up(30, 20)
    tags, document = columns["label_pos"], columns["document"]
    for t in range(len(tags) - 1):
        if document[t] == document[t + 1] and tags[t + 1] in TAGS:
            columns["ffn_importance"][t, TAGS.index(tags[t + 1]) % L] += 0.5
    survey = written(tmp_path, columns)
    scores = {
        of: rows(parts_of_speech(survey, of=of, permutations=5), measure="nearest neighbours")
        for of in ("token", "next")
    }
    (token,), (next_,) = ([r for r in x if r["class"] is None] for x in scores.values())
    assert token["value"] < 0.35
    assert next_["value"] > 0.6  # two of the four tags share a layer


def test_the_sample_does_not_depend_on_parts(tmp_path: Path) -> None:
    columns = made_up(30, 20)
    tables = [
        parts_of_speech(
            written(tmp_path / str(n), columns, n_parts=n), per_class=50, permutations=3
        ).table
        for n in (1, 7)
    ]
    assert tables[0].equals(tables[1])


def test_what_lacks_labels_says_so(tmp_path: Path) -> None:
    survey = written(tmp_path, made_up())
    with pytest.raises(NotApplicableError, match="no label 'lemma'; it has pos"):
        parts_of_speech(survey, label="lemma")
    with pytest.raises(ValueError, match="'token' or 'next', got 'word'"):
        parts_of_speech(survey, of="word")  # type: ignore[arg-type]


def test_function_words_differ_where_they_were_made_to(tmp_path: Path) -> None:
    columns = made_up(40, 30, seed=1)
    function, content = columns["label_pos"] == "DET", np.isin(columns["label_pos"], TAGS[::2])
    columns["head_in_1"][function, 2, 3] = True
    columns["head_in_1"][content, 2, 3] = False
    columns["probability"][function] = 0.9
    survey = written(tmp_path, columns)
    finding = function_words(survey, label="pos")
    (row,) = rows(finding, quantity="probability")
    mine = np.isin(columns["label_pos"], ["ADJ", "NOUN", "VERB"])
    assert row["function_words"] == pytest.approx(0.9)
    assert row["content_words"] == pytest.approx(columns["probability"][mine].mean(), rel=1e-5)
    assert row["q"] <= 0.001
    sure = [r for r in rows(finding, quantity="head frequency") if r["q"] <= 0.05]
    assert [(r["layer"], r["head"]) for r in sure] == [(2, 3)]
    assert "1 of 12 heads" in finding.statement
    by_list = function_words(survey)
    words = np.isin(columns["token"], ["the", " of"])
    (row,) = rows(by_list, quantity="probability")
    assert row["function_words"] == pytest.approx(columns["probability"][words].mean(), rel=1e-5)
