"""Analyses of surveys: their numbers against plain loops, and what they must and must not find."""

from __future__ import annotations

import re
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_survey import TAGS, THRESHOLDS, H, L, blank_heads, made_up, written

from ifr_fast.survey.analyses import (
    NotApplicableError,
    Rule,
    bypass,
    contrast,
    domains,
    frequency,
    function_words,
    head_roles,
    importance,
    parts_of_speech,
)
from ifr_fast.survey.analyses.domains import halves_differ
from ifr_fast.survey.analyses.statistics import bootstrap, compare, compare_pairs, correct
from ifr_fast.survey.analyses.units import units_of
from ifr_fast.survey.schema import OFFSETS


def rows(finding: Any, **equal: Any) -> list[dict[str, Any]]:
    """Of a finding's table, those whose columns have these values."""
    return [
        row
        for row in finding.table.to_pylist()
        if all(row[name] == value for name, value in equal.items())
    ]


# Statistics


def test_bootstrap_is_the_quantile_of_resampled_ratios() -> None:
    """Of three documents there are 27 samples, so the percentiles are known."""
    sums, counts = np.array([1.0, 5.0, 9.0]), np.array([10.0, 10.0, 20.0])
    of = bootstrap(sums, counts, seed=1, resamples=40_000, level=0.8)
    every = sorted(
        sums[list(draw)].sum() / counts[list(draw)].sum() for draw in product(range(3), repeat=3)
    )
    assert of.value == pytest.approx(15 / 40)
    assert of.low == pytest.approx(every[2], abs=0.02)  # 3 of 27 lie at or below
    assert of.high == pytest.approx(every[24], abs=0.02)


def test_the_permutation_test_counts_relabellings() -> None:
    """All 20 ways to deal six documents into two groups of three, by a plain loop."""
    rng = np.random.default_rng(3)
    s, n = rng.random((6, 2)) * 10, rng.integers(5, 20, 6).astype(float)

    def t(first: tuple[int, ...]) -> np.ndarray:
        groups = [list(first), [i for i in range(6) if i not in first]]
        r, e = [], []
        for group in groups:
            ratio = s[group].sum(0) / n[group].sum()
            residual = ((s[group] - ratio * n[group, None]) ** 2).sum(0)
            r.append(ratio)
            e.append(residual * 3 / 2 / n[group].sum() ** 2)
        return np.abs(r[0] - r[1]) / np.sqrt(e[0] + e[1])

    every = [t(order[:3]) for order in permutations(range(6))]
    exact = np.mean([x >= every[0] - 1e-9 for x in every], axis=0)
    found = compare((s[:3], n[:3]), (s[3:], n[3:]), seed=0, permutations=20_000)
    assert found.first == pytest.approx(s[:3].sum(0) / n[:3].sum())
    assert found.p == pytest.approx(exact, abs=0.015)


def test_the_sign_flip_test_counts_flips() -> None:
    d = np.random.default_rng(4).normal(0.4, 1, (7, 3))

    def t(x: np.ndarray) -> np.ndarray:
        return np.abs(x.mean(0)) / x.std(0, ddof=1)

    every = [t(d * np.array(signs)[:, None]) for signs in product((1, -1), repeat=7)]
    exact = np.mean([x >= t(d) - 1e-9 for x in every], axis=0)
    mean, p = compare_pairs(d, seed=0, permutations=20_000)
    assert mean == pytest.approx(d.mean(0))
    assert p == pytest.approx(exact, abs=0.015)


def test_perfect_separation_is_as_sure_as_permutations_let_it() -> None:
    n = np.full(8, 10.0)
    found = compare((np.full((8, 2), 10.0), n), (np.zeros((8, 2)), n), seed=0, permutations=999)
    assert (found.p <= 0.003).all()  # 2 of 12,870 relabellings
    same = compare((np.zeros((8, 1)), n), (np.zeros((8, 1)), n), seed=0, permutations=99)
    assert same.p == 1


def test_documents_not_predictions_are_the_unit() -> None:
    """Documents that differ among themselves: by predictions every test would be sure."""
    wrong = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        s, n = rng.random((20, 1)) * 1000, np.full(20, 1000.0)
        found = compare((s[:10], n[:10]), (s[10:], n[10:]), seed=seed, permutations=399)
        wrong += int(found.p[0] <= 0.05)
    assert wrong <= 6  # 2 are expected; 7 or more have a chance of 0.3%


def test_correction_is_benjamini_hochberg() -> None:
    p = np.array([[0.01, 0.04], [0.03, 0.5]])
    assert correct(p) == pytest.approx(np.array([[0.04, 0.16 / 3], [0.16 / 3, 0.5]]))


