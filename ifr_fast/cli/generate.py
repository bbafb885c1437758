"""`ifr-fast generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from . import files, options


def generate(
    text: Annotated[
        str | None,
        typer.Argument(help="Prompt; '-' reads standard input. Default: a demonstration."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")
    ] = None,
    chat: options.Chat = None,
    continue_final_message: options.ContinueFinalMessage = False,
    no_special_tokens: options.NoSpecialTokens = False,
    model: options.Model = None,
    subfolder: options.Subfolder = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Maximum number of new tokens.")
    ] = 32,
    threshold: options.Threshold = 0.04,
    granularity: options.By = options.Granularity.TOKEN,
    temperature: Annotated[
        float, typer.Option(help="Above 0: sample tokens; 0: take the most probable.")
    ] = 0.0,
    seed: options.Seed = 0,
    impl: options.Impl = "auto",
    sources: Annotated[
        int, typer.Option("--sources", "-k", help="Number of sources to print for each token.")
    ] = 4,
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write tokens and graphs, one line of JSON each ('-': standard output)."
        ),
    ] = None,
) -> None:
    """Continue a text, and print each new token with the tokens that it came from."""
    prompt = files.read_text(text, file, chat, continue_final_message, no_special_tokens)
    outputs = files.check_outputs({"--json": json_path})
    from ..arguments import check_count, check_fraction, check_number, check_seed

    check_count("--sources", sources)
    check_count("--max-new-tokens", max_new_tokens)
    check_number("--temperature", temperature, "a number from 0 up", low=0)
    check_seed("--seed", seed)
    check_fraction("threshold", threshold)
    tracer = options.open_tracer(model, impl, subfolder=subfolder)
    import torch

    from ..storage.files import write_text

    steps = tracer.generate(
        prompt,
        max_new_tokens=max_new_tokens,
        threshold=threshold,
        granularity=granularity.value,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        generator=torch.Generator(tracer.decoder.device).manual_seed(seed),
        add_special_tokens=False if no_special_tokens else None,
    )
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    lines = []
    for step in steps:
        if outputs:
            fields = {"token_id": step.token_id, "token": step.token}
            document = {**fields, "probability": step.probability}
            document["graph"] = json.loads(step.graph.to_json())
            lines.append(json.dumps(document, allow_nan=False))
        if files.STDOUT in outputs:
            print(lines.pop(), flush=True)
            continue
        importance = step.graph.token_importance()
        best = importance.argsort(descending=True, stable=True)[:sources].tolist()
        origins = ", ".join(
            f"{files.quote(step.graph.tokens[i])}@{i} {float(importance[i]):.2f}"
            for i in best
            if importance[i] > 0
        )
        console.print(
            Text.assemble(
                (files.quote(step.token), "bold green"), f" ({step.probability:.2f})",
                ("  from ", "dim"), origins or "nothing above the threshold",
            )
        )  # fmt: skip
    if outputs and files.STDOUT not in outputs:
        write_text(outputs[0], "".join(line + "\n" for line in lines))
    files.print_written(outputs)
