"""The report's text, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...benchmark import machine
from ...tracer import Tracer
from .. import cost as costs
from ..agreement import LEVEL, Interval, mean_interval, share_interval
from ..faithfulness import METHODS, UNITS, Survival, Unit
from ..inputs import missing
from .results import HEAD_METHODS, Results, Settings, ranking, shares
from .tables import CURVES, curve_means, share_left

_POOR = 0.7  # an area under the ROC curve below it is called poor
_SHOWN = 8  # heads listed where a method and patching disagree
_WANTED = 0.95  # share of prompts on which routes should beat random graphs


def _markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def report_text(tracer: Tracer, results: Results, model_name: str | None) -> str:
    s, task = results.settings, results.task
    on = machine(tracer.decoder.device)
    denoised = results.effects["denoise"]
    parts = [
        f"# {task.name}: routes against patching\n",
        f"{model_name or 'The default model'}, {s.n_prompts} prompts, of which {len(task)} are "
        f"patched and {len(results.kept.solved)} ablated, seed {s.seed}; "
        f"{on.processor}, {on.threads} threads, torch {on.torch}, transformers {on.transformers}, "
        f"ifr-fast {on.ifr_fast}. Intervals are {LEVEL:.0%} bootstrap intervals over prompts.\n",
        f"For example: “{task.prompts[0].text}”, against “{task.prompts[0].twin}”. The logit "
        f"difference is {mean_interval(denoised.prompt)} on prompts and "
        f"{mean_interval(denoised.against)} on corrupted prompts; it is above 0 on "
        f"{float((denoised.prompt > 0).double().mean()):.0%} of the prompts.\n",
        "## Interventions\n",
        "Largest change of any logit, where none should change:\n",
        _markdown(["replacement", "change"], [[k, f"{x:.1e}"] for k, x in results.exact.items()]),
        "The effect of a restarted run is its difference from a run of the text with its own "
        "activations in the same batch, so own activations change nothing by definition. “Alone” "
        "is without that, and shows how a restarted batch rounds.\n",
        "## Cost\n",
        _cost_text(results),
        "## Agreement with patching, per head\n",
        *_agreement_texts(results, tracer),
        "## Keep-only\n",
        "Everything outside a graph is set to its mean over texts of the same template, at each "
        "position.\n",
        *_survival_texts(results.kept, s),
        "## Remove-only\n",
        "The graph's components are set to their means, and the rest is kept. The less is left, "
        "the more of the prediction went through them.\n",
        *_survival_texts(results.removed, s),
        "## Input tokens\n",
        *_input_texts(results),
    ]
    for name, package in missing(tracer).items():
        parts.append(f"{name} was not measured: {package}.\n")
    return "\n".join(parts)


def _cost_text(results: Results) -> str:
    by_name: dict[str, list[costs.Cost]] = {}
    for row in results.cost:
        by_name.setdefault(row.what, []).append(row)
    unit = by_name[costs.FORWARD][0].seconds_each
    header = ["method", "prompts", "model runs", "computed, in forward passes", "seconds",
              "seconds a prompt", "in forward passes' time"]  # fmt: skip
    rows = []
    for c in results.cost:
        each_in_units = f"{c.seconds_each / unit:,.1f}"
        times = (f"{c.seconds:.2f}", f"{c.seconds_each:.3f}", each_in_units)
        rows.append([_plain(c.what), c.prompts, f"{c.runs:,}", f"{c.passes:,.0f}", *times])
    table = _markdown(header, rows)
    each, heads = by_name[costs.EACH][0], by_name[costs.HEADS][0]
    same, whole = by_name[costs.ROUTES][-1], by_name[costs.ROUTES][0]
    contrastive = by_name[costs.ROUTES_OF_BOTH][-1]
    return (
        f"{results.cost[0].threads} threads; only heads are patched.\n\n{table}\n"
        f"On the same prompts ({each.prompts}), patching heads at each position takes "
        f"**{each.seconds / same.seconds:,.0f} times** as long as plain routes and "
        f"{each.seconds / contrastive.seconds:,.0f} times as long as contrastive routes (which "
        "trace the corrupted prompts too). Patching heads at all positions at once takes "
        f"{heads.seconds / same.seconds:,.0f} and {heads.seconds / contrastive.seconds:,.0f} times "
        f"as long. Routes of all {whole.prompts} prompts took {whole.seconds:.2f} s. At "
        f"{each.seconds_each:.1f} s a prompt (scaled, not run), patching them at each position "
        "would take "
        f"{each.seconds_each * whole.prompts:,.0f} s.\n"
    )


def _plain(what: str) -> str:
    """The name of a cost with the field's term."""
    return what.replace("twins", "corrupted prompts")