# (a), (b)


def test_importance_is_the_mean(tmp_path: Path) -> None:
    columns = made_up()
    columns["head_importance"][..., 2, 1] += 0.2
    finding = importance(written(tmp_path, columns))
    heads, ffn = columns["head_importance"], columns["ffn_importance"]
    for layer in range(L):
        (row,) = rows(finding, component="FFN", layer=layer)
        assert row["importance"] == pytest.approx(ffn[:, layer].mean(), rel=1e-5)
        (row,) = rows(finding, component="attention", layer=layer)
        assert row["importance"] == pytest.approx(heads[:, layer].sum(1).mean(), rel=1e-5)
        for head in range(H):
            (row,) = rows(finding, component="head", layer=layer, head=head)
            assert row["importance"] == pytest.approx(heads[:, layer, head].mean(), rel=1e-5)
            assert row["low"] < row["importance"] < row["high"]
    assert "the strongest are L2H1 (" in finding.statement


def test_some_corpora_alone(tmp_path: Path) -> None:
    columns = made_up()
    survey = written(tmp_path, columns)
    mine = columns["corpus"] == "odd"
    (row,) = rows(importance(survey, ["odd"]), component="head", layer=1, head=2)
    assert row["importance"] == pytest.approx(columns["head_importance"][mine, 1, 2].mean())
    with pytest.raises(ValueError, match="no corpus 'none'; it has 'even', 'odd'"):
        importance(survey, ["none"])


def test_frequency_is_the_share_of_graphs(tmp_path: Path) -> None:
    columns = made_up()
    finding = frequency(written(tmp_path, columns, n_parts=3))
    for row in finding.table.to_pylist():
        for k, threshold in enumerate(THRESHOLDS):
            share = columns[f"head_in_{k}"][:, row["layer"], row["head"]].mean()
            assert row[f"frequency_{threshold:g}"] == pytest.approx(share)


# (c)


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


# (d)


def test_bypass_tells_what_passes(tmp_path: Path) -> None:
    columns = made_up()
    period, first = columns["token"] == ".", columns["position"] == 0
    columns["residual_mid"][period] = 0.97
    columns["residual_post"][period] = 0.95
    columns["residual_post"][first, 1:] = columns["residual_mid"][first, 1:] = 0.99
    finding = bypass(written(tmp_path, columns), min_count=5)
    (row,) = rows(finding, kind="class", token="period")
    mine = period & ~first
    assert row["count"] == mine.sum()
    assert row["residual_share"] == pytest.approx(0.96)
    assert row["blocks_passed"] == pytest.approx(1)
    (row,) = rows(finding, kind="class", token="other tokens")
    both = np.concatenate([columns["residual_mid"], columns["residual_post"]], axis=1)
    other = ~first & np.isin(columns["token"], ["the", " cat", " sat", " of", " red"])
    assert row["residual_share"] == pytest.approx(both[other].mean(), rel=1e-5)
    assert row["blocks_passed"] == pytest.approx((both[other] >= 0.9).mean())
    (row,) = rows(finding, kind="token", token=" cat")
    assert row["residual_share"] == pytest.approx(
        both[~first & (columns["token"] == " cat")].mean(), rel=1e-5
    )
    assert "Period: 96%" in finding.statement
    assert "more than at other tokens" in finding.statement
    assert "passes both blocks by, on average, in layers 1 to 2" in finding.statement
    assert "“.” is number 1 of the 8 tokens" in finding.statement


def test_bypass_of_parallel_blocks(tmp_path: Path) -> None:
    columns = made_up()
    columns["residual_mid"][:] = np.nan
    finding = bypass(written(tmp_path, columns))
    (row,) = rows(finding, kind="class", token="period")
    mine = (columns["token"] == ".") & (columns["position"] > 0)
    assert row["residual_share"] == pytest.approx(columns["residual_post"][mine].mean(), rel=1e-5)


# (e), (g)


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


# (f), (h)


def test_domains_find_the_head_that_differs(tmp_path: Path) -> None:
    columns = made_up(60, 30)
    odd = columns["corpus"] == "odd"
    columns["head_in_1"][odd, 0, 2] |= np.random.default_rng(0).random(odd.sum()) < 0.5
    finding = domains(written(tmp_path, columns), permutations=1999)
    sure = [row for row in finding.table.to_pylist() if row["q"] <= 0.05]
    (row,) = sure
    assert (row["corpus"], row["layer"], row["head"]) == ("even", 0, 2)
    frequency_ = [columns["head_in_1"][mask, 0, 2].mean() for mask in (~odd, odd)]
    assert [row["frequency"], row["elsewhere"]] == pytest.approx(frequency_)
    assert row["low"] < row["difference"] < row["high"] < 0
    assert finding.excerpt.num_rows == 1
    assert "0 of 24 heads differ by the same test" in finding.statement


