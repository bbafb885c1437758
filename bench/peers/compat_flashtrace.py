"""FlashTrace's face on this engine beside FlashTrace itself, call against call.

Both sides run `FlashTrace(...).trace(...)` on the same text with the same model: tokenization,
forward pass, scores, result. The package (flashtrace==0.1.1, its defaults) runs the model with
eager attention, without which it cannot; ours with sdpa. Ours opens the model when `FlashTrace` is
made; how long that took, once a model, is said apart.

- ifr-matrix: a prompt of one token, and everything after it as target, so that all positions are
  scored. One round of theirs by default: it is a minute at 512 tokens.
- ifr-span, flashtrace: the second half of the text as target, in turn with ours.

No ratio is printed unless scores agree within 1e-4 of the largest, and the exit status is then 1.

    pip install -e '.[bench]'
    python bench/peers/compat_flashtrace.py
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from ifr_fast.benchmark import first_tokens, in_turn, machine, prose, subject
from ifr_fast.compat.flashtrace import FlashTrace
from ifr_fast.model.pretrained import load

TOLERANCE = 1e-4  # of scores, relative to the largest


class Row(NamedTuple):
    """One line of the table; times in seconds, medians."""

    method: str
    n_tokens: int
    n_target: int
    theirs: float
    rounds: int  # of theirs
    ours: float
    deviation: float  # of the largest score
    ratio: float | None  # theirs over ours; None where scores disagree


class Sides:
    """Both implementations, ready to trace."""

    def __init__(self, model: Any, tokenizer: Any, impl: str) -> None:
        package = importlib.import_module("flashtrace")
        core = importlib.import_module("flashtrace.core")
        core.tqdm = functools.partial(core.tqdm, disable=True)  # no bar at every call
        self.model, self.tokenizer = model, tokenizer
        start = time.perf_counter()
        self.ours = FlashTrace(model, tokenizer, impl=impl)
        self.opened = time.perf_counter() - start
        self.theirs = package.FlashTrace(model, tokenizer)

    def trace(self, whose: str, **call: Any) -> Any:
        """A trace by `whose` implementation, with the attention function that it runs."""
        self.model.set_attn_implementation("eager" if whose == "theirs" else "sdpa")
        return getattr(self, whose).trace(**call)

    def compare(self, method: str, ids: torch.Tensor, split: int, repeat: int) -> Row:
        """Times `method` on a text whose first `split` tokens are the prompt."""
        prompt, target = (self.tokenizer.decode(part) for part in (ids[:split], ids[split:]))
        call = {"prompt": prompt, "target": target, "method": method}
        found: dict[str, Any] = {}

        def job(whose: str) -> None:
            found[whose] = self.trace(whose, **call)

        jobs = {whose: functools.partial(job, whose) for whose in ("theirs", "ours")}
        if repeat > 1:
            seconds = in_turn(jobs, repeat)
        else:  # theirs without a warm-up round, which would take as long
            seconds = in_turn({"theirs": jobs["theirs"]}, 1, warm_up=False)
            seconds |= in_turn({"ours": jobs["ours"]}, 3)
        scores = {whose: torch.tensor(of.scores) for whose, of in found.items()}
        largest = float(scores["theirs"].max())
        deviation = float((scores["ours"] - scores["theirs"]).abs().max()) / largest
        sizes = [len(self.tokenizer(text)["input_ids"]) for text in (prompt, target)]
        return Row(
            method,
            sum(sizes) + 1,
            sizes[1] + 1,  # with the end of text
            seconds["theirs"],
            repeat,
            seconds["ours"],
            deviation,
            seconds["theirs"] / seconds["ours"] if deviation <= TOLERANCE else None,
        )


def main() -> None:
    """Parses the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="Hub name or directory, Llama-style; default SmolLM2")
    parser.add_argument("--impl", default="auto", help="of ours")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5, help="of ifr-span and flashtrace")
    parser.add_argument("--slow-repeat", type=int, default=1, help="of the package's ifr-matrix")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    args = parser.parse_args()
    try:
        version = metadata.version("flashtrace")
    except metadata.PackageNotFoundError as error:
        raise SystemExit("flashtrace is missing: pip install -e '.[bench]'") from error

    model, tokenizer = load(args.model)
    sides = Sides(model, tokenizer, args.impl)
    T = args.length
    ids = first_tokens(prose(), tokenizer, T - 1)
    rows = [
        sides.compare("ifr-span", ids, T // 2, args.repeat),
        sides.compare("flashtrace", ids, T // 2, args.repeat),
        sides.compare("ifr-matrix", ids, 1, args.slow_repeat),
    ]
    on, of = machine(sides.ours.tracer.decoder.device), subject(sides.ours.tracer)
    table = Table(
        title=f"{of.model}, {of.dtype}, impl {of.impl}, {on.processor}, {on.threads} threads, "
        f"torch {on.torch}, transformers {on.transformers}, flashtrace {version}"
    )
    for column in ("method", "T", "target", "theirs", "rounds", "ours", "deviation", "ratio"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        ratio = "SCORES DISAGREE" if row.ratio is None else f"{row.ratio:.1f}"
        table.add_row(
            row.method,
            *map(str, (row.n_tokens, row.n_target)),
            f"{row.theirs:.3f} s",
            str(row.rounds),
            f"{row.ours:.3f} s",
            f"{row.deviation:.1e}",
            ratio,
        )
    out = Console(width=None if Console().is_terminal else 140)
    out.print(table)
    out.print(f"Opening the model took ours {sides.opened:.2f} s, once.")
    if args.json is not None:
        document = {
            "machine": on._asdict(),
            "subject": of._asdict(),
            "flashtrace": version,
            "opened": sides.opened,
            "results": [row._asdict() for row in rows],
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if any(row.ratio is None for row in rows):
        raise SystemExit("scores disagree: no speed-up is reported for what deviates")


if __name__ == "__main__":
    main()