def _agreement_texts(results: Results, tracer: Tracer) -> list[str]:
    L, H = tracer.decoder.n_layers, tracer.decoder.n_heads
    parts = []
    for direction, by_method in results.agreements.items():
        one = next(iter(by_method.values()))
        if direction == "published":
            parts.append(f"### The published circuit: {one.n_positive} of {L * H} heads\n")
        else:
            parts.append(
                f"### Patching ({direction}): {one.n_positive} of {L * H} heads have an effect "
                f"of at least {results.settings.least:.0%} of the difference\n"
            )
        parts.append(
            _markdown(
                ["method", "area under ROC", "rank correlation"]
                + [f"precision at {k}" for k in one.precision],
                [
                    [name, found.auc, found.rank_correlation, *found.precision.values()]
                    for name, found in by_method.items()
                ],
            )
        )
        if direction != "published":
            values = {name: found.auc.value for name, found in by_method.items()}
            best = max(values, key=lambda name: values[name])
            if math.isnan(values[best]):
                parts.append("All heads have such an effect, or none has, so no area is defined.\n")
                continue
            parts.append(f"The largest area is that of {best}: {by_method[best].auc}.\n")
            for name in HEAD_METHODS[:2]:
                parts.append(_disagreement(results, direction, name, H))
    least = list(results.sensitivity)
    counts = [f"{x:.1%} ({results.sensitivity[x]['positives']:.0f} heads)" for x in least]
    parts.append(
        "Area under the ROC curve against denoising, by the smallest effect that counts:\n"
    )
    parts.append(
        _markdown(
            ["method", *counts],
            [
                [name, *(f"{results.sensitivity[x][name]:.2f}" for x in least)]
                for name in results.scores
            ],
        )
    )
    return parts


def _disagreement(results: Results, direction: str, name: str, H: int) -> str:
    """The heads on which a method and patching disagree most, and whether the area is poor."""
    scores, signed = ranking(name, results.scores[name]), results.scores[name].mean(0)
    effects = shares(results.effects[direction]).mean(0).flatten()
    hits = effects.abs() >= results.settings.least
    found = results.agreements[direction][name].auc

    def listed(indices: Sequence[int]) -> str:
        return ", ".join(
            f"{i // H}.{i % H} (routes {float(signed[i]):+.3f}, effect {float(effects[i]):+.3f})"
            for i in indices
        )

    order = scores.argsort(descending=True, stable=True).tolist()
    missed = [i for i in reversed(order) if bool(hits[i])][:_SHOWN]
    extra = [i for i in order if not bool(hits[i])][:_SHOWN]
    verdict = "is poor" if found.value < _POOR else "is not poor"
    return (
        f"The area of {name}, {found}, {verdict} (below {_POOR} is called poor). "
        f"Heads with an effect that they rank lowest: {listed(missed) or 'none'}. "
        f"Heads without an effect that they rank highest: {listed(extra) or 'none'}.\n"
    )


