"""Surveys from end to end: what is read, written, resumed and reported."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from survey_inputs import assert_same_rows, save_tiny, sentence, write_records
from typer.testing import CliRunner

from ifr_fast import FormatError, IfrError, Tracer
from ifr_fast.cli import app
from ifr_fast.survey import Problem, Source, State, Survey, survey
from ifr_fast.survey import parts as parts_module
from ifr_fast.survey.documents import Cutter, Document, Vocabulary
from ifr_fast.survey.inputs import Item, Progress, Reading

SMALL = {"window_tokens": 100, "batch_tokens": 64, "thresholds": (0.02, 0.05)}


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tracer(tiny_dir: Path) -> Tracer:
    return Tracer.from_pretrained(tiny_dir)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl", 40)


@pytest.fixture(scope="module")
def unbroken(tracer: Tracer, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Survey:
    out = tmp_path_factory.mktemp("unbroken")
    return survey(records, out, model=tracer, label_by=["kind"], **SMALL)


# What is written


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


# What is read


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


def test_labels_of_words_reach_their_tokens(tracer: Tracer, tmp_path: Path) -> None:
    words = ["the", "unbelievable", "cat", ".", "sat"]
    record = {"words": words, "pos": ["DT", "JJ", "NN", ".", None], "id": 7}
    spaced = {**record, "text": "the unbelievable cat. sat"}
    found = survey(
        [Source([record, spaced], "w")], tmp_path, model=tracer, label_by=["pos", "who=id"], **SMALL
    )
    rows = found.predictions.read("document", "token", "label_pos", "label_who")
    assert set(rows["label_who"]) == {"7"}
    for i, text in enumerate([" ".join(words), spaced["text"]]):
        mine = rows["document"] == i
        at = 0
        for token, label in zip(rows["token"][mine], rows["label_pos"][mine], strict=True):
            assert text[at : at + len(token)] == token
            at += len(token)
            last = text[at - 1]
            if last == " ":  # a space by itself is of no word
                assert label is None
                continue
            begun = [j for j in range(5) if sum(map(len, words[:j])) < len(
                text[:at].replace(" ", ""))]  # fmt: skip
            assert label == record["pos"][begun[-1]]


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 300), st.integers(2, 40), st.integers(0, 2), st.booleans())
def test_each_token_is_predicted_once_however_it_is_cut(
    n: int, max_tokens: int, first: int, by_ids: bool
) -> None:
    ids = list(range(n))
    cutter = Cutter(Vocabulary(None, 1000), Reading(), max_tokens)
    if not by_ids and first:

        class Tokenizer:
            is_fast = False

            def __call__(self, text: str, **_: Any) -> dict[str, Any]:
                mask = [1] * first + [0] * n
                return {"input_ids": [900 + i for i in range(first)] + ids,
                        "special_tokens_mask": mask}  # fmt: skip

            def decode(self, ids: list[int], **_: Any) -> str:
                return str(ids[0])

            def convert_ids_to_tokens(self, i: int) -> str:
                return str(i)

        if max_tokens < first:
            return
        cutter = Cutter(Vocabulary(Tokenizer(), 1000), Reading(), max_tokens)
        pieces = list(cutter.documents(Item("x", "x", text="x")))
    else:
        pieces = list(cutter.documents(Item("x", "x", token_ids=ids)))
    predicted = []
    for piece in pieces:
        assert isinstance(piece, Document)
        assert len(piece.tokens.ids) - 1 <= max_tokens
        if not by_ids and first:
            assert piece.tokens.ids[:first].tolist() == [900 + i for i in range(first)]
        predicted += [i for i in piece.tokens.ids[1:].tolist() if i < 900]
    assert predicted == (ids if first and not by_ids else ids[1:])


def test_special_tokens_begin_every_piece(tmp_path: Path) -> None:
    tracer = Tracer.from_pretrained(save_tiny(tmp_path / "m", first=True))
    found = survey(
        Source([sentence(1, 60)], "c"), tmp_path / "out", model=tracer, max_tokens=30, **SMALL
    )
    rows = found.predictions.read("position", "token_id", "context")
    assert len(set(rows["context"])) > 3
    assert (rows["token_id"][rows["position"] == 0] == 0).all()
    assert rows["position"].max() == 29


def test_later_pieces_of_words(tracer: Tracer) -> None:
    vocabulary = Vocabulary(tracer.tokenizer, tracer.decoder.vocab_size)
    text = "the cat, isn't 北京 naïve 12"
    ids = np.array(tracer.tokenizer(text)["input_ids"])
    strings = vocabulary.strings(ids)
    tokens = vocabulary.tokens(np.append(ids, ids[-1:]))
    at = {i for i, later in enumerate(tokens.later_piece) if later}
    joined = [i for i in range(1, len(ids)) if strings[i - 1][-1:].isalpha()
              and strings[i][:1].isalpha()]  # fmt: skip
    assert set(joined) <= at
    assert "".join(s for s in strings if s != "\ufffd").startswith("the cat, isn't ")
    for i in at:  # no word goes on behind a space or a mark
        assert strings[i][0] == "\ufffd" or strings[i][0].isalpha()
        assert tokens.word[i] == tokens.word[i - 1]
    comma = strings.index(",")
    assert tokens.punctuation[comma]
    assert not tokens.later_piece[comma + 1]
    assert {s for s, p in zip(strings, tokens.punctuation, strict=True) if p} == {",", "'"}


# Bad input: reported with its place, and the run goes on


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


def test_what_an_iterable_raises_is_no_problem_of_the_text(tracer: Tracer, tmp_path: Path) -> None:
    """A stream that breaks off must not pass for a whole one."""
    texts = [sentence(i) for i in range(6)]

    def broken() -> Any:
        yield from texts[:4]
        raise ConnectionError("the line is dead")

    with pytest.raises(ConnectionError):
        survey(Source(broken(), "c"), tmp_path, model=tracer, **SMALL)
    assert not Survey.open(tmp_path).complete
    found = survey(Source(texts, "c"), tmp_path, model=tracer, resume=True, **SMALL)
    assert found.corpora.read("documents")["documents"].tolist() == [6]


@pytest.mark.parametrize("existed", [False, True])
def test_nothing_is_left_of_a_survey_that_was_not_begun(tmp_path: Path, existed: bool) -> None:
    out = tmp_path / "survey"
    if existed:
        out.mkdir()
    with pytest.raises((ValueError, OSError)):
        survey([sentence(0)], out, model=str(tmp_path / "no model"), **SMALL)
    assert out.exists() == existed
    assert not existed or list(out.iterdir()) == []


def test_a_folder_around_the_output(
    tracer: Tracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ifr-fast survey . --out survey`: what it has written is no text of it."""
    (tmp_path / "a.txt").write_text(sentence(0))
    monkeypatch.chdir(tmp_path)
    first = survey(".", "survey", model=tracer, **SMALL)
    again = survey(".", "survey", model=tracer, resume=True, **SMALL)
    assert again.problems == []
    assert_same_rows(again, first)
    assert again.corpora.read("corpus")["corpus"].tolist() == [tmp_path.name.partition(".")[0]]


