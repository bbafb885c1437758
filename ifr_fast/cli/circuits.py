"""`ifr-fast circuits`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from . import options


def circuits(
    out: Annotated[Path, typer.Option(help="Folder for tables, figures and the report.")],
    task: Annotated[str, typer.Option(help="ioi or greater-than.")] = "ioi",
    model: options.Model = None,
    subfolder: options.Subfolder = None,
    prompts: Annotated[
        int, typer.Option("--prompts", "-n", help="Number of prompts to make.")
    ] = 50,
    seed: Annotated[
        int, typer.Option(help="Random seed of prompts, random graphs and intervals.")
    ] = 0,
    threshold: Annotated[
        float,
        typer.Option("--threshold", "-t", help="Threshold of the routes compared with patching."),
    ] = 0.01,
    draws: Annotated[int, typer.Option(help="Number of random graphs per prompt.")] = 20,
    patch_prompts: Annotated[
        int | None,
        typer.Option(
            "--patch-prompts", help="Number of prompts to patch, from the first; default: all."
        ),
    ] = None,
    keep_prompts: Annotated[
        int | None,
        typer.Option(
            "--keep-prompts",
            help="Number of prompts to ablate, from the first; default: those patched.",
        ),
    ] = None,
    keep_threshold: Annotated[
        list[float] | None,
        typer.Option(help="Threshold of the graphs that are kept; repeatable. Default: six."),
    ] = None,
    cost_prompts: Annotated[
        int, typer.Option("--cost-prompts", help="Number of prompts to patch position by position.")
    ] = 5,
    input_prompts: Annotated[
        int, typer.Option("--input-prompts", help="Number of prompts whose tokens are deleted.")
    ] = 20,
    impl: options.Impl = "auto",
) -> None:
    """Compare a task's routes with activation patching, and measure how faithful they are.

    With the default model on two cores this takes about an hour, and a tenth of that with
    --prompts 5. After an interruption, run the same command again to resume.
    """
    from ..circuits.report import Settings, make_report

    settings = Settings(
        task=task,
        n_prompts=prompts,
        seed=seed,
        threshold=threshold,
        patch_prompts=patch_prompts,
        keep_prompts=keep_prompts,
        thresholds=tuple(keep_threshold) if keep_threshold else Settings.thresholds,
        draws=draws,
        cost_prompts=cost_prompts,
        input_prompts=input_prompts,
    )
    settings.check()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file; expected a folder to write")
    tracer = options.open_tracer(model, impl, subfolder=subfolder)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {out} cannot be made ({error.strerror})") from error
    make_report(tracer, out, settings, model_name=model)
    Console(highlight=False, soft_wrap=True).print(Text((out / "report.md").read_text()))