def _survival_texts(of: Survival, s: Settings) -> list[str]:
    full, empty = (mean_interval(x[0], seed=s.seed) for x in (of.full, of.empty))
    parts = [
        f"The logit difference is {full} with nothing set to its mean, and {empty} with everything "
        f"set to its mean, so small graphs do not begin at 0. The model solves "
        f"{int(of.solved.sum())} of {len(of.solved)} prompts, that is, prefers the right tokens. "
        "On the others a share of the logit difference is a share of an error. Shares are those of "
        "means over all prompts.\n"
    ]
    for unit in UNITS:
        for what, name in (("ld", "logit difference"), ("probability", "probability")):
            rows = []
            for m, threshold in enumerate(of.thresholds):
                sizes = ", ".join(f"{x:.0%}" for x in of.kept[unit][:, m].mean(0).tolist())
                shares = [share_left(of, unit, method, m, what, s.seed) for method in METHODS]  # type: ignore[arg-type]
                rows.append([f"{threshold:g}", sizes, *shares])
            parts.append(f"Each {unit}: share of the {name} left\n")
            parts.append(_markdown(["threshold", "heads, FFN in it", *METHODS], rows))
    kind = "more is left by routes" if of.mode == "keep" else "less is left without routes"
    parts.append(
        f"Share of prompts on which {kind} than by the mean of {s.draws} random graphs, with "
        "Wilson's interval; “over thresholds” compares areas under curves:\n"
    )
    columns: dict[str, Callable[[Unit], Tensor]] = {}
    for what, name in (("ld", "logit difference"), ("probability", "probability")):
        for rows_of, which in ((torch.ones_like(of.solved), ""), (of.solved, ", solved prompts")):

            def hits(unit: Unit, what: Any = what, rows_of: Tensor = rows_of) -> Tensor:
                area = of.area_beats_random(unit, what)[:, None]
                return torch.cat([of.beats_random(unit, what), area], dim=1)[rows_of]

            columns[name + which] = hits
    rows = []
    for unit in UNITS:
        found = [[share_interval(x) for x in hits(unit).T] for hits in columns.values()]
        for m, label in enumerate([*(f"{x:g}" for x in of.thresholds), "over thresholds"]):
            rows.append([f"each {unit}", label, *(_percent(column[m]) for column in found)])
    parts.append(_markdown(["ablation", "threshold", *columns], rows))
    if of.mode == "keep":
        parts += [_verdict(of, unit) for unit in UNITS]
    return parts


def _verdict(of: Survival, unit: Unit) -> str:
    """The thresholds at which routes beat random graphs often enough, and how they fail."""
    hits = of.beats_random(unit)
    enough = [f"{x:g}" for x, h in zip(of.thresholds, hits.T, strict=True) if _often(h)]
    failing = [f"{x:g}" for x, h in zip(of.thresholds, hits.T, strict=True) if not _often(h)]
    said = (
        f"Each {unit}: on at least {_WANTED:.0%} of all prompts at {', '.join(enough) or 'none'}"
        + (f"; not at {', '.join(failing)}." if failing else ".")
    )
    lost = ~hits & of.solved[:, None]
    if bool(lost.any()):
        routes, random = (of.left(unit, name)[lost].mean() for name in ("routes", "random"))
        full, empty = (x[0][:, None].expand_as(lost)[lost].mean() for x in (of.full, of.empty))
        said += (
            f" Where they fail on a prompt that the model solves ({int(lost.sum())} times), the "
            f"logit difference is {float(full):.2f} before, {float(routes):.2f} with the routes "
            f"alone, {float(random):.2f} with random graphs and {float(empty):.2f} with "
            "nothing kept."
        )
    return said + "\n"


def _often(hits: Tensor) -> bool:
    return float(hits.double().mean()) >= _WANTED


def _percent(share: Interval) -> str:
    if math.isnan(share.value):
        return ""
    return f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"


def _input_texts(results: Results) -> list[str]:
    seed = results.settings.seed
    n = len(results.inputs["all tokens"]["random"])
    parts = [
        f"{n} prompts. RISE and MAS of deletion: lower is better; insertion: higher is better. "
        "“Answer appended”: the likeliest right token is put behind the prompt, and its own "
        "position is explained, as FlashTrace does.\n"
    ]
    for reach, of_methods in results.inputs.items():
        rows = [[name, *curve_means(curves, seed)] for name, curves in of_methods.items()]
        said = "Any token may be deleted" if reach == "all tokens" else "The last token is kept"
        parts += [f"{said}:\n", _markdown(["method", *CURVES], rows)]
        rise = {name: curve_means(curves, seed)[0].value for name, curves in of_methods.items()}
        poor = [name for name in rise if name != "random" and rise[name] >= rise["random"]]
        if poor:
            parts.append(f"No better than a random order by RISE: {', '.join(poor)}.\n")
    return parts
