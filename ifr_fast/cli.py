"""The `ifr-fast` command."""

from __future__ import annotations

import io
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._version import __version__
from .errors import IfrError
from .progress import printable

if TYPE_CHECKING:
    from .benchmark import Throughput
    from .graph import Hop, RouteGraph
    from .tracer import Tracer

_STDOUT = Path("-")
_LONGEST_TEXT = 64 << 20  # bytes
_DTYPES = ("bfloat16", "float16", "float32", "float64")
DEMO_TEXT = "When Mary and John went to the store, John gave a drink to"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Information flow routes: how a language model arrived at a prediction.",
)


class _Granularity(StrEnum):
    TOKEN = "token"
    HEAD = "head"


# Options that several commands have.
_Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Hub name or directory; default SmolLM2.")
]
_Chat = Annotated[
    Path | None, typer.Option(help="Read chat messages from a JSON file ('-': standard input).")
]
_Threshold = Annotated[
    float, typer.Option("--threshold", "-t", help="Keep edges above this importance.")
]
_By = Annotated[_Granularity, typer.Option(help="Compare summed attention edges, or single heads.")]
_Impl = Annotated[str, typer.Option(help="auto, reference, eager, cpu or triton.")]
_MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", help="Memory to keep within, the model's included: 8GB."),
]


