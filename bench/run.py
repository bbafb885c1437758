"""The cost of attribution on top of the forward pass, on this machine.

The unit is one warm plain forward pass of the same text (sdpa, inference_mode, no cache, last
logits only), timed in the same run, in turn with everything else; figures are medians. What each
column means is said in ifr_fast/benchmark.py.

    python bench/run.py                                   # 128 and 512 tokens
    python bench/run.py --lengths 128 512 2048 8192 --plot cost.png --json cost.json
    python bench/run.py --lengths 512 --memory --threads-scaling
"""

from __future__ import annotations

import argparse
import json
import textwrap
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ifr_fast import Tracer
from ifr_fast.benchmark import (
    THRESHOLD,
    Throughput,
    first_tokens,
    in_turn,
    measure,
    memory_use,
    plain_forward,
    prose,
    report,
)
from ifr_fast.recording.layer_inputs import layer_inputs
from ifr_fast.recording.recording import Recording, RecordingMode

# Coordinates visited per node over D, on the default model and rows from the second half of a
# text, as measured before there was a kernel (docs/design.md, section 3.1).
DESIGN_VISITED = {512: 8.7, 2048: 6.0, 8192: 7.1}
KEEP = 0.01  # of the memory figures


class KernelWork(NamedTuple):
    """Work of the native kernel when it scores all rows of all layers."""

    n_tokens: int
    seconds: dict[str, float]  # by stage, summed over layers; of all threads, over their number
    pairs_per_node: float
    listed_per_node: float  # pairs with lin > 0 and a coordinate that can flip
    visited_per_node: float  # coordinates, in multiples of D
    visited_second_half: float  # coordinates of rows in the second half of the text


class RecordingMemory(NamedTuple):
    """Bytes that one way of recording holds, and what scoring adds to it."""

    n_tokens: int
    mode: str
    formula: int  # the tensors that it needs
    holds: int  # as the recording counts
    resident: int | None  # as the system counts, once the forward pass is over
    one_layer: int | None  # added at its peak by `contributions`, each layer's scores dropped
    all_layers: int | None  # added likewise with all layers' scores held


