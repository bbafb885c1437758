"""Sources of text -> items, one after the other; nothing of a source is held but the item at hand.

What can be read: text, JSONL and Parquet files (text and JSONL also gzipped), folders of them,
data sets of the Hub (`hf:NAME`, with `datasets` installed), and any iterable of strings or
mappings. What cannot be is a Problem in the item's place, and reading goes on behind it
(docs/survey.md has the rules).
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from ..errors import IfrError
from .arrow import pa, pq
from .schema import Problem, first_line

Split: TypeAlias = Literal["file", "paragraph", "line"]
SPLITS = ("file", "paragraph", "line")

_STRETCH = 1 << 20  # bytes of a text that are read at once, and make an item
_LONGEST_LINE = 1 << 26  # bytes of a JSONL record
_PEEK = 1 << 13  # bytes in which a NUL makes a file a binary one
_ROWS = 256  # of a Parquet file that are read at once
_JSON = (".jsonl", ".ndjson")
_PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Reading:
    """How sources are read.

    text_field: of records. split: what one document of a text file is. label_by: the field that
    each label is read from; "corpus" is what corpora are told apart by.
    """

    text_field: str = "text"
    split: Split = "file"
    label_by: Mapping[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """Labels that are columns."""
        return [name for name in self.label_by if name != "corpus"]


@dataclass(frozen=True)
class Item:
    """A document as its source has it: a text, or words, or token ids."""

    context: str  # source ':' number within it
    corpus: str
    text: str | None = None
    words: list[str] | None = None
    token_ids: list[int] | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)  # a value, or one a word or token id


@dataclass
class Progress:
    """How much of the sources is read, in bytes; None where their size is not known."""

    done: int = 0
    total: int | None = 0


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    of: a path, `hf:NAME[,CONFIG][:SPLIT]`, or an iterable of strings and of mappings like the
    records of a JSONL file. corpus: what its predictions are put under; default: its name.
    """

    of: str | os.PathLike[str] | Iterable[str | Mapping[str, Any]]
    corpus: str | None = None
    name: str | None = None  # in contexts; default: its path

    @staticmethod
    def parse(given: str) -> Source:
        """`[CORPUS=]PATH` as the command line has it; a path that exists is one whatever is in it.

        Raises ValueError where there is nothing.
        """
        corpus, equals, path = given.partition("=")
        if not equals or os.path.exists(given) or "/" in corpus:
            return Source(given)
        if not corpus or not path:
            raise ValueError(f"inputs: expected PATH or CORPUS=PATH, got {given!r}")
        return Source(path, corpus)

    def files(self) -> list[Source]:
        """The sources that it stands for: a folder's files by name, but hidden ones.

        Raises ValueError where there is none.
        """
        if not isinstance(self.of, str | os.PathLike) or str(self.of).startswith("hf:"):
            return [self]
        path = Path(self.of)
        if not os.path.exists(path):  # a text may be too long for a name
            raise ValueError(
                f"inputs: no file or directory {str(path)[:80]!r}; texts in memory are a Source"
            )
        name = path.name or path.resolve().name  # of ".", too
        corpus = self.corpus or as_unicode(name.partition(".")[0] or name)
        if not path.is_dir():
            return [Source(path, corpus, self.name or str(path))]
        found = [
            Source(x, corpus, str(x))
            for x in sorted(path.rglob("*"))
            if x.is_file() and not any(part.startswith(".") for part in x.relative_to(path).parts)
        ]
        if not found:
            raise ValueError(f"inputs: directory {str(path)!r} holds no file")
        return found

    @property
    def size(self) -> int | None:
        """Bytes; None where it is not known."""
        return self.of.stat().st_size if isinstance(self.of, Path) else None

    @property
    def described(self) -> dict[str, Any]:
        """For a manifest."""
        return {"name": self.title, "corpus": self.corpus or self.title, "bytes": self.size}

    @property
    def title(self) -> str:
        """What it is called in contexts."""
        if self.name is not None:
            return as_unicode(self.name)
        if isinstance(self.of, str | os.PathLike):
            return as_unicode(str(self.of))
        return self.corpus or "documents"

    def items(self, reading: Reading, progress: Progress) -> Iterator[Item | Problem]:
        """Its documents, in order. What a source that is no file raises is not caught: how much of
        it there would have been is not known.
        """
        before, size, nothing = progress.done, self.size, True
        try:
            for item in self._items(reading, progress):
                nothing = False
                yield item
            if nothing:
                yield Problem(self.title, "is empty")
        except OSError as error:
            if not isinstance(self.of, Path):
                raise
            yield Problem(self.title, f"cannot be read ({error.strerror or first_line(error)})")
        if size is not None:
            progress.done = before + size

    def _items(self, reading: Reading, progress: Progress) -> Iterator[Item | Problem]:
        if not isinstance(self.of, Path):
            yield from self._records(_iterated(self.of), reading)
            return
        kind = self.of.name.removesuffix(".gz")
        if kind.endswith(_PARQUET):
            yield from self._records(_parquet_rows(self.of, self.title, progress), reading)
            return
        before = progress.done
        with open(self.of, "rb") as raw:

            def told(of: Iterator[Any]) -> Iterator[Any]:
                for item in of:
                    progress.done = before + raw.tell()
                    yield item

            file: Any = raw
            if self.of.suffix == ".gz":
                file = gzip.GzipFile(fileobj=raw)
            try:
                start = file.read(_PEEK)
                if not start:
                    yield Problem(self.title, "is empty")
                    return
                if b"\0" in start:
                    yield Problem(
                        self.title, f"is no UTF-8 text (a NUL at byte {start.index(0)}); not read"
                    )
                    return
                file.seek(0)
                if kind.endswith(_JSON):
                    yield from told(self._records(_json_lines(file, self.title), reading))
                else:
                    yield from told(self._texts(file, reading))
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                yield Problem(self.title, f"is broken ({first_line(error)}); read up to there")

    def _texts(self, file: IO[bytes], reading: Reading) -> Iterator[Item | Problem]:
        """Stretches of a text, each decoded by itself."""
        corpus = self.corpus or self.title
        for index, (begin, raw) in enumerate(_stretches(file, reading.split)):
            context = f"{self.title}:{index}"
            try:
                text = raw.decode("utf-8-sig" if begin == 0 else "utf-8")
            except UnicodeDecodeError as error:
                yield Problem(
                    context, f"is not UTF-8 at byte {begin + error.start} ({error.reason})"
                )
                continue
            if "\0" in text:
                yield Problem(context, f"is binary (a NUL at byte {begin + raw.index(0)})")
            elif not text.strip():
                yield Problem(context, "is empty")
            else:
                yield Item(context, corpus, text=text)

    def _records(self, records: Iterable[Any], reading: Reading) -> Iterator[Item | Problem]:
        warned: set[str] = set()
        for index, record in enumerate(records):
            if isinstance(record, Problem):
                yield record
                continue
            context = f"{self.title}:{index}"
            if isinstance(record, str):
                record = {reading.text_field: record}
            found = self._item(context, record, reading)
            if isinstance(found, Item):
                for name, of in reading.label_by.items():
                    if of not in record and name not in warned:
                        warned.add(name)
                        yield Problem(context, f"has no field {of!r} for the label {name!r}; null")
            yield found

    def _item(self, context: str, record: Any, reading: Reading) -> Item | Problem:
        if not isinstance(record, Mapping):
            return Problem(context, f"is no record but {type(record).__name__}")
        text, words, ids = (record.get(key) for key in (reading.text_field, "words", "token_ids"))
        words, ids = (_of_array(x) for x in (words, ids))
        for name, of in (("words", words), ("token_ids", ids)):
            if of is not None and not isinstance(of, list | tuple):
                return Problem(context, f"its {name!r} are no list but {type(of).__name__}")
        if text is None and words is None and ids is None:
            given = ", ".join(sorted(map(str, record))[:8])
            return Problem(
                context, f"has no field {reading.text_field!r}, 'words' or 'token_ids' ({given})"
            )
        if text is not None and not isinstance(text, str):
            return Problem(
                context, f"its {reading.text_field!r} is no text but {type(text).__name__}"
            )
        if text == "" and ids is None:
            return Problem(context, "is empty")
        if not _is_unicode([text or "", *(x for x in words or [] if isinstance(x, str))]):
            return Problem(context, "is no Unicode text (it has half of a surrogate pair)")
        if words is not None and not all(isinstance(word, str) for word in words):
            return Problem(context, "its 'words' are not all text")
        if ids is not None and not all(type(i) is int for i in ids):
            return Problem(context, "its 'token_ids' are not all integers")
        corpus = self.corpus or self.title
        if "corpus" in reading.label_by:
            value = record.get(reading.label_by["corpus"])
            corpus = corpus if value is None else as_unicode(str(value))
        labels = {name: record.get(reading.label_by[name]) for name in reading.labels}
        words, ids = (None if x is None else list(x) for x in (words, ids))
        return Item(context, corpus, text, words, ids, labels)


