"""Standard output and standard error of the command, where they break, fill up or are closed."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from ..errors import IfrError

BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells report a process that the signal ended


class _Output(io.FileIO):
    """A descriptor to write to. A reader that has left ends the command quietly."""

    def __init__(self, descriptor: int, what: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.what = what

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            # Whatever is still buffered goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            sys.exit(BROKEN_PIPE)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            raise IfrError(f"{self.what} cannot be written to ({error.strerror})") from error


@contextmanager
def checked_streams() -> Iterator[None]:
    """Within, writing to standard output or error raises IfrError where that fails, and SystemExit
    where the reader of a pipe has left. Characters that the stream lacks are replaced.
    """
    _occupy_descriptors()
    before = sys.stdout, sys.stderr
    try:
        sys.stdout = _checked(before[0], 1, "standard output")
        # Errors cannot be reported where standard error is closed.
        sys.stderr = before[1] and _checked(before[1], 2, "standard error")
        yield
    finally:
        sys.stdout, sys.stderr = before


def _occupy_descriptors() -> None:
    """Opens descriptors 0 to 2 where they are closed: else files that are opened later get them,
    and are written to by whoever prints. They cannot be written to.
    """
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(descriptor)


def _checked(stream: TextIO | None, descriptor: int, what: str) -> TextIO:
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(_Output(descriptor, what)), "utf-8", "replace")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors="replace")
    try:
        stream.flush()
        raw = _Output(stream.fileno(), what)
    except OSError:  # not a file: a test's
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        stream.encoding,
        "replace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
