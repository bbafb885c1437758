"""`ifr-fast survey` and `ifr-fast report`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from ..progress import printable
from . import files, options

if TYPE_CHECKING:
    from ..survey import Problem, State, Survey

_LINE_SECONDS = 30  # between two lines of progress without a terminal
_SHOWN_PROBLEMS = 20  # more are only counted


def survey(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Text, JSONL and Parquet files, folders of them, or hf:NAME; CORPUS=INPUT names "
            "the corpus."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.")],
    model: options.Model = None,
    subfolder: options.Subfolder = None,
    label_by: Annotated[
        list[str] | None,
        typer.Option(
            "--label-by",
            help="Keep a field of the records with each token: NAME or NAME=FIELD, separated by "
            "commas; corpus=FIELD assigns records to corpora.",
        ),
    ] = None,
    thresholds: Annotated[
        str,
        typer.Option(
            "--thresholds", help="Thresholds of the graphs, ascending, separated by commas."
        ),
    ] = "0.01,0.02,0.04,0.08",
    text_field: Annotated[
        str, typer.Option("--text-field", help="Field of a record that holds its text.")
    ] = "text",
    split: Annotated[
        str, typer.Option(help="Unit of a text file that is a document: file, paragraph or line.")
    ] = "file",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", help="Cut longer documents; default: 2048, or the model's context."
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", help="Number of tokens per forward pass.")
    ] = None,
    window_tokens: Annotated[
        int,
        typer.Option("--window-tokens", help="Number of tokens per part; --resume repeats parts."),
    ] = 16384,
    engine: Annotated[
        str, typer.Option(help="local, or ray: one actor per GPU or per share of the CPUs.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(help="With --engine ray: number of actors.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted survey.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first problem.")] = False,
    impl: options.Impl = "auto",
    device_map: Annotated[
        str | None,
        typer.Option(
            "--device-map", help="Device of the model: cuda:0, for example, or auto for several."
        ),
    ] = None,
    with_report: Annotated[
        bool, typer.Option("--report", help="Also write the report (see ifr-fast report).")
    ] = False,
) -> None:
    """Score every prediction of whole corpora, and write the results as Parquet."""
    from .. import survey as surveys

    levels = _parse_thresholds(thresholds)
    options.check_subfolder(subfolder, model)
    chosen = {"device_map": device_map, "subfolder": subfolder}
    console = Console(stderr=True, highlight=False)
    try:
        with _shown(console) as show:
            found = surveys.survey(
                inputs,
                out,
                model=model,
                thresholds=levels,
                label_by=[name for given in label_by or [] for name in given.split(",")],
                text_field=text_field,
                split=split,  # type: ignore[arg-type]  # checked there, like engine
                max_tokens=max_tokens,
                batch_tokens=batch_tokens,
                window_tokens=window_tokens,
                engine=engine,  # type: ignore[arg-type]
                workers=workers,
                resume=resume,
                strict=strict,
                impl=impl,
                model_options={name: x for name, x in chosen.items() if x is not None},
                on_state=show,
            )
    except KeyboardInterrupt:
        hint = f"interrupted; run the same command with --resume to resume {printable(str(out))}"
        console.print(Text(hint), soft_wrap=True)
        raise
    _print_survey(found)
    if with_report:
        report(out)


def report(
    directory: Annotated[Path, typer.Argument(help="Directory of a survey.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory to write; default: report/ in the survey's."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Label that holds parts of speech; default: pos.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", "-t", help="Threshold at which frequencies are compared."),
    ] = None,
    contrast: Annotated[
        list[str] | None,
        typer.Option(help="Two corpora of prompts to compare, as FIRST:SECOND; repeatable."),
    ] = None,
    seed: options.Seed = 0,
) -> None:
    """Analyse a survey: write one page with figures and tables."""
    from ..survey import report as reports

    written = reports.report(
        directory, out, label=label, threshold=threshold, seed=seed,
        contrasts=reports.pairs(contrast or []),
    )  # fmt: skip
    console = Console(highlight=False, soft_wrap=True)
    for finding in written.findings:
        console.print(Text(finding.title, "bold"))
        for line in finding.statement.splitlines():
            console.print(Text(f"  {printable(line)}"))
    for title, why in written.omitted.items():
        console.print(Text.assemble((title, "bold"), f": not computed ({printable(why)})"))
    files.print_written([written.path])


def _parse_thresholds(given: str) -> list[float]:
    try:
        return [float(part) for part in given.split(",")]
    except ValueError:
        raise ValueError(
            f"--thresholds: expected numbers, as in 0.01,0.02, got {given!r}"
        ) from None


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[State], None]]:
    """Gives a function that shows a state as a bar, or as a line every 30 s without a terminal."""
    n_problems = 0

    def print_new(problems: list[Problem]) -> None:
        nonlocal n_problems
        for problem in problems:
            n_problems += 1
            if n_problems <= _SHOWN_PROBLEMS:
                line = Text.assemble(("problem: ", "yellow"), printable(str(problem)))
                console.print(line, soft_wrap=True)
            elif n_problems == _SHOWN_PROBLEMS + 1:
                console.print("problem: more are listed in the survey")

    if not console.is_terminal:
        last = time.monotonic()

        def show_line(state: State) -> None:
            nonlocal last
            print_new(state.problems)
            if time.monotonic() - last >= _LINE_SECONDS:
                last = time.monotonic()
                console.print(_described(state), soft_wrap=True)

        yield show_line
        return
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading the model", total=None)

        def show_bar(state: State) -> None:
            print_new(state.problems)
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


def _print_survey(found: Survey) -> None:
    from ..recording.memory import describe_bytes

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
