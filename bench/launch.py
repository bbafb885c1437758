"""The cost of our launcher on the host, beside Triton's own launch: microseconds a launch.

A stand-in takes the place of Triton's launch and does nothing, so no GPU is needed. The launches
are those that score one layer, repeated: each is timed with the launcher (kernels/triton/launch.py)
and with its arguments at hand, and the difference is the launcher's. For comparison, the way that
the launcher worked before: all values in one dict, merged once for every parameter.

    python bench/launch.py
    python bench/launch.py --repeat 200 --json launch.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from gpu_model.triton_work import MODULES
from rich.console import Console

from ifr_fast.kernels.contract import LayerInputs
from ifr_fast.kernels.triton import kernel
from ifr_fast.kernels.triton.launch import Records, launch

LIMIT = 5.0  # microseconds that the launcher may cost


class Launch(NamedTuple):
    """One launch as the driver asks for it."""

    kernel: Any
    grid: tuple[int, ...]
    records: Records
    tiles: dict[str, Any]


class StandIn:
    """A kernel whose launch does nothing."""

    def __init__(self, of: Any) -> None:
        self.fn, self.arg_names = of.fn, of.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.run(grid, *args, **options)

    def run(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        pass


def layer_launches() -> list[Launch]:
    """The launches that score 64 rows of a layer of Llama-3-8B's shape, on tensors without data."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    R, S, H, H_kv, V, D = 64, 128, 32, 8, 128, 4096
    inputs = LayerInputs(
        rows=torch.arange(S - R, S),
        resid_pre=empty(R, D),
        y=empty(R, D),
        q=empty(R, H, V),
        k=empty(S, H_kv, V),
        v=empty(S, H_kv, V),
        W_O=empty(H, V, D),
        scale=V**-0.5,
    )
    found: list[Launch] = []

    def note(of: Any, grid: tuple[int, ...], records: Records, **tiles: Any) -> None:
        found.append(Launch(StandIn(of), grid, records, tiles))

    with mock.patch("ifr_fast.kernels.triton.tiles.INTERPRETED", True):  # asks for no GPU
        patches = [mock.patch.object(module, "launch", note) for module in MODULES]
        for patch in patches:
            patch.start()
        try:
            kernel.score_attention(inputs, 0.04)
            kernel.score_ffn(inputs.resid_pre, inputs.y)
        finally:
            for patch in patches:
                patch.stop()
    return found


def merging(x: Launch) -> Callable[[], None]:
    """The former way, from values in one dict."""
    values = {f"p_{name}": value for of in x.records for name, value in of._asdict().items()}
    values |= {name: value for of in x.records for name, value in of._asdict().items()}
    values = {name: value for name, value in values.items() if name not in x.tiles}

    def job() -> None:
        names, tiles = x.kernel.arg_names, x.tiles
        options = {name: value for name, value in tiles.items() if name not in names}
        x.kernel[x.grid](**{name: (values | tiles)[name] for name in names}, **options)

    return job


def picking(x: Launch) -> Callable[[], None]:
    """The launcher."""
    return lambda: launch(x.kernel, x.grid, x.records, **x.tiles)


def at_hand(x: Launch) -> Callable[[], None]:
    """A launch whose arguments are at hand: the stand-in alone."""
    args: list[Any] = []
    options: dict[str, Any] = {}

    class Kept(StandIn):
        def run(self, grid: tuple[int, ...], *found: Any, **named: Any) -> None:
            args.extend(found)
            options.update(named)

    launch(Kept(x.kernel), x.grid, x.records, **x.tiles)
    return lambda: x.kernel[x.grid](*args, **options)


def microseconds(jobs: list[Callable[[], None]], repeat: int) -> float:
    """Median over rounds of a job's mean time."""
    rounds = []
    for _ in range(repeat):
        start = time.perf_counter()
        for job in jobs:
            job()
        rounds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(rounds) / len(jobs)


def measure(repeat: int) -> dict[str, float]:
    """Microseconds a launch: the former way, the launcher, and the stand-in that both contain."""
    launches = layer_launches()
    ways = {"merging": merging, "launcher": picking, "stand-in": at_hand}
    found = {}
    for name, way in ways.items():
        jobs = [way(x) for x in launches]
        microseconds(jobs, 10)
        found[name] = microseconds(jobs, repeat)
    return {
        "before": found["merging"] - found["stand-in"],
        "launcher": found["launcher"] - found["stand-in"],
        "stand-in": found["stand-in"],
    }


def main() -> None:
    """Parses the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeat", type=int, default=1000, help="rounds; figures are medians")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    args = parser.parse_args()
    figures = measure(args.repeat)
    out = Console()
    out.print(f"launcher: {figures['launcher']:.2f} µs a launch (limit {LIMIT:g})")
    out.print(f"before, merging a dict for every parameter: {figures['before']:.2f} µs")
    out.print(f"the stand-in for Triton's launch, in neither: {figures['stand-in']:.2f} µs")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