def kernel_work(tracer: Tracer, token_ids: Tensor) -> KernelWork:
    """Scores all rows of each layer once with the native kernel, and the second half once more."""
    from ifr_fast.kernels.cpu import kernel

    recording = tracer.record(token_ids, mode=RecordingMode.FULL)
    T, L = len(token_ids), tracer.decoder.n_layers
    everything, second_half = torch.arange(T), torch.arange(T // 2, T)
    all_rows: list[kernel.Counters] = []
    of_half: list[kernel.Counters] = []
    for layer in range(L):
        for rows, counters in ((everything, all_rows), (second_half, of_half)):
            inputs = layer_inputs(recording, layer, rows).inputs
            counters.append(kernel.score_attention_counted(inputs, THRESHOLD)[1])
    D = tracer.decoder.d_model
    return KernelWork(
        T,
        {
            stage: sum(c.seconds[stage] for c in all_rows) / torch.get_num_threads()
            for stage in kernel.STAGES
        },
        sum(c.pairs for c in all_rows) / (T * L),
        sum(c.listed for c in all_rows) / (T * L),
        sum(c.visited for c in all_rows) / (T * L * D),
        sum(c.visited for c in of_half) / (len(second_half) * L * D),
    )


def memory(tracer: Tracer, token_ids: Tensor, mode: RecordingMode) -> RecordingMemory:
    """Records and scores a text once."""
    device = tracer.decoder.device
    recorded = memory_use(lambda: tracer.record(token_ids, mode=mode), device)
    recording = recorded.result

    def drop_each() -> None:
        for _ in tracer.contributions(recording, keep=KEEP):
            pass

    one_layer = memory_use(drop_each, device).added
    all_layers = memory_use(lambda: list(tracer.contributions(recording, keep=KEEP)), device).added
    return RecordingMemory(
        len(token_ids),
        mode.value,
        formula_bytes(tracer, recording),
        recording.nbytes,
        recorded.held,
        one_layer,
        all_layers,
    )


def formula_bytes(tracer: Tracer, recording: Recording) -> int:
    """Lean: resid_pre, k and v of every layer; full: and resid_mid, q and the log-sum-exp."""
    decoder, (T, H_kv, K) = tracer.decoder, recording.layers[0].k.shape
    H, V, D = decoder.n_heads, decoder.d_head, decoder.d_model
    values = D + H_kv * (K + V)
    if recording.mode is RecordingMode.FULL:
        values += D + H * K + H
    return values * T * decoder.n_layers * recording.layers[0].k.element_size()


def threads_scaling(
    tracer: Tracer, token_ids: Tensor, threads: list[int], repeat: int
) -> dict[str, dict[int, float]]:
    """Median seconds of the forward pass and of scoring all positions, by number of threads."""
    recording = tracer.record(token_ids)
    forward = plain_forward(tracer.model, token_ids)

    def on(n: int, job: Any) -> None:
        torch.set_num_threads(n)
        job()

    def score() -> None:
        tracer.trace_all(recording, threshold=THRESHOLD)

    before = torch.get_num_threads()
    jobs = {
        f"{name} {n}": partial(on, n, job)
        for n in threads
        for name, job in (("forward", forward), ("scoring", score))
    }
    try:
        seconds = in_turn(jobs, repeat)
    finally:
        torch.set_num_threads(before)
    return {name: {n: seconds[f"{name} {n}"] for n in threads} for name in ("forward", "scoring")}


def megabytes(n: int | None) -> str:
    return "?" if n is None else f"{n / 1e6:,.1f}"


def right_table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def cost_table(title: str, results: list[Throughput]) -> Table:
    table = right_table(
        title,
        "T",
        "forward (s)",
        "record",
        "one route",
        "all routes",
        "trace",
        "trace_all",
        "tokens/s",
        "Mpairs/s",
        "scoring adds (MB)",
        "peak (MB)",
    )
    for r in results:
        table.add_row(
            str(r.n_tokens),
            f"{r.forward_seconds:.3f}",
            f"{r.units('record'):.3f}",
            f"{r.units('route'):.4f}",
            f"{r.units('scoring'):.3f}",
            f"{r.units('trace'):.3f}",
            f"{r.units('trace_all'):.3f}",
            f"{r.tokens_per_second:,.0f}",
            f"{r.pairs_per_second / 1e6:,.1f}",
            megabytes(r.scoring_bytes),
            megabytes(r.peak_bytes),
        )
    return table


def work_table(results: list[Throughput], works: list[KernelWork]) -> Table:
    table = right_table(
        "the native kernel on all rows: stages in units",
        "T",
        *works[0].seconds,
        "pairs/node",
        "listed/node",
        "visited/node",
        "in the 2nd half",
        "design.md",
    )
    for r, work in zip(results, works, strict=True):
        expected = DESIGN_VISITED.get(work.n_tokens)
        table.add_row(
            str(work.n_tokens),
            *(f"{seconds / r.forward_seconds:.3f}" for seconds in work.seconds.values()),
            f"{work.pairs_per_node:,.0f}",
            f"{work.listed_per_node:,.0f}",
            f"{work.visited_per_node:.1f} D",
            f"{work.visited_second_half:.1f} D",
            "" if expected is None else f"{expected} D",
        )
    return table


def memory_table(rows: list[RecordingMemory]) -> Table:
    table = right_table(
        f"memory in MB, keep = {KEEP}",
        "T",
        "mode",
        "formula",
        "recording",
        "resident",
        "scoring, a layer at a time",
        "scoring, all layers held",
    )
    for row in rows:
        table.add_row(
            str(row.n_tokens),
            row.mode,
            megabytes(row.formula),
            f"{megabytes(row.holds)} ({row.holds / row.formula:.2f} x)",
            megabytes(row.resident),
            megabytes(row.one_layer),
            megabytes(row.all_layers),
        )
    return table


def scaling_table(by_length: dict[int, dict[str, dict[int, float]]]) -> Table:
    threads = list(next(iter(by_length.values()))["scoring"])
    columns = [f"{name}, {n} threads (s)" for name in ("forward", "scoring") for n in threads]
    table = right_table("threads", "T", *columns, "forward ratio", "scoring ratio")
    for T, of in by_length.items():
        table.add_row(
            str(T),
            *(f"{of[name][n]:.3f}" for name in ("forward", "scoring") for n in threads),
            *(f"{of[name][threads[0]] / of[name][threads[-1]]:.2f}" for name in of),
        )
    return table


def plot(results: list[Throughput], title: str, path: Path) -> None:
    """Cost in units against T, both logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    labels = {
        "route": "one route of a recording",
        "scoring": "all routes of a recording",
        "record": "record",
        "trace": "trace, end to end",
        "trace_all": "trace_all, end to end",
    }
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    lengths = [r.n_tokens for r in results]
    for name, label in labels.items():
        axes.plot(lengths, [r.units(name) for r in results], marker="o", label=label)
    axes.axhline(1, color="gray", linewidth=0.8, linestyle="--", label="plain forward pass")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(T) for T in lengths])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("cost (plain forward passes)")
    axes.set_title("\n".join(textwrap.wrap(title, 90)), fontsize="small")
    axes.grid(which="both", linewidth=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Parses the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="Hub name or directory; default SmolLM2")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--start", type=int, default=0, help="tokens of the prose to pass over")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    parser.add_argument("--plot", type=Path, help="draw cost against T into a file")
    parser.add_argument("--memory", action="store_true", help="memory of both modes of recording")
    parser.add_argument(
        "--threads-scaling", action="store_true", help="time 1 thread against all of them"
    )
    args = parser.parse_args()

    console = Console(stderr=True)
    tracer = Tracer.from_pretrained(args.model, impl=args.impl)
    lengths = sorted(set(args.lengths))
    try:
        token_ids = first_tokens(prose(), tracer.tokenizer, args.start + lengths[-1])[args.start :]
    except ValueError as error:
        raise SystemExit(f"--start, --lengths: {error}") from error
    results: list[Throughput] = []
    works: list[KernelWork] = []
    memories: list[RecordingMemory] = []
    scaling: dict[int, dict[str, dict[int, float]]] = {}
    for T in lengths:
        ids = token_ids[:T]
        console.print(f"{T} tokens")
        results.append(measure(tracer, ids, repeat=args.repeat))
        if tracer.impl == "cpu":
            works.append(kernel_work(tracer, ids))
        if args.memory:
            memories += [memory(tracer, ids, mode) for mode in RecordingMode]
        if args.threads_scaling:
            threads = [1, torch.get_num_threads()]
            if threads[1] == 1:
                raise SystemExit("--threads-scaling: this process has one thread")
            scaling[T] = threads_scaling(tracer, ids, threads, args.repeat)

    document = report(tracer, results) | {
        "kernel": [work._asdict() for work in works],
        "memory": [row._asdict() for row in memories],
        "threads": scaling,
    }
    on, of = document["machine"], document["subject"]
    title = (
        f"{of['model']}, {of['dtype']}, impl {of['impl']}, {on['processor']}, {on['threads']} "
        f"threads, torch {on['torch']}, transformers {on['transformers']}, Python {on['python']}"
    )
    out = Console(width=None if Console().is_terminal else 160)
    out.print(cost_table(title, results))
    out.print(
        "All but the first two columns, the rates and the sizes are in units of the plain forward "
        "pass; record, trace and trace_all include one of their own."
    )
    if works:
        out.print(work_table(results, works))
    if memories:
        out.print(memory_table(memories))
    if scaling:
        out.print(scaling_table(scaling))
    if args.json is not None:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.plot is not None:
        plot(results, title, args.plot)


if __name__ == "__main__":
    main()
