"""What a survey writes: rows of documents, and their aggregates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from survey_inputs import sentence

from ifr_fast import Tracer
from ifr_fast.survey import Source, Survey, survey


def test_rows_are_the_documents(tracer: Tracer, records: Path, unbroken: Survey) -> None:
    rows = unbroken.predictions.read()
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert unbroken.complete
    assert unbroken.problems == []
    assert len(unbroken.part_numbers) > 5
    for i, line in enumerate(lines):
        ids = tracer.tokenizer(line["text"])["input_ids"]
        mine = rows["document"] == i
        assert rows["token_id"][mine].tolist() == ids[:-1]
        assert rows["next_token_id"][mine].tolist() == ids[1:]
        assert rows["position"][mine].tolist() == list(range(len(ids) - 1))
        assert "".join(rows["token"][mine]) + rows["next_token"][mine][-1] == line["text"]
        assert set(rows["label_kind"][mine]) == {line["kind"]}
        assert set(rows["context"][mine]) == {f"{records}:{i}"}
    assert set(rows["corpus"]) == {"records"}


def test_aggregates_are_those_of_single_traces(tracer: Tracer, tmp_path: Path) -> None:
    """50 predictions, each from a trace of its own."""
    texts = [sentence(i, 6) for i in range(4)]
    found = survey(Source(texts, "c"), tmp_path, model=tracer, thresholds=[0.02, 0.05])
    heads, ffns, within, likely = [], [], [], []
    for text in texts:
        ids = torch.tensor(tracer.tokenizer(text)["input_ids"])
        with torch.inference_mode():
            logits = tracer.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        for t in range(len(ids) - 1):
            graph = tracer.trace(ids, position=t, threshold=0.02)
            heads.append(graph.head_importance())
            ffns.append(graph.ffn_importance())
            strong = tracer.trace(ids, position=t, threshold=0.05).head_edges
            above = strong.weight > 0.05
            flags = torch.zeros_like(heads[-1])
            flags[strong.layer[above], strong.head[above]] = 1
            within.append(flags)
            likely.append(logits[t, ids[t + 1]])
    assert len(heads) >= 50
    corpora = found.corpora.read()
    assert corpora["corpus"].tolist() == ["c"]
    assert corpora["predictions"].tolist() == [len(heads)]
    assert corpora["documents"].tolist() == [4]
    for name, of in (("head_importance", heads), ("ffn_importance", ffns),
                     ("head_frequency_1", within)):  # fmt: skip
        np.testing.assert_allclose(corpora[name][0], torch.stack(of).mean(0), atol=1e-6)
    np.testing.assert_allclose(corpora["log_probability"][0], np.mean(likely), rtol=1e-4)


def test_heads_table_adds_up(unbroken: Survey) -> None:
    heads = unbroken.heads.read()
    L, H = unbroken.n_layers, unbroken.n_heads
    n_documents = len(np.unique(heads["document"]))
    assert len(heads["layer"]) == n_documents * L * H
    assert heads["layer"].reshape(-1, L, H)[0].tolist() == [[i] * H for i in range(L)]
    np.testing.assert_allclose(heads["by_offset"].sum(1), heads["edge_mass"], rtol=1e-5, atol=1e-6)
    assert (heads["edge_mass"] <= heads["mass"] + 1e-5).all()
    assert (heads["same_word"] <= heads["word_mass"] + 1e-6).all()
    assert heads["word_mass"].max() > 0
    corpora = unbroken.corpora.read("head_mass", "predictions")
    mass = heads["mass"].astype(np.float64).reshape(-1, L, H).sum(0)
    np.testing.assert_allclose(corpora["head_mass"][0], mass / corpora["predictions"][0])


def test_columns_are_read_by_name_and_by_part(unbroken: Survey) -> None:
    whole = unbroken.predictions.read("position", "head_in_0")
    assert whole["head_in_0"].dtype == bool
    assert whole["head_in_0"].shape == (len(unbroken.predictions), 3, 6)
    by_part = list(unbroken.predictions.parts("position"))
    assert len(by_part) == len(unbroken.part_numbers)
    assert np.array_equal(np.concatenate([p["position"] for p in by_part]), whole["position"])
    with pytest.raises(ValueError, match="no 'nonsense'"):
        unbroken.predictions.read("nonsense")


def test_reading_a_survey_needs_no_torch(unbroken: Survey) -> None:
    code = (
        "import sys\nfrom ifr_fast.survey import Survey\n"
        "print(len(Survey.open(sys.argv[1]).predictions))\nassert 'torch' not in sys.modules\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(unbroken.path)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) == len(unbroken.predictions)
