"""How far a long job is: a bar on a terminal, nothing in a pipe; and what may be shown there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many of `total` steps are done."""
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
    """Text without control characters, as a terminal may be shown it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
