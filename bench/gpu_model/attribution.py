"""Expected seconds of the Triton kernels beside the forward pass, and the claims made of them."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

import torch
from gpu_model.counts_model import Counts
from gpu_model.forward import forward_seconds, materializing, naive_l1
from gpu_model.shapes import (
    BYTES,
    EXTENSIONS,
    KERNELS,
    LLAMA_8B,
    NAIVE,
    PEAK,
    READ_SECONDS,
    RECORDED_TOKENS,
    SMOLLM2,
    THRESHOLD,
    Model,
    Target,
    Work,
)
from gpu_model.triton_work import Block, Lists, asked, blocks_of

from ifr_fast.kernels.contract import LayerInputs

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
    """Kernels of all layers on one target. Seconds are those of each launch, added up."""

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
    """A goal of the kernels, on an H100 with Llama-3-8B."""

    text: str
    limit: float
    values: dict[str, float]  # by extension, or by what else it was taken
    at_least: bool = False

    def holds(self, value: float) -> bool:
        """True if a value keeps the limit."""
        return value >= self.limit if self.at_least else value <= self.limit


def claims(rows: list[Row]) -> list[Claim]:
    """Claims from the rows of Llama-3-8B on an H100."""
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
        found.append(Claim("all positions at 8k / forward pass", 1.5, r.all_positions | at_peak))
        less = {name: r.naive / share for name, share in r.all_positions.items()}
        found.append(Claim("naive fused L1 at 8k / all positions", 20, less, at_least=True))
    return found