@pytest.mark.parametrize("split", ["file", "line", "paragraph"])
def test_texts_of_any_size_are_read_in_stretches(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifr_fast.survey.inputs._STRETCH", 64)
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


# Interruptions


def test_a_run_that_stops_anywhere_is_resumed_bit_for_bit(
    tracer: Tracer, records: Path, unbroken: Survey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops before every single write of a file, in turn."""
    own, n_left = parts_module._write, 0

    def write(*args: Any, **kwargs: Any) -> None:
        nonlocal n_left
        if n_left == 0:
            raise KeyboardInterrupt
        n_left -= 1
        own(*args, **kwargs)

    monkeypatch.setattr(parts_module, "_write", write)
    n_runs = 0
    while True:
        n_left = 3  # two files a part: stops before heads, then before predictions, ...
        n_runs += 1
        try:
            found = survey(records, tmp_path, model=tracer, label_by=["kind"], resume=True, **SMALL)
        except KeyboardInterrupt:
            continue
        break
    assert n_runs > 4
    assert_same_rows(found, unbroken)
    assert found.complete
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    n_left = 10
    survey(records, tmp_path, model=tracer, label_by=["kind"], resume=True, **SMALL)
    assert {path: path.read_bytes() for path in before} == before


def test_a_killed_run_is_resumed_bit_for_bit(
    tiny_dir: Path, records: Path, unbroken: Survey, tracer: Tracer, tmp_path: Path
) -> None:
    """SIGKILL, at a moment that nobody chose."""
    code = (
        "import sys\nfrom ifr_fast.survey import survey\n"
        "survey(sys.argv[1], sys.argv[2], model=sys.argv[3], label_by=['kind'], resume=True,\n"
        f"       on_state=lambda state: print('part', flush=True), **{SMALL!r})\n"
    )
    command = [sys.executable, "-c", code, str(records), str(tmp_path), str(tiny_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert run.stdout is not None
    for _ in range(2):
        assert run.stdout.readline() == b"part\n"
    time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    written = len(list((tmp_path / "predictions").glob("part-*.parquet")))
    assert 2 <= written < len(unbroken.part_numbers)
    assert not Survey.open(tmp_path).complete
    found = survey(records, tmp_path, model=tracer, label_by=["kind"], resume=True, **SMALL)
    assert_same_rows(found, unbroken)


def test_parts_of_one_document_are_resumed(
    tracer: Tracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows end within an item."""
    texts = [sentence(1, 200), sentence(2, 3)]
    options = {**SMALL, "max_tokens": 40}
    whole = survey(Source(texts, "c"), tmp_path / "whole", model=tracer, **options)
    assert len(whole.part_numbers) > 3
    out = tmp_path / "broken"
    survey(Source(texts, "c"), out, model=tracer, **options)
    for part in (1, 3):  # as Ray may have left them
        (out / "predictions" / f"part-{part:06}.parquet").unlink()
    assert_same_rows(survey(Source(texts, "c"), out, model=tracer, resume=True, **options), whole)


def test_what_is_not_the_same_survey_is_not_gone_on_with(
    tracer: Tracer, records: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    survey(records, out, model=tracer, **SMALL)

    def again(**changed: Any) -> None:
        survey(records, out, **{"model": tracer, "resume": True, **SMALL, **changed})

    with pytest.raises(FormatError, match="holds a survey already"):
        again(resume=False)
    with pytest.raises(FormatError, match="another model"):
        again(model=Tracer.from_pretrained(save_tiny(tmp_path / "other", seed=1)))
    with pytest.raises(FormatError, match="thresholds"):
        again(thresholds=(0.01, 0.05))
    lines = records.read_text().splitlines(keepends=True)
    copy = tmp_path / "copy.jsonl"
    copy.write_text("".join(lines))
    survey(copy, tmp_path / "changed", model=tracer, **SMALL)
    copy.write_text("".join([*lines, lines[0]]))
    with pytest.raises(FormatError, match="from other inputs"):
        survey(copy, tmp_path / "changed", model=tracer, resume=True, **SMALL)
    copy.write_text("".join([lines[0].replace("the", "eht"), *lines[1:]]))
    with pytest.raises(FormatError, match="made of other text"):
        survey(copy, tmp_path / "changed", model=tracer, resume=True, **SMALL)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").touch()
    with pytest.raises(FormatError, match="expected an empty directory"):
        survey(records, tmp_path / "else", model=tracer, **SMALL)
    assert [x.name for x in (tmp_path / "else").iterdir()] == ["thesis.tex"]


def test_a_corrupt_part_is_named(tracer: Tracer, records: Path, tmp_path: Path) -> None:
    survey(records, tmp_path, model=tracer, **SMALL)
    part = tmp_path / "predictions" / "part-000002.parquet"
    raw = part.read_bytes()
    at = pq.ParquetFile(part).metadata.row_group(0).column(3).data_page_offset + 40
    part.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(FormatError, match=r"part-000002.parquet: is broken"):
        Survey.open(tmp_path).predictions.read()
    for broken in (raw[: len(raw) // 2], b"", raw[:-4]):
        part.write_bytes(broken)
        with pytest.raises(FormatError, match=r"part-000002.parquet: is broken"):
            Survey.open(tmp_path).predictions.read("position")
        with pytest.raises(FormatError, match=r"part-000002.parquet: is broken"):
            survey(records, tmp_path, model=tracer, resume=True, **SMALL)
    part.unlink()  # the rule: delete what is broken, and resume
    survey(records, tmp_path, model=tracer, resume=True, **SMALL)
    assert part.read_bytes() == raw


def test_a_full_disk_stops_it_cleanly(
    tracer: Tracer, records: Path, unbroken: Survey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, n_left = pq.write_table, 5

    def write_table(table: pa.Table, where: Path, **options: Any) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            Path(where).write_bytes(b"PAR1 half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        own(table, where, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", write_table)
        with pytest.raises(IfrError, match=r"cannot be written \(No space left on device\)"):
            survey(records, tmp_path, model=tracer, label_by=["kind"], **SMALL)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert not [name for name in left if name.startswith(".ifr_fast")]
    assert len(Survey.open(tmp_path).predictions) > 0
    found = survey(records, tmp_path, model=tracer, label_by=["kind"], resume=True, **SMALL)
    assert_same_rows(found, unbroken)


def test_two_runs_do_not_write_into_one_directory(
    tracer: Tracer, records: Path, tmp_path: Path
) -> None:
    def meddle(_: State) -> None:
        with pytest.raises(IfrError, match="another run is writing"):
            survey(records, tmp_path, model=tracer, resume=True, **SMALL)

    survey(records, tmp_path, model=tracer, on_state=meddle, **SMALL)


# Scale


def test_memory_does_not_grow(tracer: Tracer, tmp_path: Path) -> None:
    """Within 5% from the 50th to the 500th document."""

    def texts() -> Any:
        for i in range(501):
            yield sentence(i, 10)

    resident: dict[int, int] = {}

    def watch(state: State) -> None:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                resident[state.documents] = int(line.split()[1])

    if not Path("/proc/self/status").exists():
        pytest.skip("expected: resident memory is read from /proc")
    survey(Source(texts(), "c"), tmp_path, model=tracer, on_state=watch, window_tokens=400)
    early = min(n for n in resident if n >= 50)
    assert early < 80
    late = max(resident)
    assert late >= 500
    assert resident[late] < 1.05 * resident[early]


def test_states_say_how_far_it_is(tracer: Tracer, records: Path, tmp_path: Path) -> None:
    states: list[State] = []
    found = survey(records, tmp_path, model=tracer, on_state=states.append, **SMALL)
    shares = [state.share for state in states]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert states[-1].predictions == len(found.predictions)
    assert states[-1].documents == 40
    assert states[-1].seconds_left == 0
    assert states[0].seconds_left > 0


# Arguments, and the command


def test_wrong_arguments(tracer: Tracer, records: Path, tmp_path: Path) -> None:
    for changed, reason in [
        ({"thresholds": (0.05, 0.02)}, "ascending"),
        ({"thresholds": ()}, "ascending"),
        ({"thresholds": (2,)}, "from 0 to 1"),
        ({"split": "word"}, "split"),
        ({"engine": "spark"}, "engine"),
        ({"workers": 2}, "workers"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 129}, "context holds 128"),
        ({"label_by": ["a b"]}, "label_by"),
        ({"engine": "ray"}, "expected a name or a directory"),
    ]:
        with pytest.raises(ValueError, match=reason):
            survey(records, tmp_path / "out", **{"model": tracer, **changed})
    for inputs in ("nowhere.txt", [], {"c": "nowhere"}, 3):
        with pytest.raises(ValueError, match="inputs"):
            survey(inputs, tmp_path / "out", model=tracer)


def test_the_command(tiny_dir: Path, records: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.touch()
    out = tmp_path / "out"
    command = [
        "survey",
        f"r={records}",
        str(bad),
        "--out",
        str(out),
        "-m",
        str(tiny_dir),
        "--label-by",
        "kind",
        "--window-tokens",
        "200",
        "--thresholds",
        "0.02,0.05",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "r: 40 documents" in result.output
    assert "bad.txt: is empty" in result.output
    found = Survey.open(out)
    assert found.thresholds == [0.02, 0.05]
    assert found.labels == ["kind"]
    assert found.model["n_heads"] == 6
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, FormatError)
    assert CliRunner().invoke(app, [*command, "--resume"]).exit_code == 0
    wrong = CliRunner().invoke(app, [*command[:-2], "--thresholds", "a,b"])
    assert "--thresholds" in str(wrong.exception)


def test_reading_a_survey_needs_no_torch(unbroken: Survey) -> None:
    code = (
        "import sys\nfrom ifr_fast.survey import Survey\n"
        "print(len(Survey.open(sys.argv[1]).predictions))\nassert 'torch' not in sys.modules\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(unbroken.path)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) == len(unbroken.predictions)