def test_halves_of_a_corpus_do_not_differ(tmp_path: Path) -> None:
    """Documents differ among themselves, and their halves are found alike."""
    columns = made_up(80, 25)
    columns["corpus"] = np.where(columns["document"] < 40, "first half", "second half").astype(
        object
    )
    finding = domains(written(tmp_path, columns), permutations=1999)
    assert "No head's frequency differs" in finding.statement
    assert all(row["q"] > 0.05 for row in finding.table.to_pylist())


def test_false_discoveries_are_rare() -> None:
    """40 surveys without any effect: at a rate of 5%, more than 7 have a chance of 0.1%."""
    wrong = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        counts = rng.integers(20, 60, 40).astype(float)
        likely = rng.beta(2, 5, (40, 30))
        sums = rng.binomial(counts[:, None].astype(int), likely).astype(float)
        q = halves_differ(np.zeros(40, int), counts, sums, seed=seed, permutations=999)
        wrong += int((q <= 0.05).any())
    assert wrong <= 7


def test_domains_need_two_corpora(tmp_path: Path) -> None:
    survey = written(tmp_path, made_up())
    with pytest.raises(NotApplicableError, match="at least 2 with 2 documents or more, got 'odd'"):
        domains(survey, ["odd"])
    with pytest.raises(ValueError, match=r"one of 0\.02, 0\.04, got 0\.03"):
        domains(survey, threshold=0.03)


def test_contrast_looks_at_the_last_prediction(tmp_path: Path) -> None:
    columns = made_up(60, 12)
    last = np.append(columns["document"][1:] != columns["document"][:-1], True)
    odd = columns["corpus"] == "odd"
    columns["head_importance"][last & odd, 1, 1] += 0.2
    columns["head_importance"][~last & ~odd, 2, 0] += 0.5  # elsewhere: not to be seen
    survey = written(tmp_path, columns)
    finding = contrast(survey, "odd", "even", permutations=1999)
    sure = [
        row for row in finding.table.to_pylist() if row["q"] <= 0.05 and row["layer"] is not None
    ]
    (row,) = sure
    assert (row["quantity"], row["layer"], row["head"]) == ("head importance", 1, 1)
    assert row["first"] == pytest.approx(columns["head_importance"][last & odd, 1, 1].mean())
    everywhere = contrast(survey, "odd", "even", position="all", permutations=1999)
    (row,) = rows(everywhere, quantity="head importance", layer=2, head=0)
    assert row["q"] <= 0.05
    with pytest.raises(ValueError, match="no corpus 'third'"):
        contrast(survey, "odd", "third")


def test_contrasts_of_other_corpora_have_other_names(tmp_path: Path) -> None:
    """Their files are named so, and most of a name may be no part of a file's name."""
    columns = made_up(12, 8)
    names = np.array(["日本", "中国", "a/b", "a b", "A-b", "a-b"], object)
    columns["corpus"] = names[columns["document"] % 6]
    survey = written(tmp_path, columns)
    found = [contrast(survey, name, "a-b", permutations=9).name for name in names[:-1]]
    assert len(set(found)) == 5
    assert all(re.fullmatch(r"contrast_[a-z0-9_-]+", name) for name in found)


def test_a_contrast_needs_two_prompts_each(tmp_path: Path) -> None:
    columns = made_up(6, 8)
    columns["corpus"] = np.where(columns["document"] == 0, "one", "rest").astype(object)
    with pytest.raises(NotApplicableError, match="at least 2 in 'one', got 1"):
        contrast(written(tmp_path, columns), "one", "rest")


# Units


def test_many_documents_are_dealt_into_units(tmp_path: Path) -> None:
    columns = made_up(30)
    survey = written(tmp_path, columns)
    units = units_of(survey, most=10)
    assert len(units) == 10
    assert units.corpora == ["even", "odd"]
    sums = units.sum(survey.predictions, ["probability"], lambda part: {"p": part["probability"]})
    for u in range(10):
        documents = units.documents[units.unit == u]
        assert len(documents) == 3
        mine = np.isin(columns["document"], documents)
        assert sums["p"][u] == pytest.approx(columns["probability"][mine].sum(), rel=1e-5)
        assert set(documents % 2) == {units.corpus[u]}
