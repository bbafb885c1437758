"""Rows of the report's tables, and the document with all its numbers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...benchmark import machine
from ...export.spreadsheets import cell
from ...storage.files import write_text
from ...tracer import Tracer
from ..agreement import Interval, mean_interval, ratio_interval
from ..deletion import Curves
from ..faithfulness import METHODS, UNITS, Quantity, Survival, Unit
from .results import Results

CURVES = ("RISE", "MAS", "insertion")


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Writes a table as CSV. No text in it is a formula to a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text)  # lines end as RFC 4180 says; with others, a "\r" is not quoted
    for row in (header, *rows):
        writer.writerow([cell(x) if isinstance(x, str) else x for x in row])
    write_text(path, text.getvalue())


def survival_rows(of: Survival, seed: int) -> tuple[list[str], list[list[str]]]:
    header = ["ablation", "threshold", "graph", "heads kept", "FFN kept", "logit difference left",
              "low", "high", "probability left", "low", "high", "logit difference restored", "low",
              "high", "beats random", "beats random where solved"]  # fmt: skip
    rows = []
    for unit in UNITS:
        won = of.beats_random(unit).double()
        for m, threshold in enumerate(of.thresholds):
            sizes = of.kept[unit][:, m].mean(0).tolist()
            shares = (float(x[:, m].mean()) for x in (won, won[of.solved]))
            beats = [f"{x:.3f}" for x in shares]
            for method in METHODS:
                left = [
                    share_left(of, unit, method, m, what, seed) for what in ("ld", "probability")
                ]
                left.append(_restored(of, unit, method, m, seed))
                rows.append(
                    [f"each {unit}", f"{threshold:g}", method]
                    + [f"{x:.4f}" for x in (*sizes, *left[0], *left[1], *left[2])]
                    + (beats if method == "routes" else ["", ""])
                )
    return header, rows


def share_left(
    of: Survival, unit: Unit, method: str, m: int, what: Quantity, seed: int
) -> Interval:
    """The share of the prompts' mean logit difference or probability that is left."""
    full = of.full[what == "probability"]
    return ratio_interval(of.left(unit, method, what)[:, m], full, seed=seed)


def _restored(of: Survival, unit: Unit, method: str, m: int, seed: int) -> Interval:
    """The share that is left of the mean logit difference, less that of everything ablated."""
    empty = of.empty[0]
    return ratio_interval(of.left(unit, method)[:, m] - empty, of.full[0] - empty, seed=seed)


def input_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    header = ["deleted", "method"]
    header += [f"{name}{edge}" for name in CURVES for edge in ("", " low", " high")]
    rows = []
    for reach, of_methods in results.inputs.items():
        for name, curves in of_methods.items():
            found = curve_means(curves, results.settings.seed)
            rows.append([reach, name, *(f"{x:.4f}" for interval in found for x in interval)])
    return header, rows


def curve_means(curves: Sequence[Curves], seed: int) -> list[Interval]:
    """Mean RISE, MAS and insertion."""
    return [mean_interval(x, seed=seed) for x in torch.tensor(curves, dtype=torch.float64).T]


def document(tracer: Tracer, results: Results, model_name: str | None) -> dict[str, Any]:
    return {
        "settings": asdict(results.settings),
        "model": model_name,
        "fingerprint": tracer.decoder.fingerprint(),
        "machine": machine(tracer.decoder.device)._asdict(),
        "exact": results.exact,
        "cost": [row._asdict() for row in results.cost],
        "prompts": [
            {"text": p.text, "twin": p.twin, "right": p.right, "wrong": p.wrong}
            for p in results.task.prompts
        ],
        "logit_difference": {
            "prompt": results.effects["denoise"].prompt.tolist(),
            "twin": results.effects["denoise"].against.tolist(),
        },
        "agreement": {
            direction: {
                name: {
                    "auc": found.auc._asdict(),
                    "rank_correlation": found.rank_correlation._asdict(),
                    "precision": {k: x._asdict() for k, x in found.precision.items()},
                    "positives": found.n_positive,
                }
                for name, found in by_method.items()
            }
            for direction, by_method in results.agreements.items()
        },
        "sensitivity": results.sensitivity,
    }


def finite(x: Any) -> Any:
    """A document with None in place of every NaN or infinity, which JSON does not have."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
