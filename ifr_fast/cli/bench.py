"""`ifr-fast bench`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..progress import printable
from . import files, options

if TYPE_CHECKING:
    from ..benchmark import Throughput


def bench(
    model: options.Model = None,
    subfolder: options.Subfolder = None,
    lengths: Annotated[
        str,
        typer.Option(
            "--lengths", "-n", help="Text lengths to measure, in tokens, separated by commas."
        ),
    ] = "128,512",
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Read the text from a file; default: English prose."),
    ] = None,
    impl: options.Impl = "auto",
    repeat: Annotated[int, typer.Option(help="Number of rounds; the median is reported.")] = 5,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Write the figures as JSON ('-': standard output)."),
    ] = None,
) -> None:
    """Measure the cost of attribution on this machine, relative to the model's forward pass."""
    sizes = _lengths(lengths)
    from ..arguments import check_count

    check_count("--repeat", repeat)
    text = None if file is None else files.read_file("--file", file)
    outputs = files.check_outputs({"--json": json_path})
    tracer = options.open_tracer(model, impl, subfolder=subfolder)
    limit = tracer.decoder.max_length
    if limit is not None and max(sizes) > limit:
        raise ValueError(f"--lengths: {max(sizes)} is more than the model's context of {limit}")
    from ..benchmark import first_tokens, measure, prose, report
    from ..storage.files import write_text

    token_ids = first_tokens(prose() if text is None else text, tracer.tokenizer, max(sizes))
    console = Console(stderr=True)
    results = []
    with console.status("") if console.is_terminal else nullcontext() as status:
        for T in sizes:

            def show(i: int, T: int = T) -> None:
                if status is not None:
                    status.update(f"{T} tokens, " + (f"round {i} of {repeat}" if i else "warm-up"))

            results.append(measure(tracer, token_ids[:T], repeat=repeat, on_round=show))
    document = report(tracer, results)
    for path in outputs:
        with files.target(path) as target:
            write_text(target, json.dumps(document, indent=1) + "\n")
    files.print_written(outputs)
    if files.STDOUT not in outputs:
        _print_throughput(document, results)


def _lengths(given: str) -> list[int]:
    """Parses '128,512': numbers of tokens, ascending, each once."""
    parts = [part.strip() for part in given.split(",")]
    # Ten digits are more than any text has tokens.
    if not all(part.isascii() and part.isdigit() and 0 < len(part) <= 10 for part in parts) or not (
        all(map(int, parts))
    ):
        raise ValueError(f"--lengths: expected numbers of tokens, as in 128,512, got {given!r}")
    return sorted({int(part) for part in parts})


def _print_throughput(document: dict[str, Any], results: list[Throughput]) -> None:
    from ..recording.memory import describe_bytes

    on, of = document["machine"], document["subject"]

    def size(n: int | None) -> str:
        return "unknown" if n is None else describe_bytes(n)

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        Text(
            f"{printable(of['model'])} in {of['dtype']}, impl {of['impl']}, attention "
            f"{of['attention']}\n"
            f"{on['processor']}, {on['threads']} threads, {on['cpu_capability']}\n"
            f"ifr-fast {on['ifr_fast']}, torch {on['torch']}, transformers {on['transformers']}, "
            f"Python {on['python']}\n"
        )
    )
    rows: dict[str, list[str]] = {
        "forward pass, the unit (s)": [f"{r.forward_seconds:.3f}" for r in results],
        "recorded forward pass (units)": [f"{r.units('record'):.2f}" for r in results],
        "one route of a recording (units)": [f"{r.units('route'):.3f}" for r in results],
        "all routes of a recording (units)": [f"{r.units('scoring'):.2f}" for r in results],
        "one route, end to end (units)": [f"{r.units('trace'):.2f}" for r in results],
        "all routes, end to end (units)": [f"{r.units('trace_all'):.2f}" for r in results],
        "all routes, share of the forward pass": [f"{r.share_of_forward:.0%}" for r in results],
        "all routes, tokens per second": [f"{r.tokens_per_second:,.0f}" for r in results],
        "scoring, million pairs per second": [f"{r.pairs_per_second / 1e6:,.1f}" for r in results],
        "recording holds": [size(r.recording_bytes) for r in results],
        "scoring adds, at its peak": [size(r.scoring_bytes) for r in results],
        "all memory, at its peak": [size(r.peak_bytes) for r in results],
    }
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", no_wrap=True)
    for r in results:
        table.add_column(str(r.n_tokens), justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    # A pipe has no width: the table is as wide as its content.
    width = None if console.is_terminal else 44 + 16 * len(results)
    Console(highlight=False, width=width).print(table)
    if any(r.mode == "lean" for r in results):
        console.print("Recordings that would not fit into memory were made lean.")
