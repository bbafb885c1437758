"""What attribution should cost on a GPU, from shapes alone, beside the model's own forward pass.

For every kernel: operations on matrix units, on vector units, exponentials, bytes to device memory,
bytes that programs ask the caches for. A kernel's time on a target is the largest of these over what
the target can do, times the fraction of it that such a kernel may hope for (GEMM, FLASH, KERNELS,
NAIVE below). Nothing is timed. Grids and tiles of our kernels are those that their driver launches,
their work is by the formulas of triton_work.py.

How many pairs need a correction depends on the model, not on shapes: bench/counts.json has what
was measured (bench/counts.py), and three ways to extend it to wider models are shown:

- low: as many multiples of D as on the default model;
- mid: they grow with the width as on random models, by the exponents fitted here;
- high: they grow as H sqrt(V), as the design's bound does if a wider model's heads move its
  residual stream each as much as a narrow one's do.

    python bench/roofline.py
    python bench/roofline.py --target B200 --json roofline.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

COUNTS = Path(__file__).with_name("counts.json")
LENGTHS = (2048, 8192, 32768, 131072)
BYTES = 2  # of a bfloat16
LAUNCH_SECONDS = 5e-6  # from one small kernel's start to the next one's
READ_SECONDS = 20e-6  # the host waits for a number from the device


class Model(NamedTuple):
    """Shapes of a Llama-style model; all linear maps without bias."""

    name: str
    L: int
    D: int
    H: int
    H_kv: int
    K: int
    V: int
    ffn: int
    vocab: int

    @property
    def layer_parameters(self) -> int:
        """Of the linear maps of one layer."""
        attention = self.D * (self.H * self.K + self.H_kv * (self.K + self.V)) + self.O
        return attention + 3 * self.D * self.ffn

    @property
    def O(self) -> int:  # noqa: E743
        """Parameters of the output projection."""
        return self.H * self.V * self.D


SMOLLM2 = Model("SmolLM2-135M", 30, 576, 9, 3, 64, 64, 1536, 49152)
LLAMA_8B = Model("Llama-3-8B", 32, 4096, 32, 8, 128, 128, 14336, 128256)
LLAMA_70B = Model("Llama-3-70B", 80, 8192, 64, 8, 128, 128, 28672, 128256)


class Target(NamedTuple):
    """One GPU's ceilings, a second, as its vendor has them."""

    name: str
    matrix: float  # bfloat16 FLOP, dense, float32 sums
    fp32: float  # FLOP on vector units; a fused multiply-add is two
    memory: float  # bytes
    source: str

    @property
    def vector(self) -> float:
        """Operations on vector units."""
        return self.fp32 / 2

    @property
    def special(self) -> float:
        """Exponentials: 16 a clock for 128 vector lanes."""
        return self.vector / 8

    @property
    def shared(self) -> float:
        """Bytes from the last cache: 64 a clock for 128 vector lanes."""
        return self.vector / 2


TARGETS = {
    target.name: target
    for target in (
        Target("A100", 312e12, 19.5e12, 2.039e12, 
               "NVIDIA A100 80GB SXM datasheet; NVIDIA A100 architecture whitepaper"),
        Target("H100", 989.4e12, 66.9e12, 3.35e12, 
               "NVIDIA H100 SXM datasheet; NVIDIA H100 architecture whitepaper"),
        Target("H200", 989.4e12, 66.9e12, 4.8e12, 
               "NVIDIA H200 SXM datasheet"),
        Target("MI300X", 1307.4e12, 163.4e12, 5.3e12, 
               "AMD Instinct MI300X data sheet; AMD CDNA 3 white paper"),
        Target("B200", 2250e12, 80e12, 8e12, 
               "NVIDIA Blackwell architecture technical brief (HGX B200, 1,000 W)"),
    )
}  # fmt: skip


class Fractions(NamedTuple):
    """Of a target's ceilings, what a kind of kernel may hope for."""

    matrix: float
    vector: float
    special: float
    memory: float
    shared: float


