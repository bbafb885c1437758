"""Sources -> windows: consecutive documents that are scored, written and resumed together.

Windows are a function of what is read and of nothing else: neither of the engine, nor of where an
earlier run was interrupted. What a resumed run has already written it reads again, to see by its
sha256 that it is the same, and does not score.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import FormatError
from .documents import Cutter, Document, new_digest, update
from .inputs import Item, Progress, Source
from .schema import Problem

_WINDOW_DOCUMENTS = 4096  # and problems: of a window at most


class Cursor(NamedTuple):
    """Where in the sources a window ends."""

    items: int  # that have been read, problems included
    left: int  # documents and problems of the last one that are left to the next window
    documents: int  # numbers given so far
    sha256: str  # of the items


@dataclass(frozen=True)
class Window:
    """Consecutive documents, and the problems among them."""

    part: int
    first: int  # number of its first document
    documents: list[Document]
    problems: list[Problem]
    end: Cursor
    read: int  # bytes of the sources, up to its end

    @property
    def n_tokens(self) -> int:
        """That the model is to read."""
        return sum(len(document.tokens.word) for document in self.documents)


class Feed:
    """Windows of at least `window_tokens` tokens, the last one less."""

    def __init__(self, sources: list[Source], cutter: Cutter, window_tokens: int) -> None:
        self.progress = Progress()
        sizes = [source.size for source in sources]
        if all(size is not None for size in sizes):
            self.progress.total = sum(size for size in sizes if size is not None)
        else:
            self.progress.total = None
        self._cutter, self._window_tokens = cutter, window_tokens
        reading = cutter.reading
        self._items: Iterator[Item | Problem] = (
            item for source in sources for item in source.items(reading, self.progress)
        )
        self._digest = new_digest()
        self._pending: deque[Document | Problem] = deque()
        self._n_items = self._n_documents = 0

    def window(self, part: int) -> Window | None:
        """The next one, as part number `part`; None where all is read."""
        first, tokens = self._n_documents, 0
        documents: list[Document] = []
        problems: list[Problem] = []
        while tokens < self._window_tokens and len(documents) + len(problems) < _WINDOW_DOCUMENTS:
            if not self._pending:
                item = self._next()
                if item is None:
                    break
                self._cut(item)
                continue
            found = self._pending.popleft()
            if isinstance(found, Problem):
                problems.append(found)
            else:
                documents.append(found)
                tokens += len(found.tokens.word)
        if not documents and not problems:
            return None
        self._n_documents += len(documents)
        return Window(part, first, documents, problems, self._cursor(), self.progress.done)

    def skip(self, end: Cursor, where: str) -> None:
        """Reads what a part that is written has covered.

        Raises FormatError where the sources hold something else.
        """
        item: Item | Problem | None = None
        while self._n_items < end.items:
            item = self._next()
            if item is None:
                break
        if self._n_items != end.items or self._digest.hexdigest() != end.sha256:
            raise FormatError(
                f"{where}: was made of other text than the inputs now hold; survey them into "
                "another directory"
            )
        if item is not None:
            self._pending.clear()
            if end.left:
                self._cut(item)
        while len(self._pending) > end.left:
            self._pending.popleft()
        self._n_documents = end.documents

    def _next(self) -> Item | Problem | None:
        item = next(self._items, None)
        if item is not None:
            self._n_items += 1
            update(self._digest, item)
        return item

    def _cut(self, item: Item | Problem) -> None:
        of: Any = [item] if isinstance(item, Problem) else self._cutter.documents(item)
        self._pending = deque(of)

    def _cursor(self) -> Cursor:
        return Cursor(
            self._n_items, len(self._pending), self._n_documents, self._digest.hexdigest()
        )
