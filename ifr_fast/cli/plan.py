"""`ifr-fast plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import options

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def plan(
    tokens: Annotated[int, typer.Argument(help="Length of the text.")],
    model: options.Model = None,
    subfolder: options.Subfolder = None,
    max_memory: options.MaxMemory = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Plan from a config.json or its directory, without the weights."),
    ] = None,
    device_memory: Annotated[
        str | None,
        typer.Option("--device-memory", help="With --config: memory of the GPU, as in 80GB."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="With --config: dtype of the weights.")] = "bfloat16",
) -> None:
    """Print the memory and time that a text takes; fail if it does not fit."""
    from ..arguments import check_choice, check_count
    from ..recording.memory import parse_bytes

    check_count("tokens", tokens)
    console = Console(highlight=False, soft_wrap=True)
    if max_memory is not None:
        parse_bytes(max_memory, "--max-memory")
    if config is None:
        if device_memory is not None:
            raise ValueError("--device-memory: goes with --config")
        tracer = options.open_tracer(model, "auto", max_memory, subfolder=subfolder)
        limit = tracer.decoder.max_length
        if limit is not None and tokens > limit:
            raise ValueError(f"tokens: {tokens} is more than the model's context of {limit}")
        console.print(str(tracer.plan(tokens)))
        return
    if model is not None or subfolder is not None or max_memory is not None:
        raise ValueError("--config: goes with --device-memory and --dtype alone")
    import torch
    from transformers import AutoConfig

    from ..errors import first_line
    from ..recording.paper_plan import plan_for

    check_choice("--dtype", dtype, _DTYPES)
    if not config.exists():
        raise ValueError(f"--config: no file or directory {str(config)!r}")
    room = None if device_memory is None else parse_bytes(device_memory, "--device-memory")
    try:
        read = AutoConfig.from_pretrained(config)
    except Exception as error:  # a configuration raises whatever it meets
        raise ValueError(f"--config: {config} cannot be read: {first_line(error)}") from error
    found = plan_for(read, tokens, device_memory=room, dtype=getattr(torch, dtype))
    console.print(str(found))
    if room is not None:
        from ..recording.memory import describe_bytes

        console.print(f"  fits into {describe_bytes(room)}")
