"""Expected cost of attribution on a GPU, from shapes alone, beside the model's own forward pass.

For every kernel: operations on matrix units, on vector units, exponentials, bytes to device
memory, bytes that programs ask the caches for. A kernel's time on a target is the largest of these
over the target's ceilings, times the fraction of them that such a kernel may hope for (GEMM, FLASH,
KERNELS, NAIVE in gpu_model/shapes.py). Nothing is timed. Grids and tiles of our kernels are those
that their driver launches; their work follows the formulas of gpu_model/triton_work.py.

The number of pairs that need a correction depends on the model, not on shapes. It is measured
(bench/counts.py, gpu_model/counts.json) and extended to wider models in three ways:

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
from collections import defaultdict
from pathlib import Path
from typing import Any

from gpu_model.attribution import (
    STEP_NAMES,
    STEPS,
    Attribution,
    Row,
    attribution,
    claims,
    route_rows,
    row,
)
from gpu_model.counts_model import Counts, fit
from gpu_model.forward import forward_seconds
from gpu_model.shapes import (
    EXTENSIONS,
    FLASH,
    GEMM,
    KERNELS,
    LLAMA_8B,
    LLAMA_70B,
    NAIVE,
    TARGETS,
    THRESHOLD,
    Model,
    Target,
)
from rich import box
from rich.console import Console
from rich.table import Table

COUNTS = Path(__file__).parent / "gpu_model" / "counts.json"
LENGTHS = (2048, 8192, 32768, 131072)


def table(title: str, *columns: str) -> Table:
    """A table with all but its first column aligned to the right."""
    made = Table(title=title, box=box.HEAVY_HEAD if Console().is_terminal else box.ASCII)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    return made


def counts_table(counts: Counts) -> Table:
    """The measured counts, and the design's bound."""
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
    """Cost of all positions on every target."""
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