def main() -> None:
    """Runs the command; wrong input and what a machine lacks end in one line and exit code 2.

    A reader that closes the pipe ends it quietly, with exit code 1.
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
        # The interpreter flushes once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (IfrError, ValueError, OSError) as error:
        Console(stderr=True, highlight=False).print(
            Text.assemble(("error: ", "bold red"), printable(str(error))), soft_wrap=True
        )
        sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ifr-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def trace(
    text: Annotated[
        str | None,
        typer.Argument(help="The text; '-' reads standard input. Without any, a demonstration."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the text from a file.")
    ] = None,
    chat: _Chat = None,
    model: _Model = None,
    position: Annotated[
        str,
        typer.Option(
            "--position",
            "-p",
            help="Explain what is predicted after this token; or after several: 3,5,7 or -4:.",
        ),
    ] = "-1",
    threshold: _Threshold = 0.04,
    granularity: _By = _Granularity.TOKEN,
    impl: _Impl = "auto",
    recording_path: Annotated[
        Path | None,
        typer.Option(
            "--recording",
            "-r",
            help="Keep the recording of the text in this file; it goes on where an interrupted run "
            "has left it. A whole one is read: its own text, where none is given.",
        ),
    ] = None,
    max_memory: _MaxMemory = None,
    top_paths: Annotated[
        int, typer.Option("--top-paths", "-k", help="How many routes to print.")
    ] = 5,
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write the graph as JSON ('-', here as below: standard output)."
        ),
    ] = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write a page that draws the graph.")
    ] = None,
    png_path: Annotated[
        Path | None, typer.Option("--png", help="Write the picture as PNG.")
    ] = None,
    save_path: Annotated[
        Path | None, typer.Option("--save", help="Save the graph (safetensors).")
    ] = None,
    graphml_path: Annotated[
        Path | None, typer.Option("--graphml", help="Write the graph as GraphML.")
    ] = None,
    dot_path: Annotated[
        Path | None, typer.Option("--dot", help="Write the graph in DOT, for Graphviz.")
    ] = None,
    parquet_path: Annotated[
        Path | None, typer.Option("--parquet", help="Write its edges, a row a head, as Parquet.")
    ] = None,
    neuronpedia_path: Annotated[
        Path | None,
        typer.Option("--neuronpedia", help="Write an attribution graph (Neuronpedia's JSON)."),
    ] = None,
) -> None:
    """Explain one prediction: print its strongest routes, tokens and heads."""
    given = not (text is None and file is None and chat is None)
    source = _read(text, file, chat)
    paths = {"--json": json_path, "--html": html_path, "--png": png_path, "--save": save_path,
             "--graphml": graphml_path, "--dot": dot_path, "--parquet": parquet_path,
             "--neuronpedia": neuronpedia_path}  # fmt: skip
    outputs = _check_outputs(paths)
    if recording_path is not None:
        _check_recording(recording_path, outputs)
    if top_paths < 1:
        raise ValueError(f"--top-paths: expected at least 1, got {top_paths}")
    from .graph import check_threshold
    from .memory import parse_bytes

    if max_memory is not None:
        parse_bytes(max_memory, "--max-memory")
    check_threshold(threshold)
    if png_path is not None:
        from .export.plot import check_plot

        check_plot()
    if parquet_path is not None:
        from .export.tables import check_parquet

        check_parquet()
    where = _position(position)
    tracer = _open(model, impl, max_memory)
    if recording_path is not None:
        if given or not recording_path.exists():
            try:
                source = tracer.record(source, path=recording_path)
            except KeyboardInterrupt:
                Console(stderr=True).print(
                    Text(f"interrupted; what {printable(str(recording_path))} holds of the "
                         "recording is gone on with by the same command"), soft_wrap=True
                )  # fmt: skip
                raise
        else:
            source = tracer.load_recording(recording_path)
    graph = tracer.trace(source, position=where, threshold=threshold, granularity=granularity.value)
    # Files first: whoever reads what is printed may stop reading.
    _write(graph, tracer, paths)
    _say_written(outputs)
    if _STDOUT not in outputs:
        _print_graph(graph, top_paths)


@app.command()
def generate(
    text: Annotated[
        str | None,
        typer.Argument(help="The prompt; '-' reads standard input. Without any, a demonstration."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")
    ] = None,
    chat: _Chat = None,
    model: _Model = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="How many tokens to add at most.")
    ] = 32,
    threshold: _Threshold = 0.04,
    granularity: _By = _Granularity.TOKEN,
    temperature: Annotated[
        float, typer.Option(help="Above 0: draw tokens at random; 0: take the most probable.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
    impl: _Impl = "auto",
    sources: Annotated[
        int, typer.Option("--sources", "-k", help="How many sources of each token to print.")
    ] = 4,
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write tokens and graphs, a line of JSON each ('-': standard output)."
        ),
    ] = None,
) -> None:
    """Continue a text, and print each new token with the tokens that it came from."""
    given = _read(text, file, chat)
    outputs = _check_outputs({"--json": json_path})
    if sources < 1:
        raise ValueError(f"--sources: expected at least 1, got {sources}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"--temperature: expected a number from 0 up, got {temperature}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"--seed: expected 0 to {(1 << 64) - 1}, got {seed}")
    from .graph import check_threshold

    check_threshold(threshold)
    tracer = _open(model, impl)
    import torch

    from .storage import write_text

    steps = tracer.generate(
        given,
        max_new_tokens=max_new_tokens,
        threshold=threshold,
        granularity=granularity.value,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        generator=torch.Generator(tracer.decoder.device).manual_seed(seed),
    )
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    lines = []
    for step in steps:
        if outputs:
            fields = {"token_id": step.token_id, "token": step.token}
            document = {**fields, "probability": step.probability}
            document["graph"] = json.loads(step.graph.to_json())
            lines.append(json.dumps(document, allow_nan=False))
        if _STDOUT in outputs:
            print(lines.pop(), flush=True)
            continue
        importance = step.graph.token_importance()
        best = importance.argsort(descending=True, stable=True)[:sources].tolist()
        origins = ", ".join(
            f"{_quote(step.graph.tokens[i])}@{i} {float(importance[i]):.2f}"
            for i in best
            if importance[i] > 0
        )
        console.print(
            Text.assemble(
                (_quote(step.token), "bold green"), f" ({step.probability:.2f})",
                ("  from ", "dim"), origins or "nothing above the threshold",
            )
        )  # fmt: skip
    if outputs and _STDOUT not in outputs:
        write_text(outputs[0], "".join(line + "\n" for line in lines))
    _say_written(outputs)


@app.command()
def bench(
    model: _Model = None,
    lengths: Annotated[
        str, typer.Option("--lengths", "-n", help="Tokens of text to measure, by commas.")
    ] = "128,512",
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Read the text from a file; default: English prose."),
    ] = None,
    impl: _Impl = "auto",
    repeat: Annotated[int, typer.Option(help="Rounds; their median is reported.")] = 5,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Write the figures as JSON ('-': standard output)."),
    ] = None,
) -> None:
    """Measure what attribution costs here, beside the model's own forward pass."""
    sizes = _lengths(lengths)
    if repeat < 1:
        raise ValueError(f"--repeat: expected at least 1, got {repeat}")
    text = None if file is None else _decode(_read_bytes("--file", file), str(file))
    outputs = _check_outputs({"--json": json_path})
    tracer = _open(model, impl)
    limit = tracer.decoder.max_length
    if limit is not None and max(sizes) > limit:
        raise ValueError(f"--lengths: {max(sizes)} is more than the model's context of {limit}")
    from .benchmark import first_tokens, measure, prose, report
    from .storage import write_text

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
        with _target(path) as file:
            write_text(file, json.dumps(document, indent=1) + "\n")
    _say_written(outputs)
    if _STDOUT not in outputs:
        _print_throughput(document, results)


