"""Measured counts of pairs and visits (counts.json), extended to wider models."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from gpu_model.shapes import FILLED, SMOLLM2, Model
from gpu_model.triton_work import Block, Lists


class Growth(NamedTuple):
    """Growth of a count with the width and attention's share, fitted to the random models:
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
    """The measured counts, and their extension to wider models."""

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
