"""What a survey reads: forms of input, and those that are reported as problems."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from survey_inputs import SMALL, sentence

from ifr_fast import IfrError, Tracer
from ifr_fast.survey import Problem, Source, Survey, survey
from ifr_fast.survey.inputs import Item, Reading
from ifr_fast.survey.readers import Progress


def test_every_form_of_input_gives_the_same_rows(tracer: Tracer, tmp_path: Path) -> None:
    texts = [sentence(i, 5) for i in range(3)]
    (tmp_path / "in").mkdir()
    plain = tmp_path / "in" / "a.txt"
    plain.write_text("\n".join(texts) + "\n")
    paragraphs = tmp_path / "b.txt"
    paragraphs.write_text("\n\n".join(texts) + "\n\n\n")
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    jsonl = tmp_path / "c.jsonl"
    jsonl.write_text(lines)
    zipped = tmp_path / "d.jsonl.gz"
    zipped.write_bytes(gzip.compress(lines.encode()))
    parquet = tmp_path / "e.parquet"
    pq.write_table(pa.table({"text": texts}), parquet)
    ids = [{"token_ids": tracer.tokenizer(t)["input_ids"]} for t in texts]
    given: list[tuple[Any, dict[str, Any]]] = [
        (tmp_path / "in", {"split": "line"}),
        (paragraphs, {"split": "paragraph"}),
        (str(jsonl), {}),
        (zipped, {}),
        (f"named={parquet}", {}),
        (Source(texts), {}),
        ({"x": iter(texts)}, {}),
        (({"text": t} for t in texts), {}),
        ([Source(ids, "y")], {}),
    ]
    columns = ("document", "position", "token_id", "next_token", "head_importance", "head_in_1")
    first = None
    for i, (inputs, options) in enumerate(given):
        found = survey(inputs, tmp_path / f"out{i}", model=tracer, **SMALL, **options)
        rows = found.predictions.read(*columns)
        first = rows if first is None else first
        for name in columns:
            assert np.array_equal(rows[name], first[name]), (i, name)
    assert set(Survey.open(tmp_path / "out4").predictions.read("corpus")["corpus"]) == {"named"}


def test_a_hugging_face_data_set(tracer: Tracer, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="expected: datasets is not installed")
    data = datasets.Dataset.from_list([{"text": sentence(i), "topic": f"t{i}"} for i in range(3)])
    found = survey(data, tmp_path, model=tracer, label_by={"corpus": "topic"}, **SMALL)
    assert found.corpora.read("corpus")["corpus"].tolist() == ["t0", "t1", "t2"]


def test_bad_input_is_reported_with_its_place(tracer: Tracer, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    good = sentence(0)
    (folder / "a-empty.txt").write_bytes(b"")
    (folder / "b-binary.txt").write_bytes(b"abc\0def")
    (folder / "c-lines.txt").write_bytes(
        b"\n".join([good.encode(), "schön".encode("latin1"), b"", good.encode(), b"x"])
    )
    (folder / "d-records.jsonl").write_text(
        "\n".join(
            [
                json.dumps({"text": good}),
                "{",
                "[1]",
                '{"other": 1}',
                '{"text": 3}',
                '{"text": ""}',
                '{"text": "half \\ud800"}',
                json.dumps({"text": good}),
            ]
        )
    )
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"text": [good] * 5}), whole)
    (folder / "e-broken.parquet").write_bytes(whole.read_bytes()[:-20])
    (folder / "f-utf16.txt").write_bytes(good.encode("utf-16"))
    (folder / "g.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": good}).encode())[:-12])
    (folder / "h-one-long-line.txt").write_text(sentence(5, 2000))
    found = survey(folder, tmp_path / "out", model=tracer, split="line", **SMALL)
    told = [(Path(p.where.partition(" ")[0]).name, p.why) for p in found.problems]
    expected = [
        ("a-empty.txt", "is empty"),
        ("b-binary.txt", "a NUL at byte 3"),
        ("c-lines.txt:1", f"not UTF-8 at byte {len(good) + 1 + 3}"),
        ("c-lines.txt:3", "has 1 tokens"),
        ("d-records.jsonl", "is not JSON"),
        ("d-records.jsonl:2", "no record but list"),
        ("d-records.jsonl:3", "has no field 'text'"),
        ("d-records.jsonl:4", "is no text but int"),
        ("d-records.jsonl:5", "is empty"),
        ("d-records.jsonl:6", "no Unicode text"),
        ("e-broken.parquet", "is broken"),
        ("f-utf16.txt", "a NUL"),
        ("g.jsonl.gz", "is broken"),
    ]
    assert len(told) == len(expected)
    for (where, why), (place, reason) in zip(told, expected, strict=True):
        assert where == place
        assert reason in why
    rows = found.predictions.read("context", "position")
    assert rows["position"].max() == 127  # the long line, cut to the context of 128
    names = {Path(c).name for c in rows["context"]}
    assert {"c-lines.txt:0", "c-lines.txt:2", "d-records.jsonl:0", "d-records.jsonl:7"} <= names
    with pytest.raises(IfrError, match=r"a-empty.txt: is empty"):
        survey(folder, tmp_path / "strict", model=tracer, split="line", strict=True, **SMALL)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b""), ("a.txt", b"\r\n \n"), ("a.jsonl", b"\r\n\r\n"), ("a.gz", gzip.compress(b""))],
)
def test_nothing_to_survey(name: str, content: bytes, tracer: Tracer, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IfrError, match=rf"nothing could be surveyed.*{name}: is empty"):
        survey(tmp_path / name, tmp_path / "out", model=tracer, split="line")


def test_no_documents_at_all(tracer: Tracer, tmp_path: Path) -> None:
    with pytest.raises(IfrError, match=r"nothing could be surveyed.*c: is empty"):
        survey(Source(iter([]), "c"), tmp_path, model=tracer)


def _problems(source: Source) -> list[str]:
    return [str(x) for x in source.items(Reading(), Progress()) if isinstance(x, Problem)]


def test_words_and_token_ids_of_other_types() -> None:
    records = [
        {"token_ids": 5},
        {"words": "the cat"},
        {"token_ids": {"a": 1}},
        {"token_ids": [1.0, 2.0]},
        {"token_ids": np.arange(4)},
        {"token_ids": torch.arange(4)},
        {"words": ("the", "cat")},
    ]
    assert _problems(Source(records, "c")) == [
        "c:0: its 'token_ids' are no list but int",
        "c:1: its 'words' are no list but str",
        "c:2: its 'token_ids' are no list but dict",
        "c:3: its 'token_ids' are not all integers",
    ]
    items = [x for x in Source(records, "c").items(Reading(), Progress()) if isinstance(x, Item)]
    assert [x.token_ids for x in items] == [[0, 1, 2, 3], [0, 1, 2, 3], None]
    assert items[2].words == ["the", "cat"]


def test_a_gzip_file_broken_within(tmp_path: Path) -> None:
    """Not cut short: its deflate stream is damaged."""
    path = tmp_path / "a.jsonl.gz"
    raw = bytearray(gzip.compress(os.urandom(20_000).hex().encode(), mtime=0))
    raw[10] = 0xFF  # an impossible kind of block
    path.write_bytes(raw)
    (source,) = Source(path).files()
    (told,) = _problems(source)
    assert "is broken" in told


def test_a_parquet_row_that_is_not_utf8(tmp_path: Path) -> None:
    offsets, raw = pa.py_buffer(np.array([0, 2, 4, 6], np.int32)), pa.py_buffer(b"ab\xff\xfecd")
    text = pa.StringArray.from_buffers(3, offsets, raw)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": text}), path)
    (source,) = Source(path).files()
    items = list(source.items(Reading(), Progress()))
    assert [x.text for x in items if isinstance(x, Item)] == ["ab", "cd"]
    (told,) = _problems(source)
    assert told.startswith(f"{path}:1: has text that is not UTF-8")


@pytest.mark.parametrize("split", ["file", "line", "paragraph"])
def test_texts_of_any_size_are_read_in_stretches(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifr_fast.survey.readers._STRETCH", 64)
    path = tmp_path / "a.txt"
    text = "word " * 50 + "\n\n" + "é" * 100 + "\nlast line\n"
    path.write_text(text)
    progress = Progress()
    (source,) = Source(path).files()
    items = list(source.items(Reading(split=split), progress))
    assert all(isinstance(item, Item) for item in items)
    assert max(len(item.text.encode()) for item in items) <= 64 + 1
    joined = "".join(item.text for item in items)
    assert joined.replace("\n", "") == text.replace("\n", "")
    assert progress.done == path.stat().st_size
