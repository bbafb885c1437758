"""What attribution costs on top of the forward pass, on this machine.

The unit is one warm plain forward pass of the same text (sdpa, inference_mode, no cache, last
logits only), timed in the same run, in turn with everything else; figures are medians.

    python bench/run.py                          # the table of the README
    python bench/run.py --lengths 512 --impl eager --repeat 9
"""

from __future__ import annotations

import argparse
import json
import platform
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from ifr_fast import Tracer
from ifr_fast.pretrained import load


def real_text(tracer: Tracer, n_tokens: int) -> torch.Tensor:
    """Token ids [n_tokens] of English prose from Python's own documentation."""
    topics = pydoc_data.topics.topics
    ids = tracer.tokenizer("\n".join(topics[k] for k in sorted(topics)))["input_ids"]  # type: ignore[misc]
    if n_tokens > len(ids):
        raise SystemExit(f"--lengths: there are {len(ids)} tokens of text, got {n_tokens}")
    return torch.tensor(ids[-n_tokens:])


def in_turn(jobs: dict[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Median seconds of each job, after one run each that is not counted; A B A B ..."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(repeat):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(tracer: Tracer, n_tokens: int, repeat: int) -> dict[str, float]:
    """Seconds of a plain forward pass and of each use of the tracer on the same text."""
    token_ids = real_text(tracer, n_tokens)
    ids = token_ids[None].to(tracer.model.device)

    @torch.inference_mode()
    def plain() -> Any:
        return tracer.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    recording = tracer.record(token_ids)
    jobs: dict[str, Callable[[], Any]] = {
        "forward": plain,
        "record": lambda: tracer.record(token_ids),
        "trace": lambda: tracer.trace(token_ids),
        "route of a recording": lambda: tracer.trace(recording),
        "trace_all": lambda: tracer.trace_all(token_ids),
    }
    seconds = in_turn(jobs, repeat)
    graph = tracer.trace(recording)
    seconds["edges"] = float(len(graph.edges.layer))
    return seconds


def main() -> None:
    """Parses the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="Hub name or directory; default SmolLM2")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the seconds to a file")
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    tracer = Tracer(model, tokenizer, impl=args.impl)
    table = Table(
        title=f"{tracer.impl}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    for column in ("T", "forward (s)", "record", "trace", "route of a recording", "trace_all"):
        table.add_column(column, justify="right")
    results = {}
    for n_tokens in args.lengths:
        seconds = results[n_tokens] = measure(tracer, n_tokens, args.repeat)
        unit = seconds["forward"]
        columns = ("record", "trace", "route of a recording", "trace_all")
        table.add_row(
            str(n_tokens), f"{unit:.3f}", *(f"{seconds[c] / unit:.2f}" for c in columns)
        )
    Console().print(table)
    Console().print("All but the first two columns are in units of the plain forward pass.")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