def _position(given: str) -> int | slice | list[int]:
    """'3', '3,5,7' and '-4:', as Python would index."""
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
    raise ValueError(f"--position: expected one as in 3 or -1, or 3,5,7 or -4:, got {given!r}")


def _lengths(given: str) -> list[int]:
    """Numbers of tokens from '128,512': ascending, each once."""
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--lengths: expected numbers of tokens, as in 128,512, got {given!r}")
    return sorted({int(part) for part in parts})


def _print_throughput(document: dict[str, Any], results: list[Throughput]) -> None:
    from .memory import describe_bytes

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
    # Into a pipe as wide as it is: nothing is cut.
    width = None if console.is_terminal else 44 + 16 * len(results)
    Console(highlight=False, width=width).print(table)
    if any(r.mode == "lean" for r in results):
        console.print("Recordings were lean where full ones would not have fitted into memory.")


@app.command()
def plan(
    tokens: Annotated[int, typer.Argument(help="The length of the text.")],
    model: _Model = None,
    max_memory: _MaxMemory = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A config.json, or its directory: on paper, without the weights."),
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option("--device-memory", help="With --config: what the GPU has, 80GB.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="With --config: of the weights.")] = "bfloat16",
) -> None:
    """State the memory and the time that a text of some length takes; fail where it cannot fit."""
    from .memory import parse_bytes

    console = Console(highlight=False, soft_wrap=True)
    if max_memory is not None:
        parse_bytes(max_memory, "--max-memory")
    if config is None:
        if device_memory is not None:
            raise ValueError("--device-memory: goes with --config")
        tracer = _open(model, "auto", max_memory)
        limit = tracer.decoder.max_length
        if limit is not None and tokens > limit:
            raise ValueError(f"tokens: {tokens} is more than the model's context of {limit}")
        console.print(str(tracer.plan(tokens)))
        return
    if model is not None or max_memory is not None:
        raise ValueError("--config: goes with --device-memory and --dtype alone")
    import torch
    from transformers import AutoConfig

    from .plan import plan_for

    if dtype not in _DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    if not config.exists():
        raise ValueError(f"--config: no file or directory {str(config)!r}")
    room = None if device_memory is None else parse_bytes(device_memory, "--device-memory")
    try:
        read = AutoConfig.from_pretrained(config)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--config: {config} cannot be read: {reason}") from error
    found = plan_for(read, tokens, device_memory=room, dtype=getattr(torch, dtype))
    console.print(str(found))
    if room is not None:
        from .memory import describe_bytes

        console.print(f"  fits into {describe_bytes(room)}")


@app.command()
def survey(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Text, JSONL and Parquet files, folders of them, or hf:NAME; CORPUS=INPUT to name "
            "the corpus."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The directory to write.")],
    model: _Model = None,
    label_by: Annotated[
        list[str] | None,
        typer.Option(
            "--label-by",
            help="Keep a field of the records with each token: NAME or NAME=FIELD, several by "
            "commas; corpus=FIELD tells corpora apart.",
        ),
    ] = None,
    thresholds: Annotated[
        str, typer.Option("--thresholds", help="Of the graphs, ascending, by commas.")
    ] = "0.01,0.02,0.04,0.08",
    text_field: Annotated[
        str, typer.Option("--text-field", help="The field of a record that holds its text.")
    ] = "text",
    split: Annotated[
        str, typer.Option(help="What a document of a text file is: file, paragraph or line.")
    ] = "file",
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="Cut what is longer; default 2048, or the context."),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", help="Tokens of a forward pass.")
    ] = None,
    window_tokens: Annotated[
        int, typer.Option("--window-tokens", help="Tokens of a part, which is resumed as a whole.")
    ] = 16384,
    engine: Annotated[str, typer.Option(help="local, or ray: an actor a GPU or CPU share.")] = (
        "local"
    ),
    workers: Annotated[int | None, typer.Option(help="With --engine ray: actors.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an interrupted run has left.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first problem.")] = False,
    impl: _Impl = "auto",
    device_map: Annotated[
        str | None,
        typer.Option("--device-map", help="Where the model goes: cuda:0, or auto for several."),
    ] = None,
    with_report: Annotated[
        bool, typer.Option("--report", help="And the report of it (see ifr-fast report).")
    ] = False,
) -> None:
    """Score every prediction of whole corpora, and write what came of it as Parquet."""
    from .survey.command import run

    run(
        inputs, out, model=model, label_by=label_by or [], thresholds=thresholds,
        text_field=text_field, split=split, max_tokens=max_tokens, batch_tokens=batch_tokens,
        window_tokens=window_tokens, engine=engine, workers=workers, resume=resume, strict=strict,
        impl=impl, device_map=device_map,
    )  # fmt: skip
    if with_report:
        report(out)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A survey's directory.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to; default: report/ in it.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="The label of parts of speech; default pos.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", "-t", help="At which frequencies are compared.")
    ] = None,
    contrast: Annotated[
        list[str] | None, typer.Option(help="Two corpora of prompts, as in FIRST:SECOND.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
) -> None:
    """Analyse a survey: one page with figures and tables, for a paper's appendix."""
    from .survey import report as reports

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
    Console(stderr=True).print(Text(f"wrote {printable(str(written.path))}"), soft_wrap=True)


@app.command()
def circuits(
    out: Annotated[Path, typer.Option(help="A folder for tables, figures and the report.")],
    task: Annotated[str, typer.Option(help="ioi or greater-than.")] = "ioi",
    model: _Model = None,
    prompts: Annotated[int, typer.Option("--prompts", "-n", help="How many to make.")] = 50,
    seed: Annotated[int, typer.Option(help="Of prompts, random graphs and intervals.")] = 0,
    threshold: Annotated[
        float, typer.Option("--threshold", "-t", help="Of the routes compared with patching.")
    ] = 0.01,
    draws: Annotated[int, typer.Option(help="Random graphs a prompt.")] = 20,
    patch_prompts: Annotated[
        int | None,
        typer.Option("--patch-prompts", help="Patch the first so many; default all."),
    ] = None,
    keep_prompts: Annotated[
        int | None,
        typer.Option("--keep-prompts", help="Ablate the first so many; default as patched."),
    ] = None,
    keep_threshold: Annotated[
        list[float] | None,
        typer.Option(help="Of the graphs that are kept; may be given again. Default: six."),
    ] = None,
    cost_prompts: Annotated[
        int, typer.Option("--cost-prompts", help="Prompts to patch position by position.")
    ] = 5,
    input_prompts: Annotated[
        int, typer.Option("--input-prompts", help="Prompts whose tokens are deleted.")
    ] = 20,
    impl: _Impl = "auto",
) -> None:
    """Compare a task's routes with activation patching, and see how faithful they are.

    With the default model on two cores all of it takes about an hour, and a tenth of that with
    --prompts 5. The same command goes on where it was interrupted.
    """
    from .circuits.report import Settings, make_report
    from .graph import check_threshold

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
    check_threshold(threshold)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file; expected a folder to write")
    tracer = _open(model, impl)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {out} cannot be made ({error.strerror})") from error
    make_report(tracer, out, settings, model_name=model)
    Console(highlight=False, soft_wrap=True).print(Text((out / "report.md").read_text()))


@app.command()
def doctor(
    impl: Annotated[str, typer.Option(help="An implementation to ask about.")] = "auto",
) -> None:
    """Say what is installed, which implementation would run and why, and where models are kept."""
    import torch

    from .pretrained import DEFAULT_NAME, cache_dir, default_model_dir
    from .scoring import IMPLEMENTATIONS, explain_impl

    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"--impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("ifr-fast", __version__)
    table.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    for package in ("torch", "transformers", "triton", "safetensors", "numpy"):
        table.add_row(package, _installed(package))
    for extra, packages in {
        "default-model": ("gguf", "accelerate"),
        "plot": ("matplotlib",),
        "networkx": ("networkx",),
        "tables": ("pandas", "pyarrow"),
        "survey": ("pyarrow",),
        "report": ("matplotlib", "scipy", "sklearn"),
        "ray": ("ray",),
        "circuits": ("matplotlib", "captum", "flashtrace"),
    }.items():
        missing = [p for p in packages if find_spec(p) is None]
        state = f"missing {', '.join(missing)}: pip install 'ifr-fast[{extra}]'"
        table.add_row(f"extra {extra}", state if missing else "installed")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    table.add_row("GPU", cuda)
    table.add_row(
        "CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        table.add_row(f"on {device}", explain_impl(impl, torch.device(device)))
    table.add_row("cache", str(cache_dir()))
    present = (default_model_dir() / "config.json").is_file()
    state = "in the cache" if present else "fetched on first use (93 MB)"
    table.add_row("default model", f"{DEFAULT_NAME}, {state}")
    width = None if sys.stdout.isatty() else 1000  # in a pipe, a row is a line
    Console(highlight=False, width=width).print(table)


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _read(text: str | None, file: Path | None, chat: Path | None) -> Any:
    given = [x for x in (text, file, chat) if x is not None]
    if len(given) > 1:
        raise ValueError("text: give one of TEXT, --file and --chat")
    if file is not None:
        return _decode(_read_bytes("--file", file), str(file))
    if chat is not None:
        raw = _read_stdin() if str(chat) == "-" else _read_bytes("--chat", chat)
        try:
            messages = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--chat: {chat} is not JSON ({error})") from error
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise ValueError("--chat: expected a JSON list of {role, content}")
        return messages
    if text == "-":
        return _decode(_read_stdin(), "standard input")
    return DEMO_TEXT if text is None else text


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise ValueError("text: standard input is closed")
    return _whole(sys.stdin.buffer, "standard input")


def _read_bytes(option: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return _whole(file, f"{option}: {path}")
    except OSError as error:
        raise ValueError(f"{option}: {path} cannot be read ({error.strerror})") from error


def _whole(file: IO[bytes], name: str) -> bytes:
    """All of a file, which may be a pipe or a device without an end."""
    raw = file.read(_LONGEST_TEXT + 1) or b""  # None where a pipe does not wait and has nothing
    if len(raw) > _LONGEST_TEXT:
        raise ValueError(
            f"{name} has more than {_LONGEST_TEXT >> 20} MiB; expected a text that a model can read"
        )
    return raw


def _decode(raw: bytes, name: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {name} is not UTF-8 ({error})") from error


def _check_outputs(options: dict[str, Path | None]) -> list[Path]:
    """The paths given. Says what cannot be written before the work is done, not after."""
    chosen = {option: path for option, path in options.items() if path is not None}
    option_of: dict[str, str] = {}
    for option, path in chosen.items():
        if path == _STDOUT:
            other = option_of.setdefault("-", option)
            if other != option:
                raise ValueError(f"{option}: standard output is what {other} writes to")
            continue
        if path.is_dir():
            raise ValueError(f"{option}: {path} is a directory; expected a file to write")
        if path.exists() and not path.is_file():  # written to, not replaced (storage.py)
            if not os.access(path, os.W_OK):
                raise ValueError(f"{option}: {path} cannot be written to")
            continue
        target = os.path.realpath(path)
        folder = os.path.dirname(target)
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise ValueError(f"{option}: {path}: {folder} is no directory that can be written to")
        other = option_of.setdefault(target, option)
        if other != option:
            raise ValueError(f"{option}: {path} is what {other} writes; expected another file")
    return list(chosen.values())


def _check_recording(path: Path, outputs: list[Path]) -> None:
    """Says what a recording cannot be kept in, before the model is opened."""
    if path.exists() and not path.is_file():
        raise ValueError(f"--recording: {path} is no file that a recording can be kept in")
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if not path.exists() and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise ValueError(f"--recording: {path}: {folder} is no directory that can be written to")
    if any(os.path.realpath(output) == target for output in outputs):
        raise ValueError(
            f"--recording: {path} is to be written as an output; expected another file"
        )


@contextmanager
def _target(path: Path) -> Iterator[Path]:
    """Where to write: the path, or for '-' a file whose content then goes to standard output."""
    if path != _STDOUT:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "output"
        yield whole
        sys.stdout.flush()
        sys.stdout.buffer.write(whole.read_bytes())


def _say_written(outputs: list[Path]) -> None:
    console = Console(stderr=True)
    for path in outputs:
        if path != _STDOUT:
            console.print(Text(f"wrote {printable(str(path))}"), soft_wrap=True)


def _open(model: str | None, impl: str, max_memory: str | None = None) -> Tracer:
    console = Console(stderr=True)
    with console.status("loading the model") if console.is_terminal else nullcontext():
        from .tracer import Tracer
    from .pretrained import default_model

    if model is None:
        default_model()  # prints its own progress
    with console.status("loading the model") if console.is_terminal else nullcontext():
        return Tracer.from_pretrained(model, impl=impl, max_memory=max_memory)


def _write(graph: RouteGraph, tracer: Tracer, paths: dict[str, Path | None]) -> None:
    from .storage import whole_file, write_text

    def png(file: Path) -> None:
        figure = graph.plot()
        with whole_file(file) as temporary:
            figure.savefig(temporary, format="png", dpi=150)

    def neuronpedia(file: Path) -> None:
        scan = Path(tracer.model.config.name_or_path).name.lower()
        write_text(file, graph.to_neuronpedia(scan=scan or "unknown"))

    writers: dict[str, Callable[[Path], object]] = {
        "--json": lambda file: write_text(file, graph.to_json()),
        "--html": lambda file: write_text(file, graph.to_html()),
        "--png": png,
        "--save": graph.save,
        "--graphml": lambda file: write_text(file, graph.to_graphml()),
        "--dot": lambda file: write_text(file, graph.to_dot()),
        "--parquet": graph.to_parquet,
        "--neuronpedia": neuronpedia,
    }
    for option, path in paths.items():
        if path is not None:
            with _target(path) as file:
                writers[option](file)


def _quote(token: str) -> str:
    return f"“{printable(token)}”"


def _print_graph(graph: RouteGraph, n_routes: int) -> None:
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())

    def line(*parts: str | tuple[str, str]) -> None:
        console.print(Text.assemble(*parts))

    def name(position: int) -> str:
        return f"{_quote(graph.tokens[position])}@{position}"

    if graph.span is None:
        first, *rest = graph.predictions
        line("after ", (name(graph.position), "bold"), " the model predicts ",
             (_quote(first.token), "bold green"), f" ({first.probability:.2f})")  # fmt: skip
        others = ", ".join(f"{_quote(p.token)} {p.probability:.2f}" for p in rest)
        line((f"  then {others}", "dim"))
    else:
        line((f"{len(graph.span.positions)} predictions", "bold"), ", taken together")
        for position, (first, *_) in zip(graph.span.positions, graph.span.predictions, strict=True):
            line("  after ", name(position), " ", (_quote(first.token), "bold green"),
                 f" ({first.probability:.2f})")  # fmt: skip
    n_edges, T = len(graph.edges.layer), len(graph.tokens)
    line((f"  {n_edges} edge{'s'[:n_edges != 1]} above {graph.threshold:g} among {T} "
          f"token{'s'[:T != 1]} and {graph.n_layers} layers", "dim"))  # fmt: skip
    if graph.unattributed:
        line((f"  {len(graph.unattributed)} nodes are unattributed: no part moved them towards "
              "what they are", "yellow"))  # fmt: skip
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


def _describe(source: int, hops: list[Hop], name: Any) -> str:
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
