"""Files and data sets -> texts and records, read in pieces that fit into memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from ..errors import IfrError, needing
from .arrow import pa, pq
from .schema import Problem, first_line

Split: TypeAlias = Literal["file", "paragraph", "line"]
SPLITS = ("file", "paragraph", "line")
_STRETCH = 1 << 20  # bytes of a text that are read at once; a longer document is cut
_LONGEST_LINE = 1 << 26  # bytes of the longest JSONL record that is read
PEEK = 1 << 13  # bytes at the start of a file; a NUL among them marks a binary file
_ROWS = 256  # rows of a Parquet file that are read at once


@dataclass
class Progress:
    """Bytes of the sources that are read, and all of them; None if that is not known."""

    done: int = 0
    total: int | None = 0


def as_unicode(text: str) -> str:
    """Text with lone surrogates, as file names may have, replaced by question marks."""
    return text.encode("utf-8", "replace").decode()


def stretches(file: IO[bytes], split: Split) -> Iterator[tuple[int, bytes]]:
    """Documents of a text, each with the byte at which it begins. One that is longer than a
    stretch is cut after its last line, else after its last space, else between two characters.
    """
    if split != "file":
        yield from _lines(file, paragraphs=split == "paragraph")
        return
    begin, held = 0, b""
    while block := file.read(_STRETCH):
        held += block
        while len(held) >= _STRETCH:
            end = _cut(held[:_STRETCH])
            yield begin, held[:end]
            begin, held = begin + end, held[end:]
    if held:
        yield begin, held


def _lines(file: IO[bytes], paragraphs: bool) -> Iterator[tuple[int, bytes]]:
    """Lines, or paragraphs between blank lines, without line ends."""
    begin = at = 0
    held = b""
    while line := file.readline(_STRETCH):
        if line.strip():
            begin = begin if held else at
            held += line
        at += len(line)
        end = 0
        if len(held) >= _STRETCH:
            end = _cut(held)
        elif not line.strip() or (line.endswith(b"\n") and not paragraphs):
            end = len(held)
        if end:
            yield begin, held[:end].rstrip(b"\r\n")
            begin, held = begin + end, held[end:]
    if held:
        yield begin, held.rstrip(b"\r\n")


def _cut(raw: bytes) -> int:
    """Position at which bytes that are too long are cut."""
    for mark in (b"\n", b" "):
        at = raw.rfind(mark)
        if at > 0:
            return at + 1
    at = len(raw)
    while at > len(raw) - 4 and raw[at - 1] & 0xC0 == 0x80:
        at -= 1
    # `at` now follows the first byte of the last character, which may be incomplete.
    return at - 1 if raw[at - 1] >= 0xC0 else len(raw)


def json_lines(file: IO[bytes], title: str) -> Iterator[Any]:
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        where = f"{title} line {number}"
        if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(_LONGEST_LINE)
            yield Problem(where, f"is longer than {_LONGEST_LINE} bytes")
            continue
        if not line.strip():
            continue
        try:
            yield json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield Problem(where, f"is not UTF-8 at its byte {error.start} ({error.reason})")
        except (ValueError, RecursionError) as error:
            yield Problem(where, f"is not JSON ({first_line(error)})")


def parquet_rows(path: Path, title: str, progress: Progress) -> Iterator[Any]:
    before, row = progress.done, 0
    try:
        with pq.ParquetFile(path) as file:
            total, size = max(1, file.metadata.num_rows), path.stat().st_size
            if file.metadata.num_rows == 0:
                yield Problem(title, "is empty")
            for batch in file.iter_batches(batch_size=_ROWS):
                for record in _batch_records(batch, title, row):
                    row += 1
                    progress.done = before + size * row // total
                    yield record
    except (OSError, pa.ArrowException) as error:
        yield Problem(f"{title} row {row}", f"is broken ({first_line(error)}); read up to there")


def _batch_records(batch: pa.RecordBatch, title: str, before: int) -> Iterable[Any]:
    """Rows of a batch. A string in Parquet need not be UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [_batch_record(batch.slice(i, 1), title, before + i) for i in range(len(batch))]


def _batch_record(row: pa.RecordBatch, title: str, number: int) -> Any:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Problem(f"{title}:{number}", f"has text that is not UTF-8 ({error.reason})")


def iterated(of: Any) -> Iterator[Any]:
    """Records of an iterable, or of a data set of the Hub."""
    if not isinstance(of, str):
        yield from of
        return
    with needing(f"inputs: {of!r}", "datasets", "pip install datasets"):
        import datasets
    name, _, split = of.removeprefix("hf:").partition(":")
    name, _, config = name.partition(",")
    try:
        yield from datasets.load_dataset(
            name, config or None, split=split or "train", streaming=True
        )
    except Exception as error:  # from any of the libraries beneath
        raise IfrError(f"inputs: {of!r} cannot be read ({first_line(error)})") from error
