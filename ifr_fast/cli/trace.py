"""`ifr-fast trace`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..progress import printable
from . import files, options
from .formats import Outputs, with_outputs

if TYPE_CHECKING:
    from ..graph.tables import Hop
    from ..recording.recording import Recording
    from ..routes.route_graph import RouteGraph
    from ..tracer import Tracer


@with_outputs
def trace(
    text: Annotated[
        str | None,
        typer.Argument(help="Text; '-' reads standard input. Default: a demonstration."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the text from a file.")
    ] = None,
    chat: options.Chat = None,
    continue_final_message: options.ContinueFinalMessage = False,
    no_special_tokens: options.NoSpecialTokens = False,
    model: options.Model = None,
    subfolder: options.Subfolder = None,
    position: Annotated[
        str,
        typer.Option(
            "--position",
            "-p",
            help="Explain the prediction after this token, or after several: 3,5,7 or -4:.",
        ),
    ] = "-1",
    threshold: options.Threshold = 0.04,
    granularity: options.By = options.Granularity.TOKEN,
    impl: options.Impl = "auto",
    recording: Annotated[
        Path | None,
        typer.Option(
            "--recording",
            "-r",
            help="Keep the recording of the text in this file. An interrupted recording is "
            "resumed; a complete one is read, and TEXT may be left out.",
        ),
    ] = None,
    max_memory: options.MaxMemory = None,
    top_paths: Annotated[
        int, typer.Option("--top-paths", "-k", help="Number of routes to print.")
    ] = 5,
    **outputs: Path | None,
) -> None:
    """Explain one prediction: print its strongest routes, tokens and heads."""
    demonstration = text is None and file is None and chat is None
    source = files.read_text(text, file, chat, continue_final_message, no_special_tokens)
    written = Outputs(outputs)
    if recording is not None:
        _check_recording(recording, written.paths)
    from ..arguments import check_count, check_fraction
    from ..recording.memory import parse_bytes

    if max_memory is not None:
        parse_bytes(max_memory, "--max-memory")
    check_count("--top-paths", top_paths)
    check_fraction("threshold", threshold)
    written.check_packages()
    positions = _parse_position(position)
    tracer = options.open_tracer(model, impl, max_memory, subfolder)
    add_special_tokens = False if no_special_tokens else None
    if recording is not None:
        if demonstration and recording.exists():
            source = tracer.load_recording(recording)
        else:
            source = _record(tracer, source, recording, add_special_tokens)
    graph = tracer.trace(
        source,
        position=positions,
        threshold=threshold,
        granularity=granularity.value,
        add_special_tokens=add_special_tokens,
    )
    # Files come first: a reader of the printed text may close the pipe.
    written.write(graph, tracer)
    files.print_written(written.paths)
    if files.STDOUT not in written.paths:
        _print_graph(graph, top_paths)


def _record(tracer: Tracer, source: Any, path: Path, add_special_tokens: bool | None) -> Recording:
    try:
        return tracer.record(source, path=path, add_special_tokens=add_special_tokens)
    except KeyboardInterrupt:
        Console(stderr=True).print(
            Text(f"interrupted; run the same command again to resume {printable(str(path))}"),
            soft_wrap=True,
        )
        raise


def _parse_position(given: str) -> int | slice | list[int]:
    """Parses '3', '3,5,7' and '-4:' as Python indexes."""
    try:
        if ":" in given:
            bounds = [int(part) if part.strip() else None for part in given.split(":")]
            if len(bounds) <= 3 and bounds[2:] != [0]:
                return slice(*bounds)
        else:
            chosen = [int(part) for part in given.split(",")]
            return chosen if len(chosen) > 1 else chosen[0]
    except ValueError:
        pass
    raise ValueError(f"--position: expected 3, -1, 3,5,7 or -4: for example, got {given!r}")


def _check_recording(path: Path, outputs: list[Path]) -> None:
    """Raises ValueError, before the model is opened, if no recording can be kept at a path."""
    if path.exists() and not path.is_file():
        raise ValueError(f"--recording: {path} is no file")
    if not path.exists():
        files.check_folder("--recording", path)
    target = os.path.realpath(path)
    if any(os.path.realpath(output) == target for output in outputs):
        raise ValueError(f"--recording: {path} is also an output; expected another file")


def _print_graph(graph: RouteGraph, n_routes: int) -> None:
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())

    def line(*parts: str | tuple[str, str]) -> None:
        console.print(Text.assemble(*parts))

    def name(position: int) -> str:
        return f"{files.quote(graph.tokens[position])}@{position}"

    if graph.span is None:
        first, *rest = graph.predictions
        line("after ", (name(graph.position), "bold"), " the model predicts ",
             (files.quote(first.token), "bold green"), f" ({first.probability:.2f})")  # fmt: skip
        others = ", ".join(f"{files.quote(p.token)} {p.probability:.2f}" for p in rest)
        line((f"  then {others}", "dim"))
    else:
        line((f"{len(graph.span.positions)} predictions", "bold"), ", taken together")
        for position, (first, *_) in zip(graph.span.positions, graph.span.predictions, strict=True):
            line("  after ", name(position), " ", (files.quote(first.token), "bold green"),
                 f" ({first.probability:.2f})")  # fmt: skip
    n_edges, T = len(graph.edges.layer), len(graph.tokens)
    line((f"  {n_edges} edge{'s'[:n_edges != 1]} above {graph.threshold:g} among {T} "
          f"token{'s'[:T != 1]} and {graph.n_layers} layers", "dim"))  # fmt: skip
    if graph.unattributed:
        line((f"  {len(graph.unattributed)} nodes are unattributed: none of their inputs has "
              "positive importance", "yellow"))  # fmt: skip
    if not n_edges:
        return

    line()
    line(("strongest routes", "bold"), ("  weight, then from where to where", "dim"))
    for route in graph.top_routes(n_routes):
        line((f"  {route.weight:6.3f}  ", "cyan"), _describe(route.source, route.hops[::-1], name))

    line()
    line(("most important tokens", "bold"), ("  weight of all their paths", "dim"))
    importance = graph.token_importance()
    for i in importance.argsort(descending=True, stable=True)[:6].tolist():
        if importance[i] > 0:
            line((f"  {float(importance[i]):6.3f}  ", "cyan"), name(i))

    line()
    line(("most important heads and FFN blocks", "bold"), ("  weight times flow", "dim"))
    heads, ffn = graph.head_importance(), graph.ffn_importance()
    parts = [
        (float(heads[layer, head]), f"layer {layer} head {head}")
        for layer in range(graph.n_layers)
        for head in range(graph.n_heads)
    ] + [(float(ffn[layer]), f"layer {layer} FFN") for layer in range(graph.n_layers)]
    for weight, what in sorted(parts, key=lambda part: -part[0])[:8]:
        if weight > 0:
            line((f"  {weight:6.3f}  ", "cyan"), what)


def _describe(source: int, hops: list[Hop], name: Callable[[int], str]) -> str:
    """A route in words, from its token upwards."""
    if not hops:
        return f"{name(source)} stays at its position"
    words = name(source)
    for hop in hops:
        heads = ", ".join(f"{head} ({weight:.2f})" for head, weight in hop.heads[:3])
        more = f" and {len(hop.heads) - 3} more" if len(hop.heads) > 3 else ""
        label = "head" if len(hop.heads) == 1 else "heads"
        words += f" → layer {hop.layer} {label} {heads}{more} → {name(hop.target)}"
    return words
