"""Options that several commands share, and the model that they open."""

from __future__ import annotations

from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ..tracer import Tracer

DEMO_TEXT = "When Mary and John went to the store, John gave a drink to"


class Granularity(StrEnum):
    """Values of --granularity."""

    TOKEN = "token"
    HEAD = "head"


Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Hub name or directory; default SmolLM2.")
]
Chat = Annotated[
    Path | None, typer.Option(help="Read chat messages from a JSON file ('-': standard input).")
]
Threshold = Annotated[
    float, typer.Option("--threshold", "-t", help="Keep edges above this importance.")
]
By = Annotated[Granularity, typer.Option(help="Compare summed attention edges, or single heads.")]
Impl = Annotated[str, typer.Option(help="auto, reference, eager, cpu or triton.")]
MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", help="Memory limit, the model included, as in 8GB."),
]
Seed = Annotated[int, typer.Option(help="Random seed for sampling.")]


def open_tracer(model: str | None, impl: str, max_memory: str | None = None) -> Tracer:
    """Opens a model by name or directory; None is the default model, fetched on first use."""
    console = Console(stderr=True)
    with console.status("loading the model") if console.is_terminal else nullcontext():
        from ..tracer import Tracer
    from ..model.pretrained import default_model

    if model is None:
        default_model()  # prints its own progress
    with console.status("loading the model") if console.is_terminal else nullcontext():
        return Tracer.from_pretrained(model, impl=impl, max_memory=max_memory)
