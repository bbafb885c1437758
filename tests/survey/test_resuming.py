"""Surveys that are interrupted, resumed, or not the same."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from survey_inputs import SMALL, assert_same_rows, save_tiny, sentence

from ifr_fast import FormatError, IfrError, Tracer
from ifr_fast.survey import Source, Survey, survey, writer


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


def test_a_run_that_stops_anywhere_is_resumed_bit_for_bit(
    tracer: Tracer, records: Path, unbroken: Survey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops before every single write of a file, in turn."""
    own, n_left = writer._write, 0

    def write(*args: Any, **kwargs: Any) -> None:
        nonlocal n_left
        if n_left == 0:
            raise KeyboardInterrupt
        n_left -= 1
        own(*args, **kwargs)

    monkeypatch.setattr(writer, "_write", write)
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
    tracer: Tracer, few: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    survey(few, out, model=tracer, **SMALL)

    def again(**changed: Any) -> None:
        survey(few, out, **{"model": tracer, "resume": True, **SMALL, **changed})

    with pytest.raises(FormatError, match="holds a survey already"):
        again(resume=False)
    with pytest.raises(FormatError, match="another model"):
        again(model=Tracer.from_pretrained(save_tiny(tmp_path / "other", seed=1)))
    with pytest.raises(FormatError, match="thresholds"):
        again(thresholds=(0.01, 0.05))
    lines = few.read_text().splitlines(keepends=True)
    copy = tmp_path / "copy.jsonl"
    copy.write_text("".join(lines))
    survey(copy, tmp_path / "changed", model=tracer, **SMALL)
    copy.write_text("".join([*lines, lines[0]]))
    with pytest.raises(FormatError, match="from other inputs"):
        survey(copy, tmp_path / "changed", model=tracer, resume=True, **SMALL)
    copy.write_text("".join([lines[0].replace("the", "eht"), *lines[1:]]))
    with pytest.raises(FormatError, match="made from other text"):
        survey(copy, tmp_path / "changed", model=tracer, resume=True, **SMALL)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").touch()
    with pytest.raises(FormatError, match="expected an empty directory"):
        survey(few, tmp_path / "else", model=tracer, **SMALL)
    assert [x.name for x in (tmp_path / "else").iterdir()] == ["thesis.tex"]


def test_a_corrupt_part_is_named(tracer: Tracer, few: Path, tmp_path: Path) -> None:
    survey(few, tmp_path, model=tracer, **SMALL)
    part = tmp_path / "predictions" / "part-000002.parquet"
    raw = part.read_bytes()
    at = pq.ParquetFile(part).metadata.row_group(0).column(3).data_page_offset + 40
    part.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(FormatError, match=r"part-000002.parquet: is damaged"):
        Survey.open(tmp_path).predictions.read()
    for broken in (raw[: len(raw) // 2], b"", raw[:-4]):
        part.write_bytes(broken)
        with pytest.raises(FormatError, match=r"part-000002.parquet: is damaged"):
            Survey.open(tmp_path).predictions.read("position")
        with pytest.raises(FormatError, match=r"part-000002.parquet: is damaged"):
            survey(few, tmp_path, model=tracer, resume=True, **SMALL)
    part.unlink()  # the rule: delete what is broken, and resume
    survey(few, tmp_path, model=tracer, resume=True, **SMALL)
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
