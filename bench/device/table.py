"""The table of what the steps found, under 60 lines."""

from __future__ import annotations

from math import isnan
from typing import Any

LIMIT = 58
Line = dict[str, Any]


def table(lines: list[Line]) -> str:
    """A line for each fact; where there are too many, the last sweeps are left out first."""
    by_kind: dict[str, list[Line]] = {}
    for line in lines:
        by_kind.setdefault(line.get("kind", "end"), []).append(line)
    parts = [
        _software(by_kind),
        [_ceiling(x) for x in by_kind.get("ceiling", [])],
        _correctness(by_kind.get("correctness", [])),
        [_tests(x) for x in by_kind.get("tests", [])],
        [_memcheck(x) for x in by_kind.get("memcheck", [])],
        _scoring(by_kind),
        _kernels(by_kind.get("kernel", [])),
        [_model(x) for x in by_kind.get("model", [])],
        [_peer(x) for x in by_kind.get("peer", []) if "ratio" in x or "failed" in x],
        [_profile(x) for x in by_kind.get("profile", [])],
        _sweeps(by_kind.get("sweep", [])),
    ]
    steps = [_end(x) for x in by_kind.get("end", [])]
    body = [text for part in parts for text in part]
    return "\n".join(text[:118] for text in [*body[: LIMIT - len(steps)], *steps])


def number(x: Any) -> str:
    """Three digits, or what it is."""
    return f"{x:.3g}" if isinstance(x, (int, float)) else "none" if x is None else str(x)


def _software(by_kind: dict[str, list[Line]]) -> list[str]:
    found = [
        f"{x['card']}, driver {x['driver']}, {number(x['free_gb'])} GB free"
        for x in by_kind.get("card", [])
    ]
    names = ("python", "torch", "triton", "numpy", "transformers")
    for x in by_kind.get("software", []):
        found.append(", ".join(f"{name} {x.get(name)}" for name in names))
    choices = [f"{x['dtype']}: {x['choice']}" for x in by_kind.get("attention", [])]
    return found + ([f"attention {', '.join(choices)}"] if choices else [])


def _ceiling(x: Line) -> str:
    return f"{x['what']}: {number(x['measured'])}, granted {number(x['expected'])}"


def _correctness(found: list[Line]) -> list[str]:
    """The worst error of each dtype and length, and the cases that are wrong."""
    worst: dict[tuple[str, Any], list[Line]] = {}
    for x in found:
        worst.setdefault((x["dtype"], x.get("T", "sums")), []).append(x)
    out = []
    for (dtype, T), of in worst.items():
        errors = [e for x in of for e in x["errors"].values()]
        error = max(errors, key=lambda e: (isnan(e), e))
        wrong = [x["case"] for x in of if not x["right"]]
        said = f"WRONG: {', '.join(wrong)}" if wrong else "right"
        out.append(f"{dtype}, T = {T}: worst error {error:.1e} of {len(of)} cases, {said}")
    return out


def _tests(x: Line) -> str:
    failed = x["failed"] + x["error"]
    return f"tests: {x['passed']} passed, {failed} failed {' '.join(x['which'])}"


def _memcheck(x: Line) -> str:
    return f"memcheck: {x['errors']} errors in {x['passed']} tests"


def _scoring(by_kind: dict[str, list[Line]]) -> list[str]:
    found = [
        f"layer, T = {x['T']}: forward {number(x['ms'])} ms, predicted {number(x['predicted'])}"
        for x in by_kind.get("forward", [])
        if "predicted" in x
    ]
    for x in by_kind.get("scoring", []):
        found.append(
            f"layer, T = {x['T']}, {x['rows']} rows: {number(x['ms'])} ms, predicted "
            f"{number(x['predicted'])}, {number(x['units'])} forward; a row "
            f"{x['light']:.0f} light, {x['heavy']:.0f} heavy"
        )
    return found


def _kernels(found: list[Line]) -> list[str]:
    """Kernels of the longest text scored whole: time, prediction, their ratio."""
    whole = [x for x in found if x["rows"] == x["T"]]
    if not whole:
        return []
    T = max(x["T"] for x in whole)
    own = sorted((x for x in whole if x["T"] == T), key=lambda x: -x["ms"])[:13]
    return [f"kernel at T = {T}: ms, predicted, ratio (bound)"] + [
        f"  {x['kernel']:22}{number(x['ms']):>9}{number(x['predicted']):>9}"
        f"{x['ms'] / max(x['predicted'], 1e-9):9.2f} ({x['bound']})"
        for x in own
    ]


def _model(x: Line) -> str:
    said = f"model, T = {x['T']}, {x['what']}: {number(x['seconds'])} s"
    said += f", {number(x['units'])} forward passes"
    return said if x["predicted"] is None else f"{said}, predicted {number(x['predicted'])}"


def _peer(x: Line) -> str:
    if "failed" in x:
        return f"{x['what']}: {x['failed']}"
    return f"{x['what']}, T = {x['T']}: {number(x['ms'])} ms, {number(x['ratio'])} times ours"


def _profile(x: Line) -> str:
    names = ("ns", "processor", "matrix", "cache", "memory", "warps", "registers")
    return f"{x['kernel']}: " + ", ".join(f"{name} {x.get(name)}" for name in names)


def _sweeps(found: list[Line]) -> list[str]:
    """Every change, the best first."""
    done = sorted((x for x in found if "failed" not in x), key=lambda x: x["all_kernels"])
    return [
        f"sweep {x['kernel']} {x['what']}: {number(x['ms'])} ms, all kernels "
        f"{number(x['all_kernels'])}"
        for x in done
    ] + [f"sweep {x['kernel']} {x['what']}: {x['failed']}" for x in found if "failed" in x]


def _end(x: Line) -> str:
    why = f": {x['why']}" if "why" in x else ""
    return f"{x['step']}: {x['end']}, {number(x['seconds'])} s{why}"
