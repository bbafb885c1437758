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
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Hub name, directory, GGUF file, or directory of a PEFT adapter; default SmolLM2.",
    ),
]
Subfolder = Annotated[
    str | None, typer.Option(help="Folder of the model within the repository or directory.")
]
Chat = Annotated[
    Path | None,
    typer.Option(help="Read chat messages, and tools, from a JSON file ('-': standard input)."),
]
ContinueFinalMessage = Annotated[
    bool,
    typer.Option(
        "--continue-final-message",
        help="With --chat: leave the last message open, in place of a new one for the answer.",
    ),
]
NoSpecialTokens = Annotated[
    bool,
    typer.Option(
        "--no-special-tokens",
        help="Add no special tokens to the text, as for one that a chat template has made.",
    ),
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


def check_subfolder(subfolder: str | None, model: str | None) -> None:
    """Raises ValueError for a subfolder of no model."""
    if subfolder is not None and model is None:
        raise ValueError("--subfolder: goes with --model")


def open_tracer(
    model: str | None, impl: str, max_memory: str | None = None, subfolder: str | None = None
) -> Tracer:
    """Opens a model by name or path; None is the default model, fetched on first use."""
    check_subfolder(subfolder, model)
    within = {} if subfolder is None else {"subfolder": subfolder}
    console = Console(stderr=True)
    with console.status("loading the model") if console.is_terminal else nullcontext():
        from ..tracer import Tracer
    from ..model.pretrained import default_model

    if model is None:
        default_model()  # prints its own progress
    with console.status("loading the model") if console.is_terminal else nullcontext():
        return Tracer.from_pretrained(model, impl=impl, max_memory=max_memory, **within)
