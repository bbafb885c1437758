"""Sources -> windows: consecutive documents that are scored, written and resumed together.

Windows depend only on the text: neither on the engine, nor on where an earlier run was interrupted.
A resumed run reads the text of existing parts again, to verify its sha256, but does not score it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import FormatError
from .documents import Cutter, Document, new_digest, update
from .inputs import Item, Source
from .parts import Cursor, PartRecord
from .readers import Progress
from .schema import Problem

_WINDOW_DOCUMENTS = 4096  # most documents and problems of a window


@dataclass(frozen=True)
class Window:
    """Consecutive documents, and the problems among them."""

    part: int
    first: int  # number of the first document
    documents: list[Document]
    problems: list[Problem]
    begin: Cursor
    end: Cursor
    read: int  # bytes of the sources up to the end

    @property
    def n_tokens(self) -> int:
        """Tokens that the model reads."""
        return sum(len(document.tokens.word) for document in self.documents)


class WindowReader:
    """Makes windows of at least `window_tokens` tokens; the last one may have fewer."""

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
        """The next window, as part number `part`; None at the end of the sources."""
        first, tokens, begin = self._n_documents, 0, self._cursor()
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
        end = self._cursor()
        return Window(part, first, documents, problems, begin, end, self.progress.done)

    def skip(self, record: PartRecord, where: str) -> None:
        """Reads past the text of a part that is already written.

        Raises FormatError if the sources hold other text now, or if the part before is another one.
        """
        end = record.end
        if record.begin != self._cursor():
            raise FormatError(
                f"{where}: does not begin where the part before it ends; survey the inputs into "
                "another directory"
            )
        item: Item | Problem | None = None
        while self._n_items < end.items:
            item = self._next()
            if item is None:
                break
        if self._n_items != end.items or self._digest.hexdigest() != end.sha256:
            raise FormatError(
                f"{where}: was made from other text than the inputs hold now; survey them into "
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