# Sober: the forward pass is granted what vendors' best libraries reach, and the naive kernel a loop
# of nothing but its own arithmetic. Ours get what tiled Triton kernels do that work between their
# products; their vector operations are counted as written, of which compilers fuse or share some.
GEMM = Fractions(0.7, 0.5, 0.8, 0.9, 0.5)
FLASH = Fractions(0.6, 0.5, 0.8, 0.9, 0.5)
KERNELS = Fractions(0.5, 0.6, 0.6, 0.7, 0.4)
NAIVE = Fractions(0.6, 0.8, 0.8, 0.9, 0.5)
PEAK = Fractions(1, 1, 1, 1, 1)


class Work(NamedTuple):
    """Of one launch, or a sum of launches."""

    matrix: float = 0  # FLOP
    vector: float = 0  # operations
    special: float = 0  # exponentials
    memory: float = 0  # bytes to and from device memory
    shared: float = 0  # bytes that programs ask the caches for
    launches: float = 0

    def times(self, n: float) -> Work:
        """N of it."""
        return Work(*(n * x for x in self))

    def ceilings(self, target: Target, fractions: Fractions) -> dict[str, float]:
        """Seconds by what they are spent on."""
        return {
            "matrix": self.matrix / (target.matrix * fractions.matrix),
            "vector": self.vector / (target.vector * fractions.vector),
            "special": self.special / (target.special * fractions.special),
            "memory": self.memory / (target.memory * fractions.memory),
            "shared": self.shared / (target.shared * fractions.shared),
            "launch": self.launches * LAUNCH_SECONDS,
        }

    def seconds(self, target: Target, fractions: Fractions) -> float:
        """The largest."""
        return max(self.ceilings(target, fractions).values())


def causal_pairs(n_tokens: int) -> int:
    """(row, visible key) of a text."""
    return n_tokens * (n_tokens + 1) // 2


def forward(model: Model, n_tokens: int) -> dict[str, tuple[Work, Fractions]]:
    """The plain forward pass of a text, head at one position; all elementwise work as if free."""
    T, D = n_tokens, model.D
    qkv = model.H * model.K + model.H_kv * (model.K + model.V)
    z = model.H * model.V
    activations = T * (D + qkv + z + D + D + 3 * model.ffn + D)  # in and out of the linear maps
    pairs = causal_pairs(T) * model.H
    return {
        "linear maps": (
            Work(
                matrix=2 * T * model.layer_parameters,
                memory=BYTES * (model.layer_parameters + activations),
                launches=4,
            ).times(model.L),
            GEMM,
        ),
        "attention": (
            Work(
                matrix=2 * pairs * (model.K + model.V),
                vector=4 * pairs,
                special=pairs,
                memory=BYTES * T * (qkv + z),
                launches=1,
            ).times(model.L),
            FLASH,
        ),
        "head": (
            Work(matrix=2 * D * model.vocab, memory=BYTES * D * model.vocab, launches=1),
            GEMM,
        ),
    }


def forward_seconds(model: Model, n_tokens: int, target: Target, *, at_peak: bool = False) -> float:
    """Of the plain forward pass."""
    work = forward(model, n_tokens).values()
    return sum(w.seconds(target, PEAK if at_peak else fractions) for w, fractions in work)


def naive_l1(model: Model, n_tokens: int) -> Work:
    """One fused L1 kernel over all pairs, all layers: |y - alpha u| summed over D coordinates.

    Two operations a coordinate and pair (multiply-add; add of an absolute value), u formed once
    for each (head, key), weights alpha from one product; nothing else is counted.
    """
    pairs = causal_pairs(n_tokens) * model.H
    return Work(
        matrix=2 * n_tokens * model.O + 2 * pairs * model.K,
        vector=2 * pairs * model.D,
        special=pairs,
        launches=1,
    ).times(model.L)


def materializing(model: Model, n_tokens: int) -> Work:
    """All parts [T, T, H, D] of a layer, future keys included, written once and read once."""
    size = BYTES * n_tokens**2 * model.H * model.D
    return Work(matrix=size / BYTES, memory=2 * size, launches=2).times(model.L)


