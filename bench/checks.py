"""The cost of the checks that refuse wrong graphs, beside traces without them, in one run.

Left out on one side: that parts add up at every row (scoring/closure.py), that the residual stream
is passed on unchanged between layers (model/stream.py), and that hooks are those of the opening
(model/opening.py). Both sides run in turn. The share is the median of the rounds' ratios, in
processor time, which other programs disturb less. The limits are 3% of `trace_all` at 512 tokens,
and nothing that can be told from noise for `trace`.

    python bench/checks.py
    python bench/checks.py --lengths 128 512 2048 --repeat 9
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from statistics import median
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ifr_fast import Tracer
from ifr_fast.benchmark import THRESHOLD, first_tokens, prose
from ifr_fast.model.stream import Chain


@contextmanager
def unchecked() -> Iterator[None]:
    """Within, no check is made."""

    def closed(inputs: object, linear: Tensor, bias: Tensor) -> Tensor:
        return linear.new_zeros(1)

    replaced: dict[str, Callable[..., object]] = {
        "ifr_fast.scoring.layer.closure_of": closed,
        "ifr_fast.scoring.frontier.check_closure": lambda errors: None,
        "ifr_fast.scoring.layer.check_closure": lambda errors: None,
        "ifr_fast.recording.layer_pass.check_hooks": lambda decoder: None,
    }
    with ExitStack() as stack:
        for name, by in replaced.items():
            stack.enter_context(mock.patch(name, by))
        for name in ("leave", "enter", "end"):
            stack.enter_context(mock.patch.object(Chain, name, return_value=None))
        yield


def seconds(call: Callable[[], object], repeat: int) -> tuple[list[float], list[float]]:
    """Processor seconds of each round with the checks, and without; round 0 is a warm-up."""
    checked: list[float] = []
    plain: list[float] = []
    for i in range(repeat + 1):
        for found, context in ((checked, nullcontext()), (plain, unchecked())):
            with context:
                start = time.process_time()
                call()
                elapsed = time.process_time() - start
            if i:
                found.append(elapsed)
    return checked, plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or directory; default: the default model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeat", type=int, default=9)
    given = parser.parse_args()
    tracer = Tracer.from_pretrained(given.model)
    table = Table("tokens", "call", "CPU s with checks", "without", "checks cost", box=None)
    for n_tokens in given.lengths:
        ids = first_tokens(prose(), tracer.tokenizer, n_tokens)
        calls: dict[str, Callable[[], object]] = {
            "trace": lambda ids=ids: tracer.trace(ids, threshold=THRESHOLD),
            "trace_all": lambda ids=ids: tracer.trace_all(ids, threshold=THRESHOLD),
        }
        for name, call in calls.items():
            checked, plain = seconds(call, given.repeat)
            share = median(x / y for x, y in zip(checked, plain, strict=True)) - 1
            figures = (f"{median(checked):.3f}", f"{median(plain):.3f}", f"{share:+.1%}")
            table.add_row(str(n_tokens), name, *figures)
    Console().print(table)
    Console().print(f"{torch.get_num_threads()} threads, medians of {given.repeat}")


if __name__ == "__main__":
    main()
