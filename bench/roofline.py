"""What attribution should cost on a GPU, from shapes alone, beside the model's own forward pass.

For every kernel: operations on matrix units, on vector units, exponentials, bytes to device
memory, bytes that programs ask the caches for. A kernel's time on a target is the largest of these
over what the target can do, times the fraction of it that such a kernel may hope for (GEMM, FLASH,
KERNELS, NAIVE below). Nothing is timed. Grids and tiles of our kernels are those that their driver
launches, their work is by the formulas of triton_work.py.

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
from collections import defaultdict
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from triton_work import Block, Lists, asked, blocks_of

from ifr_fast.kernels.contract import LayerInputs

COUNTS = Path(__file__).with_name("counts.json")
LENGTHS = (2048, 8192, 32768, 131072)
EXTENSIONS = ("low", "mid", "high")
THRESHOLD = 0.04
BYTES = 2  # of a bfloat16
FILLED = 0.75  # of a line's room for candidates, as the search for where they end aims at
LAUNCH_SECONDS = 5e-6  # from one small kernel's start to the next one's
READ_SECONDS = 20e-6  # the host waits for a number from the device
RECORDED_TOKENS = 32768  # a full recording of Llama-3-8B, log-sum-exp included, fits into 80 GB


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
        attention = (
            self.D * (self.H * self.K + self.H_kv * (self.K + self.V)) + self.output_parameters
        )
        return attention + 3 * self.D * self.ffn

    @property
    def output_parameters(self) -> int:
        """Of W_O."""
        return self.H * self.V * self.D


SMOLLM2 = Model("SmolLM2-135M", 30, 576, 9, 3, 64, 64, 1536, 49152)
LLAMA_8B = Model("Llama-3-8B", 32, 4096, 32, 8, 128, 128, 14336, 128256)
LLAMA_70B = Model("Llama-3-70B", 80, 8192, 64, 8, 128, 128, 28672, 128256)


class Target(NamedTuple):
    """One GPU's ceilings, a second, as its vendor has them."""

    name: str
    arch: int | str  # as Triton names it
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
        Target("A100", 80, 312e12, 19.5e12, 2.039e12,
               "NVIDIA A100 80GB SXM datasheet; NVIDIA A100 architecture whitepaper"),
        Target("H100", 90, 989.4e12, 66.9e12, 3.35e12,
               "NVIDIA H100 SXM datasheet; NVIDIA H100 architecture whitepaper"),
        Target("H200", 90, 989.4e12, 66.9e12, 4.8e12,
               "NVIDIA H200 SXM datasheet"),
        Target("MI300X", "gfx942", 1307.4e12, 163.4e12, 5.3e12,
               "AMD Instinct MI300X data sheet; AMD CDNA 3 white paper"),
        Target("B200", 100, 2250e12, 80e12, 8e12,
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

    def plus(self, other: Work) -> Work:
        """Both."""
        return Work(*(x + y for x, y in zip(self, other, strict=True)))

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
        matrix=2 * n_tokens * model.output_parameters + 2 * pairs * model.K,
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
    points = [
        e for e in entries if e["T"] == 512 and e["H"] * e["V"] == e["D"] and count(e["mean"]) > 0
    ]
    known = np.log([[math.e, e["D"], e["mean"]["share"]] for e in points])
    values = np.log([count(e["mean"]) for e in points])
    _, width, share = np.linalg.lstsq(known, values, rcond=None)[0]
    return Growth(float(width), float(share))


class Counts:
    """bench/counts.json, and its extension to wider models."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.visits = fit(document["random"], lambda c: c["by_norm"]["visited"])

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

    def lists(self, model: Model, n_tokens: int, extension: str, block: Block) -> Lists:
        """Lists of a block of rows, on the average."""
        names = {launch.kernel: launch.names for launch in block}
        light_tile = names["light_kernel"]
        by = "by_reach" if names["linear_kernel"]["REACH"] else "by_norm"
        N, R = light_tile["N"], len(block[0].rows)
        rooms = [tier["candidates"] for tier in self.measured(n_tokens)["mean"][by]["tiers"]]
        sizes = self.document["tiles"]
        if N not in rooms or light_tile["BP"] not in sizes:
            raise ValueError(f"counts: have no tiers for N = {N}, BP = {light_tile['BP']}")
        tier, size = rooms.index(N), sizes.index(light_tile["BP"])

        def total(count: Callable[[dict[str, Any]], float]) -> float:
            return R * self.extended(
                model, n_tokens, extension, lambda mean: count(mean[by]["tiers"][tier])
            )

        light, heavy = total(itemgetter("light")), total(itemgetter("heavy"))
        lines = min(total(itemgetter("light_lines")), light, R * model.H)
        heavy_tile = names["heavy_kernel"]
        lists_of_heavy = math.ceil(R / heavy_tile["BT"]) * model.H
        edges = R * self.measured(n_tokens)["mean"]["edges"]  # parts share 1, whatever the width
        edge_tile = names["head_weights_kernel"]["BE"]
        return Lists(
            near=R * min(model.D, FILLED * light_tile["M"]),
            candidates=FILLED * N * R * model.H,
            light=light,
            light_lines=lines,
            light_tiles=max(
                total(lambda tier: tier["light_tiles"][size]), light / light_tile["BP"]
            ),
            light_candidates=FILLED * N * lines,
            heavy=heavy,
            heavy_tiles=heavy / heavy_tile["BP"] + min(lists_of_heavy / 2, heavy),
            steps=total(itemgetter("steps")),
            edges=edges,
            edge_tiles=edges / edge_tile + min(R / 2, edges),
            listed_edges=edges * model.H,
        )


STEPS = {
    "column_norms_kernel": "a",
    "spread_kernel": "a",
    "value_norms_kernel": "a",
    "half_values_kernel": "a",
    "reach_kernel": "a",
    "value_space_signs_kernel": "a",
    "nearest_kernel": "a",
    "breakpoints_kernel": "a",
    "log_sum_exp_kernel": "b",
    "combine_kernel": "b",
    "linear_kernel": "b",
    "lists_kernel": "c",
    "light_kernel": "c",
    "heavy_kernel": "c",
    "parts_kernel": "d",
    "ffn_kernel": "d",
    "fold_kernel": "e",
    "totals_kernel": "e",
    "edges_kernel": "e",
    "head_weights_kernel": "e",
}
STEP_NAMES = {
    "a": "(a) preparation",
    "b": "(b) linear pass",
    "c": "(c) correction pass",
    "d": "(d) residual, FFN",
    "e": "(e) compaction",
}


def shapes_only(model: Model, n_tokens: int, n_rows: int, *, recorded: bool) -> LayerInputs:
    """One layer's inputs in bfloat16, the last rows of a text, without data. recorded: the forward
    pass has kept its log-sum-exp, as full recordings do.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    R, S, D, H, H_kv = n_rows, n_tokens, model.D, model.H, model.H_kv
    return LayerInputs(
        rows=torch.arange(S - R, S),
        resid_pre=empty(R, D),
        y=empty(R, D),
        q=empty(R, H, model.K),
        k=empty(S, H_kv, model.K),
        v=empty(S, H_kv, model.V),
        W_O=empty(H, model.V, D),
        scale=model.K**-0.5,
        log_sum_exp=torch.empty(R, H, device="meta") if recorded else None,
    )


class Attribution(NamedTuple):
    """All layers' kernels on one target. Seconds are those of each launch, added up."""

    work: dict[str, Work]  # by kernel
    seconds: dict[str, float]  # by kernel
    at_peak: dict[str, float]  # by kernel, all fractions 1

    @property
    def total(self) -> float:
        """Seconds of all kernels."""
        return sum(self.seconds.values())


def attribution(
    model: Model, n_tokens: int, n_rows: int, target: Target, counts: Counts
) -> dict[str, Attribution]:
    """Scoring the last rows of a text in all layers, by how counts are extended."""
    found = {
        extension: Attribution(defaultdict(Work), defaultdict(float), defaultdict(float))
        for extension in EXTENSIONS
    }

    def visit(block: Block) -> None:
        for extension, sums in found.items():
            of = Lists()
            if len(block[0].rows):
                of = counts.lists(model, n_tokens, extension, block)
            for launch in block:
                a = asked(launch, of)
                one = Work(
                    2 * a.products,
                    a.vector + a.masks / 8,
                    a.special,
                    a.read + a.written,
                    a.loaded + a.stored,
                    1,
                )
                name = launch.kernel
                sums.work[name] = sums.work[name].plus(one.times(model.L))
                sums.seconds[name] += model.L * one.seconds(target, KERNELS)
                sums.at_peak[name] += model.L * one.seconds(target, PEAK)

    recorded = n_rows == n_tokens <= RECORDED_TOKENS
    inputs = shapes_only(model, n_tokens, n_rows, recorded=recorded)
    blocks_of(inputs, THRESHOLD, target.arch, visit)
    return found


def replay(model: Model, n_tokens: int, n_rows: int) -> Work:
    """A route's rows run through their layers once more, where the recording is lean."""
    R = n_rows
    return Work(
        matrix=2 * R * (model.layer_parameters + n_tokens * model.H * (model.K + model.V)),
        special=R * n_tokens * model.H,
        memory=BYTES * (model.layer_parameters + n_tokens * model.H_kv * (model.K + model.V)),
        launches=20,
    ).times(model.L)


class Row(NamedTuple):
    """One model and length on one target; shares of the plain forward pass."""

    model: str
    T: int
    forward_seconds: float
    all_positions: dict[str, float]  # by extension
    all_at_peak: float  # mid, and all fractions 1, the forward pass's too
    route: float  # mid, rows a layer as on the average route
    route_longest: float  # mid, rows a layer as on the longest route
    route_replayed: float  # route_longest, with its layers replayed
    naive: float
    materializing: float
    materialized_bytes: float  # parts of one layer


def route_rows(counts: Counts) -> tuple[int, int]:
    """Rows a layer of the routes measured: of the average one, of the longest."""
    routes = [n / SMOLLM2.L for e in counts.document["frontier"] for n in e["rows_of_route"]]
    return math.ceil(sum(routes) / len(routes)), math.ceil(max(routes))


def row(
    model: Model, n_tokens: int, target: Target, counts: Counts, scored: dict[str, Attribution]
) -> Row:
    """`scored`: all positions."""
    unit = forward_seconds(model, n_tokens, target)
    route = [
        attribution(model, n_tokens, min(n, n_tokens), target, counts)["mid"].total
        + model.L * READ_SECONDS
        for n in route_rows(counts)
    ]
    again = replay(model, n_tokens, route_rows(counts)[1]).seconds(target, KERNELS)
    return Row(
        model.name,
        n_tokens,
        unit,
        {name: a.total / unit for name, a in scored.items()},
        sum(scored["mid"].at_peak.values())
        / forward_seconds(model, n_tokens, target, at_peak=True),
        route[0] / unit,
        route[1] / unit,
        (route[1] + again) / unit,
        naive_l1(model, n_tokens).seconds(target, NAIVE) / unit,
        materializing(model, n_tokens).seconds(target, NAIVE) / unit,
        BYTES * n_tokens**2 * model.H * model.D,
    )


class Claim(NamedTuple):
    """What the kernels are to show, on an H100 with Llama-3-8B."""

    text: str
    limit: float
    values: dict[str, float]  # by extension, or by what else it was taken
    at_least: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value keeps the limit."""
        return value >= self.limit if self.at_least else value <= self.limit


def claims(rows: list[Row]) -> list[Claim]:
    """Of the rows of Llama-3-8B on an H100."""
    by_length = {r.T: r for r in rows if r.model == LLAMA_8B.name}
    found = []
    if (long := by_length.get(131072)) is not None:
        values = {
            "average route": long.route,
            "longest route": long.route_longest,
            "longest route, replayed": long.route_replayed,
        }
        found.append(Claim("one route at 128k / forward pass", 0.005, values))
    if (r := by_length.get(8192)) is not None:
        at_peak = {"mid, all at peak": r.all_at_peak}
        found.append(Claim("all positions at 8k / forward pass", 0.5, r.all_positions | at_peak))
        less = {name: r.naive / share for name, share in r.all_positions.items()}
        found.append(Claim("naive fused L1 at 8k / all positions", 20, less, at_least=True))
    return found


def table(title: str, *columns: str) -> Table:
    """All but the first column to the right."""
    made = Table(title=title, box=box.HEAVY_HEAD if Console().is_terminal else box.ASCII)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    return made


def counts_table(counts: Counts) -> Table:
    """What was measured, and the design's bound."""
    names = ("model", "D", "H", "V", "share", "T", "pairs", "by", "listed", ">= 8", ">= 64")
    made = table("per node, mean", *names, "visited / D", "bound / D", "visited / bound")
    for e in counts.document["real"] + counts.document["random"]:
        m = e["mean"]
        for by in ("norm", "reach"):
            of = m[f"by_{by}"]
            made.add_row(
                e.get("model", "random"),
                *(str(e[name]) for name in ("D", "H", "V")),
                f"{m['share']:.2f}",
                str(e["T"]),
                f"{m['pairs']:,.0f}",
                by,
                *(f"{of[name]:,.0f}" for name in ("listed", "at_least_8", "at_least_64")),
                f"{of['visited'] / e['D']:.1f}",
                f"{m['bound'] / e['D']:.1f}",
                f"{of['visited'] / m['bound']:.2f}",
            )
    return made


def extension_table(counts: Counts, models: list[Model], n_tokens: int) -> Table:
    """Counts extended to wider models."""
    made = table(
        f"per node at T = {n_tokens}: low / mid / high", "count", "~ D^", "~ share^",
        *(m.name for m in models),
    )  # fmt: skip
    for by in ("by_norm", "by_reach"):
        for name, title in (
            ("listed", "pairs listed"),
            ("at_least_8", "pairs with 8 or more"),
            ("at_least_64", "pairs with 64 or more"),
            ("visited", "coordinates visited / D"),
        ):

            def count(mean: dict[str, Any], by: str = by, name: str = name) -> float:
                return mean[by][name]

            growth = fit(counts.document["random"], count)
            cells = []
            for model in models:
                unit = model.D if name == "visited" else 1
                values = (
                    counts.extended(model, n_tokens, extension, count) / unit
                    for extension in EXTENSIONS
                )
                cells.append(" / ".join(f"{value:,.0f}" for value in values))
            title = f"{title}, {by.replace('_', ' ')}"
            made.add_row(title, f"{growth.width:.2f}", f"{growth.share:.2f}", *cells)
    return made


def kernel_table(title: str, a: Attribution, target: Target, unit: float) -> Table:
    """Each kernel's work and time."""
    made = table(
        title, "kernel", "TFLOP matrix", "Tops vector", "Gexp", "GB memory", "GB asked", "ms",
        "bound by", "of forward",
    )  # fmt: skip
    steps: dict[str, float] = defaultdict(float)
    for name, work in sorted(a.work.items(), key=lambda item: STEPS[item[0]]):
        seconds = a.seconds[name]
        ceilings = work.ceilings(target, KERNELS)
        steps[STEPS[name]] += seconds
        made.add_row(
            f"{STEPS[name]} {name.removesuffix('_kernel')}",
            f"{work.matrix / 1e12:.2f}",
            f"{work.vector / 1e12:.3f}",
            f"{work.special / 1e9:.1f}",
            f"{work.memory / 1e9:.1f}",
            f"{work.shared / 1e9:,.0f}",
            f"{1e3 * seconds:.2f}",
            max(ceilings, key=lambda of: ceilings[of]),
            f"{seconds / unit:.3f}",
        )
    made.add_section()
    for step, seconds in steps.items():
        cells = [""] * 5
        made.add_row(STEP_NAMES[step], *cells, f"{1e3 * seconds:.2f}", "", f"{seconds / unit:.3f}")
    return made


def share_table(title: str, rows: list[Row]) -> Table:
    """Shares of a forward pass."""
    made = table(
        title, "model", "T", "forward (s)", "all positions: low", "mid", "high", "mid, at peak",
        "one route", "longest route", "and replayed", "naive L1", "materializing",
        "parts of a layer (TB)",
    )  # fmt: skip
    for r in rows:
        made.add_row(
            r.model,
            f"{r.T:,}",
            f"{r.forward_seconds:.3f}",
            *(f"{r.all_positions[extension]:.2f}" for extension in EXTENSIONS),
            f"{r.all_at_peak:.2f}",
            f"{r.route:.5f}",
            f"{r.route_longest:.5f}",
            f"{r.route_replayed:.5f}",
            f"{r.naive:.1f}",
            f"{r.materializing:,.0f}",
            f"{r.materialized_bytes / 1e12:,.2f}",
        )
    return made


def targets_table(model: Model, n_tokens: int, counts: Counts) -> Table:
    """All positions on every target."""
    made = table(
        f"{model.name}, T = {n_tokens}, all positions / forward pass", "target", "TFLOP/s matrix",
        "TFLOP/s fp32", "TB/s", "forward (s)", *EXTENSIONS, "source",
    )  # fmt: skip
    for t in TARGETS.values():
        unit = forward_seconds(model, n_tokens, t)
        scored = attribution(model, n_tokens, n_tokens, t, counts)
        made.add_row(
            t.name,
            f"{t.matrix / 1e12:,.0f}",
            f"{t.fp32 / 1e12:.1f}",
            f"{t.memory / 1e12:.2f}",
            f"{unit:.3f}",
            *(f"{scored[extension].total / unit:.2f}" for extension in EXTENSIONS),
            t.source,
        )
    return made


def main() -> None:
    """Parses the arguments, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", choices=TARGETS, default="H100", help="of the shares")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    args = parser.parse_args()

    counts = Counts(json.loads(COUNTS.read_text()))
    target, models = TARGETS[args.target], [LLAMA_8B, LLAMA_70B]
    out = Console(width=None if Console().is_terminal else 180)
    out.print(counts_table(counts))
    out.print(extension_table(counts, models, 8192))
    widths = sorted(e["D"] for e in counts.document["random"])
    for model in models:
        if widths[-1] < model.D:
            out.print(
                f"{model.name} (D = {model.D}) is beyond what was counted, D <= {widths[-1]}."
            )
    average, longest = route_rows(counts)
    out.print(
        f"Rows a layer of one route at threshold {THRESHOLD}, on the default model: {average} on "
        f"the average, {longest} on the longest of "
        f"{sum(len(e['rows_of_route']) for e in counts.document['frontier'])} routes."
    )
    rows, kernels = [], {}
    for model in models:
        for n_tokens in args.lengths:
            scored = attribution(model, n_tokens, n_tokens, target, counts)
            rows.append(row(model, n_tokens, target, counts, scored))
            kernels[f"{model.name}, T = {n_tokens}"] = scored
            if n_tokens == 8192:
                unit = rows[-1].forward_seconds
                title = f"{model.name}, T = {n_tokens}, {target.name}, all positions, mid"
                out.print(kernel_table(title, scored["mid"], target, unit))
                out.print(targets_table(model, n_tokens, counts))
    out.print(share_table(f"shares of a plain forward pass, {target.name}, bfloat16", rows))
    checked = claims(rows) if target.name == "H100" else []
    for claim in checked:
        out.print(f"{claim.text} ({'>=' if claim.at_least else '<='} {claim.limit}):")
        for name, value in claim.values.items():
            out.print(f"    {'pass' if claim.holds(value) else 'FAIL'}  {value:.4g}  {name}")
    if args.json is not None:
        document = {
            "fractions": {
                "gemm": GEMM._asdict(),
                "flash": FLASH._asdict(),
                "kernels": KERNELS._asdict(),
                "naive": NAIVE._asdict(),
            },
            "target": target._asdict(),
            "rows": [r._asdict() for r in rows],
            "kernels": {
                name: {
                    extension: {
                        kernel: work._asdict() | {"seconds": a.seconds[kernel]}
                        for kernel, work in a.work.items()
                    }
                    for extension, a in scored.items()
                }
                for name, scored in kernels.items()
            },
            "claims": [c._asdict() for c in checked],
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
