"""The root of the command: subcommands, and exit codes for errors."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from .._version import __version__
from ..errors import IfrError
from ..progress import printable
from .bench import bench
from .circuits import circuits
from .doctor import doctor
from .generate import generate
from .plan import plan
from .streams import checked_streams
from .survey import report, survey
from .trace import trace

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Information flow routes: how a language model arrived at a prediction.",
)
for command in (trace, generate, bench, plan, survey, report, circuits, doctor):
    app.command()(command)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Within, a warning is one line that names no source file."""

    def line(message: Warning | str, *_: object, **__: object) -> str:
        return f"warning: {printable(' '.join(str(message).split()))}\n"

    before = warnings.formatwarning
    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = before


def run() -> None:
    """Runs the command. A wrong argument, or something that this machine lacks, is printed as one
    line, and the exit code is 2. Warnings are one line each.
    """
    with checked_streams(), _plain_warnings():
        try:
            try:
                app()
            finally:
                sys.stdout.flush()
        except (IfrError, ValueError, OSError) as error:
            Console(stderr=True, highlight=False).print(
                Text.assemble(("error: ", "bold red"), printable(str(error))), soft_wrap=True
            )
            sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ifr-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass
