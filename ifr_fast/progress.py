"""Progress of long jobs, as a bar on a terminal and as nothing in a pipe; printable text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Gives a function that takes the number of steps done, of `total`."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda n: bar.update(task, completed=n)


def printable(text: str) -> str:
    """Text whose control characters are escaped, safe for a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