class Growth(NamedTuple):
    """How a count grows with the width and attention's share, fitted to the random models:
    count ~ D^width * share^share, H V = D.
    """

    width: float
    share: float


def fit(entries: list[dict[str, Any]], count: Callable[[dict[str, Any]], float]) -> Growth:
    """Least squares in logarithms, over random models counted on a text of 512 tokens."""
    points = [e for e in entries if e["T"] == 512 and e["H"] * e["V"] == e["D"]]
    known = np.log([[math.e, e["D"], e["mean"]["share"]] for e in points])
    values = np.log([count(e["mean"]) for e in points])
    _, width, share = np.linalg.lstsq(known, values, rcond=None)[0]
    return Growth(float(width), float(share))


class Counts:
    """bench/counts.json, and its extension to wider models."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.visits = fit(document["random"], lambda c: c["visited"])

    def measured(self, n_tokens: int) -> dict[str, Any]:
        """The default model's means at the longest text measured that is no longer than this."""
        real = [e for e in self.document["real"] if e["T"] <= n_tokens] or self.document["real"][:1]
        return max(real, key=lambda e: e["T"])

    def visits_growth(self, model: Model, extension: str) -> float:
        """Visits in multiples of D, over those of the default model."""
        wider = model.D / SMOLLM2.D
        match extension:
            case "low":
                return 1.0
            case "mid":
                return wider ** (self.visits.width - 1)
            case "high":
                return model.H * model.V**0.5 / (SMOLLM2.H * SMOLLM2.V**0.5)
            case _:
                raise ValueError(f"extension: expected low, mid or high, got {extension!r}")

    def extended(
        self,
        model: Model,
        n_tokens: int,
        extension: str,
        count: Callable[[dict[str, Any]], float],
    ) -> float:
        """A count per row for a wider model.

        At the default model's share of attention it grows by the width's exponent ("mid"); a
        share that is larger or smaller stands for what visits grow by otherwise.
        """
        growth = fit(self.document["random"], count)
        share = (self.visits_growth(model, extension) / self.visits_growth(model, "mid")) ** (
            1 / self.visits.share
        )
        here = count(self.measured(n_tokens)["mean"])
        return here * (model.D / SMOLLM2.D) ** growth.width * share**growth.share

    def lists(
        self, model: Model, n_tokens: int, extension: str, n_rows: int, names: dict[str, Any]
    ) -> Lists:
        """Lists of a block of rows, on the average: of the kernels' room for candidates."""
        N, BP = names["N"], names["BP"]
        if N not in (
            rooms := [tier["candidates"] for tier in self.measured(n_tokens)["mean"]["tiers"]]
        ):
            raise ValueError(f"N: the kernels have {N} candidates, counted were tiers of {rooms}")
        i_tile = self.document["tiles"].index(BP)

        def per_row(name: str) -> Callable[[dict[str, Any]], float]:
            def read(mean: dict[str, Any]) -> float:
                value = mean["tiers"][rooms.index(N)][name]
                return value[i_tile] if isinstance(value, list) else value

            return read

        def total(name: str) -> float:
            return n_rows * self.extended(model, n_tokens, extension, per_row(name))

        light, lines = total("light"), min(total("light_lines"), n_rows * model.H)
        heavy = total("heavy")
        rows_and_heads = blocks(n_rows, names["BT"]) * model.H
        edges = n_rows / THRESHOLD  # at most
        return Lists(
            candidates=0.75 * N * n_rows * model.H,
            light=light,
            light_lines=lines,
            light_tiles=max(total("light_tiles"), light / BP),
            light_candidates=0.75 * N * lines,
            heavy=heavy,
            # A list's last tile is half full.
            heavy_tiles=heavy / names["heavy_BP"] + 0.5 * min(rows_and_heads, heavy),
            steps=n_rows * self.extended(model, n_tokens, extension, per_row("steps")),
            edges=edges,
            edge_tiles=edges / names["BE"] + 0.5 * n_rows,
            listed_edges=edges * model.H,
        )
