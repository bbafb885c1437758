"""Others that compute information flow routes, beside ifr_fast, in one run on one text.

- The materializing oracle (kernels/reference.py) in float32: the published tool's arithmetic, every
  part formed, all rows of all layers; nothing is extrapolated. It forms them a row at a time,
  [S, H, D], where that tool forms a layer's at once. At 128 tokens only, unless told otherwise.
- FlashTrace, flashtrace==0.1.1: `compute_ifr_for_all_positions`, and `compute_ifr_for_position` at
  the last one, with chunk_tokens=128, sink_chunk_tokens=32 and its other defaults. Its forward pass
  and the attention weights that it takes from there by default are had before and not counted, nor
  is its copy of the model's weights; ours counts making the attention weights again. It yields sums
  over layers, or a layer's totals, and no graph.

Ours is `Tracer.trace_all` of a recording beside what scores all positions, and `Tracer.trace` of a
recording beside what scores one. The unit is the plain forward pass of the same run. What takes
seconds is timed in turn, --repeat rounds; the slow ones --slow-repeat rounds of their own.

No ratio is printed unless the values agree, and the exit status is then 1. Compared with the
oracle: residual, FFN and heads' totals and every token edge of all layers, at keep = 0. With
FlashTrace, whose definitions are the same: the means over layers of all token, head and residual
importances of all positions.

    pip install -e '.[bench]'
    python bench/peers/peers.py              # the oracle at 128 tokens, FlashTrace at 128 and 512
    python bench/peers/peers.py --lengths 128 --slow-repeat 3
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ifr_fast import LayerScores, Recording, Tracer
from ifr_fast.benchmark import (
    THRESHOLD,
    first_tokens,
    in_turn,
    machine,
    plain_forward,
    prose,
    subject,
)
from ifr_fast.circuits.inputs import flashtrace_arguments
from ifr_fast.model.pretrained import load

TOLERANCE = 1e-4  # of importances, which lie between 0 and 1; all sides compute in float32


class Peer(NamedTuple):
    """A way to attribute, ready to run."""

    name: str
    yields: str
    job: Callable[[], object]
    slow: bool
    ours: str  # the name of our row that it is compared with
    deviation: Callable[[], float]  # largest, of its importances from ours


class Row(NamedTuple):
    """One line of the table."""

    n_tokens: int
    method: str
    yields: str
    rounds: int
    seconds: float
    units: float
    deviation: float | None  # None for ours
    ratio: float | None  # its seconds over ours; None for ours and where values disagree


def dense(scores: LayerScores, n_tokens: int) -> Tensor:
    """Token importances [T, T] of a layer scored at all rows with keep = 0."""
    edges = scores.token_edges
    matrix = edges.weight.new_zeros(n_tokens, n_tokens)
    return matrix.index_put_((edges.target, edges.source), edges.weight)


def largest(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
    return max(float((ours.cpu() - theirs.cpu()).abs().max()) for ours, theirs in pairs)


def oracle(tracer: Tracer, recording: Recording) -> Peer:
    """Every part formed, in float32."""
    reference = Tracer(tracer.model, tracer.tokenizer, impl="reference")
    again, T = reference.record(recording.token_ids), len(recording)

    def compared() -> Iterator[tuple[Tensor, Tensor]]:
        of_ours, of_theirs = (
            tracer.contributions(recording, keep=0),
            reference.contributions(again, keep=0),
        )
        for ours, theirs in zip(of_ours, of_theirs, strict=True):
            for name in ("residual", "ffn", "head_total"):
                yield getattr(ours, name), getattr(theirs, name)
            yield dense(ours, T), dense(theirs, T)

    return Peer(
        "materializing oracle, all positions",
        "graphs, with heads",
        lambda: reference.trace_all(again, threshold=THRESHOLD),
        True,
        "all positions",
        lambda: largest(compared()),
    )


def flashtrace(tracer: Tracer, recording: Recording) -> list[Peer]:
    """FlashTrace at all positions, and at the last one."""
    from flashtrace import core

    if not isinstance(core.tqdm, functools.partial):
        core.tqdm = functools.partial(core.tqdm, disable=True)  # no bar at every call
    T, L = len(recording), tracer.decoder.n_layers
    given = flashtrace_arguments(tracer.model, recording.token_ids)
    found: list[Any] = []  # the last result, so that the gate need not compute it again

    def all_positions() -> None:
        found[:] = [core.compute_ifr_for_all_positions(**given)]

    def last_position() -> Any:
        return core.compute_ifr_for_position(focus_idx=T - 1, **given)

    def means() -> tuple[Tensor, Tensor, Tensor]:
        """Ours: tokens [T, T], heads [T, H] and residual [T], averaged over layers."""
        H = tracer.decoder.n_heads
        tokens, heads, residual = torch.zeros(T, T), torch.zeros(T, H), torch.zeros(T)
        for scores in tracer.contributions(recording, keep=0):
            tokens += dense(scores, T).cpu() / L
            heads += scores.head_total.cpu() / L
            residual += scores.residual.cpu() / L
        return tokens, heads, residual

    def deviation_of_all() -> float:
        theirs = found[0]
        sums = (
            theirs.token_importance_matrix,
            theirs.head_importance_matrix,
            theirs.resid_attn_fraction_total,
        )
        return largest((a, b / L) for a, b in zip(means(), sums, strict=True))

    def deviation_of_last() -> float:
        theirs = last_position()
        tokens, heads, _ = means()
        sums = (theirs.token_importance_total, theirs.head_importance_total)
        ours = (tokens[-1], heads[-1])
        return largest((a, b / L) for a, b in zip(ours, sums, strict=True))

    return [
        Peer(
            "FlashTrace, all positions",
            "no graph; tokens and heads, summed over layers",
            all_positions,
            True,
            "all positions",
            deviation_of_all,
        ),
        Peer(
            "FlashTrace, one position",
            "no graph; tokens and heads of each layer",
            last_position,
            False,
            "one position",
            deviation_of_last,
        ),
    ]


def compare(
    tracer: Tracer, token_ids: Tensor, with_oracle: bool, repeat: int, slow_repeat: int
) -> list[Row]:
    """Every way to attribute, on one text; ours first."""
    recording = tracer.record(token_ids)
    peers = flashtrace(tracer, recording)
    if with_oracle:
        peers.append(oracle(tracer, recording))
    quick: dict[str, Callable[[], object]] = {
        "forward": plain_forward(tracer.model, token_ids),
        "all positions": lambda: tracer.trace_all(recording, threshold=THRESHOLD),
        "one position": lambda: tracer.trace(recording, threshold=THRESHOLD),
        **{peer.name: peer.job for peer in peers if not peer.slow},
    }
    slow = {peer.name: peer.job for peer in peers if peer.slow}
    seconds = in_turn(quick, repeat)
    # No warm-up round, which would take as long: the quick ones have warmed up the rest.
    seconds |= in_turn(slow, slow_repeat, warm_up=False)
    unit = seconds["forward"]
    T = len(token_ids)
    rows = [
        Row(T, f"ifr_fast, {name}", yields, repeat, seconds[name], seconds[name] / unit, None, None)
        for name, yields in (
            ("all positions", "graphs, with heads"),
            ("one position", "graph, with heads"),
        )
    ]
    for peer in peers:
        took, deviation = seconds[peer.name], peer.deviation()
        rows.append(
            Row(
                T,
                peer.name,
                peer.yields,
                slow_repeat if peer.slow else repeat,
                took,
                took / unit,
                deviation,
                took / seconds[peer.ours] if deviation <= TOLERANCE else None,
            )
        )
    return rows


def table_of(rows: list[Row], title: str) -> Table:
    table = Table(title=title)
    for column in ("T", "method", "yields", "rounds", "seconds", "units", "deviation", "ratio"):
        left = column in ("method", "yields")
        table.add_column(column, justify="left" if left else "right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        ours = row.deviation is None
        ratio = "VALUES DISAGREE" if row.ratio is None else f"{row.ratio:,.1f}"
        table.add_row(
            str(row.n_tokens),
            row.method,
            row.yields,
            str(row.rounds),
            f"{row.seconds:.3f}",
            f"{row.units:.3f}",
            "" if ours else f"{row.deviation:.1e}",
            "" if ours else ratio,
            end_section=following is None or following.n_tokens != row.n_tokens,
        )
    return table


def main() -> None:
    """Parses the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="Hub name or directory, Llama-style; default SmolLM2")
    parser.add_argument("--impl", default="auto", help="of ours")
    parser.add_argument("--device", default="cpu", help="cuda, for one")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--oracle-lengths", type=int, nargs="*", default=[128])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--slow-repeat", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    args = parser.parse_args()
    try:
        version = metadata.version("flashtrace")
    except metadata.PackageNotFoundError as error:
        raise SystemExit("flashtrace is missing: pip install -e '.[bench]'") from error

    model, tokenizer = load(args.model)
    tracer = Tracer(model.to(args.device), tokenizer, impl=args.impl)
    lengths = sorted(set(args.lengths))
    try:
        token_ids = first_tokens(prose(), tracer.tokenizer, lengths[-1])
    except ValueError as error:
        raise SystemExit(f"--lengths: {error}") from error
    rows: list[Row] = []
    for T in lengths:
        Console(stderr=True).print(f"{T} tokens")
        with_oracle = T in args.oracle_lengths
        rows += compare(tracer, token_ids[:T], with_oracle, args.repeat, args.slow_repeat)
    on, of = machine(tracer.decoder.device), subject(tracer)
    title = (
        f"{of.model}, {of.dtype}, impl {of.impl}, {on.processor}, {on.threads} threads, "
        f"torch {on.torch}, transformers {on.transformers}, flashtrace {version}"
    )
    out = Console(width=None if Console().is_terminal else 160)
    out.print(table_of(rows, title))
    out.print(
        "Units are plain forward passes. Ratio: its seconds over ours for as many positions. "
        f"Deviation: of importances, at most {TOLERANCE:g} is granted."
    )
    if args.json is not None:
        document = {
            "machine": on._asdict(),
            "subject": of._asdict(),
            "flashtrace": version,
            "results": [row._asdict() for row in rows],
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if any(row.deviation is not None and row.ratio is None for row in rows):
        raise SystemExit("values disagree: no speed-up is reported for what deviates")


if __name__ == "__main__":
    main()
