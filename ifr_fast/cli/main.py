"""The root of the command: subcommands, and exit codes for errors."""

from __future__ import annotations

import io
import os
import sys
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


def main() -> None:
    """Runs the command.

    Wrong input, or something that this machine lacks, ends it with one line and exit code 2. A
    reader that closes the pipe ends it quietly with exit code 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes standard output once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
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
