"""What `ifr-fast survey` does: `survey()`, and what of it is shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from ..memory import describe_bytes
from ..progress import printable
from .run import State, survey
from .schema import Problem, Survey

_EVERY = 30  # seconds between lines where there is no terminal
_SHOWN = 20  # problems, of which the rest are only counted


def run(
    inputs: list[str],
    out: Path,
    *,
    label_by: list[str],
    thresholds: str,
    device_map: str | None,
    **options: Any,
) -> None:
    """Surveys, and says how far it is, what went wrong, and what is there at the end."""
    console = Console(stderr=True, highlight=False)
    try:
        with _shown(console) as show:
            found = survey(
                inputs,
                out,
                label_by=[name for given in label_by for name in given.split(",")],
                thresholds=_numbers(thresholds),
                model_options={} if device_map is None else {"device_map": device_map},
                on_state=show,
                **options,
            )
    except KeyboardInterrupt:
        goes_on = f"interrupted; --resume goes on with what {printable(str(out))} holds"
        console.print(Text(goes_on), soft_wrap=True)
        raise
    _summarize(found)


def _numbers(given: str) -> list[float]:
    try:
        return [float(part) for part in given.split(",")]
    except ValueError:
        raise ValueError(
            f"--thresholds: expected numbers, as in 0.01,0.02, got {given!r}"
        ) from None


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[State], None]]:
    """Gives a function that shows a state: in a bar, or in a line now and then."""
    n_problems = 0

    def tell(problems: list[Problem]) -> None:
        nonlocal n_problems
        for problem in problems:
            n_problems += 1
            if n_problems <= _SHOWN:
                line = Text.assemble(("problem: ", "yellow"), printable(str(problem)))
                console.print(line, soft_wrap=True)
            elif n_problems == _SHOWN + 1:
                console.print("problem: there are more; the survey lists them all")

    if not console.is_terminal:
        last = time.monotonic()

        def show_line(state: State) -> None:
            nonlocal last
            tell(state.problems)
            if time.monotonic() - last >= _EVERY:
                last = time.monotonic()
                console.print(_described(state), soft_wrap=True)

        yield show_line
        return
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading the model", total=None)

        def show_bar(state: State) -> None:
            tell(state.problems)
            total = None if state.share is None else 1.0
            bar.update(
                task, total=total, completed=state.share or 0.0, description=_described(state)
            )

        yield show_bar


def _described(state: State) -> str:
    words = (
        f"{state.documents:,} documents, {state.predictions:,} predictions, "
        f"{state.predictions_per_second:,.0f}/s"
    )
    if state.seconds_left is None:
        return words
    return f"{words}, {_duration(state.seconds_left)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _summarize(found: Survey) -> None:
    console = Console(highlight=False, soft_wrap=True)
    corpora = found.corpora.read("corpus", "documents", "predictions")
    for corpus, documents, predictions in zip(*corpora.values(), strict=True):
        console.print(
            Text(f"{printable(corpus)}: {documents:,} documents, {predictions:,} predictions")
        )
    problems = len(found.problems)
    if problems:
        console.print(Text(f"{problems:,} problems", "yellow"))
    size = sum(path.stat().st_size for path in found.path.rglob("*.parquet"))
    console.print(Text(f"{printable(str(found.path))}: {describe_bytes(size)}"))
