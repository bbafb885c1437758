"""Sources of text -> items, one after the other; only the current item is held in memory.

Sources are text, JSONL and Parquet files (text and JSONL also gzipped), folders of them, data sets
of the Hub (`hf:NAME`, with `datasets` installed), and iterables of strings or mappings. An item
that cannot be read becomes a Problem in its place, and reading continues after it (docs/survey.md
has the rules).
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .readers import (
    PEEK,
    Progress,
    Split,
    as_unicode,
    iterated,
    json_lines,
    parquet_rows,
    stretches,
)
from .schema import Problem, first_line

_JSON = (".jsonl", ".ndjson")
_PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Reading:
    """Settings by which sources are read.

    text_field: the field of a record that holds its text. split: the unit of a text file that is
    a document. label_by: the field that each label is read from; the label "corpus" names the
    corpus of a record.
    """

    text_field: str = "text"
    split: Split = "file"
    label_by: Mapping[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """Labels that become columns: all but "corpus"."""
        return [name for name in self.label_by if name != "corpus"]


@dataclass(frozen=True)
class Item:
    """A document as it is in its source: a text, words, or token ids."""

    context: str  # source ':' number within the source
    corpus: str
    text: str | None = None
    words: list[str] | None = None
    token_ids: list[int] | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)  # a value, or a list of one per token


@dataclass(frozen=True)
class Source:
    """A source of documents.

    of: a path, `hf:NAME[,CONFIG][:SPLIT]`, or an iterable of strings and of mappings like the
    records of a JSONL file. corpus: the corpus of its predictions; default: its name.
    """

    of: str | os.PathLike[str] | Iterable[str | Mapping[str, Any]]
    corpus: str | None = None
    name: str | None = None  # name in contexts; default: its path

    @staticmethod
    def parse(given: str) -> Source:
        """Parses `[CORPUS=]PATH` of the command line. An existing path may itself contain '='.

        Raises ValueError for an empty corpus or path.
        """
        corpus, equals, path = given.partition("=")
        if not equals or os.path.exists(given) or "/" in corpus:
            return Source(given)
        if not corpus or not path:
            raise ValueError(f"inputs: expected PATH or CORPUS=PATH, got {given!r}")
        return Source(path, corpus)

    def files(self) -> list[Source]:
        """Sources that this one stands for: a folder's files by name, without hidden ones.

        Raises ValueError if there is none.
        """
        if not isinstance(self.of, str | os.PathLike) or str(self.of).startswith("hf:"):
            return [self]
        path = Path(self.of)
        if not os.path.exists(path):  # true of a text that is too long for a file name
            raise ValueError(
                f"inputs: no file or directory {str(path)[:80]!r}; texts in memory are a Source"
            )
        name = path.name or path.resolve().name  # also for "."
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
        """Size in bytes; None if it is not known."""
        return self.of.stat().st_size if isinstance(self.of, Path) else None

    @property
    def described(self) -> dict[str, Any]:
        """Description for the manifest."""
        return {"name": self.title, "corpus": self.corpus or self.title, "bytes": self.size}

    @property
    def title(self) -> str:
        """Name in contexts."""
        if self.name is not None:
            return as_unicode(self.name)
        if isinstance(self.of, str | os.PathLike):
            return as_unicode(str(self.of))
        return self.corpus or "documents"

    def items(self, reading: Reading, progress: Progress) -> Iterator[Item | Problem]:
        """Documents of the source, in order.

        Errors of an iterable are not caught: a stream that breaks off must not look complete.
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
            yield from self._records(iterated(self.of), reading)
            return
        kind = self.of.name.removesuffix(".gz")
        if kind.endswith(_PARQUET):
            yield from self._records(parquet_rows(self.of, self.title, progress), reading)
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
                start = file.read(PEEK)
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
                    yield from told(self._records(json_lines(file, self.title), reading))
                else:
                    yield from told(self._texts(file, reading))
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                yield Problem(self.title, f"is broken ({first_line(error)}); read up to there")

    def _texts(self, file: IO[bytes], reading: Reading) -> Iterator[Item | Problem]:
        """Documents of a text file, each decoded by itself."""
        corpus = self.corpus or self.title
        for index, (begin, raw) in enumerate(stretches(file, reading.split)):
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
    """Values of an array or a tensor as a list; other objects unchanged."""
    return x.tolist() if hasattr(x, "tolist") else x


def _is_unicode(texts: list[str]) -> bool:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return False
    return True


def expand(inputs: Any) -> list[Source]:
    """Sources that a user names: a path, a Source, an iterable, several of these, or a mapping
    from corpora to any of them. Raises ValueError if there is none.
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
        if not given:
            raise ValueError("inputs: expected the path of a file or a folder, got ''")
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