def _of_array(x: Any) -> Any:
    """An array's or a tensor's values as a list; anything else as it is."""
    return x.tolist() if hasattr(x, "tolist") else x


def as_unicode(text: str) -> str:
    """What UTF-8 can hold: half a surrogate pair, in file names too, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def _is_unicode(texts: list[str]) -> bool:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return False
    return True


def expand(inputs: Any) -> list[Source]:
    """The sources that a user names: a path, a Source, an iterable, or several of them, or a
    mapping from corpora to any of these. Raises ValueError where there is none.
    """
    found = [source for given in _named(inputs) for source in given.files()]
    if not found:
        raise ValueError("inputs: expected at least one")
    return found


def _named(inputs: Any, corpus: str | None = None) -> list[Source]:
    if isinstance(inputs, Source):
        return [inputs]
    if isinstance(inputs, str | os.PathLike):
        given = os.fspath(inputs)
        return [Source.parse(given) if corpus is None else Source(given, corpus)]
    if isinstance(inputs, Mapping):
        return [source for name, of in inputs.items() for source in _named(of, str(name))]
    if isinstance(inputs, Sequence) and all(
        isinstance(x, str | os.PathLike | Source) for x in inputs
    ):
        return [source for of in inputs for source in _named(of, corpus)]
    if isinstance(inputs, Iterable):
        return [Source(inputs, corpus)]
    raise ValueError(f"inputs: expected paths or documents, got {type(inputs).__name__}")


def _stretches(file: IO[bytes], split: Split) -> Iterator[tuple[int, bytes]]:
    """Where each document of a text begins, in bytes, and the document; what is longer than a
    stretch is cut behind its last line, else its last space, else between two characters.
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
    """Lines, or what stands between blank ones; without the ends of their lines."""
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
    """Where to cut bytes that are too long."""
    for mark in (b"\n", b" "):
        at = raw.rfind(mark)
        if at > 0:
            return at + 1
    at = len(raw)
    while at > len(raw) - 4 and raw[at - 1] & 0xC0 == 0x80:
        at -= 1
    # `at` now follows the first byte of the last character, which may not be all there.
    return at - 1 if raw[at - 1] >= 0xC0 else len(raw)


def _json_lines(file: IO[bytes], title: str) -> Iterator[Any]:
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


def _parquet_rows(path: Path, title: str, progress: Progress) -> Iterator[Any]:
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
    """Its rows; what Parquet calls a string need not be UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [_batch_record(batch.slice(i, 1), title, before + i) for i in range(len(batch))]


def _batch_record(row: pa.RecordBatch, title: str, number: int) -> Any:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Problem(f"{title}:{number}", f"has text that is not UTF-8 ({error.reason})")


def _iterated(of: Any) -> Iterator[Any]:
    """What a source that is no file gives."""
    if not isinstance(of, str):
        yield from of
        return
    try:
        import datasets
    except ImportError as error:
        raise IfrError(
            f"inputs: {of!r} needs datasets, which is not installed: pip install datasets"
        ) from error
    name, _, split = of.removeprefix("hf:").partition(":")
    name, _, config = name.partition(",")
    try:
        yield from datasets.load_dataset(
            name, config or None, split=split or "train", streaming=True
        )
    except Exception as error:  # of whatever library it comes from
        raise IfrError(f"inputs: {of!r} cannot be read ({first_line(error)})") from error
