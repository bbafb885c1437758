"""Everything about a task on one model, into a folder: tables, figures and a short report.

Stages, each kept in the folder's `work/` as soon as it is done, so that the same command goes on
after an interruption: that interventions are exact; what routes and patching cost; routes of
prompts and twins; denoising, noising; agreement; keep-only and remove-only; input tokens.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..benchmark import machine
from ..errors import FormatError, IfrError
from ..storage import whole_file, write_text
from ..tracer import Tracer
from . import cost as costs
from .agreement import (
    LEVEL,
    Agreement,
    Interval,
    agreement,
    agreement_with,
    auc,
    mean_interval,
    ratio_interval,
    roc_curve,
    share_interval,
)
from .contrast import Components, components
from .faithfulness import (
    METHODS,
    THRESHOLDS,
    UNITS,
    Mode,
    Of,
    Survival,
    Unit,
    attention_weights,
    survival,
)
from .inputs import Curves, available, missing, token_faithfulness
from .interventions import observe, restarting, run
from .patching import Effects, patch
from .published import Circuit, as_mask, published_circuit
from .tasks import TASKS, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = ", size"  # of an account that ranks by the size of its mean, whatever the sign
ACCOUNTS = (
    "contrastive routes",
    "contrastive routes" + _SIZE,
    "contrastive routes, frequency",
    "plain routes",
    "plain routes, frequency",
    "attention",
    "contrastive attention",
)
INPUTS = {"all tokens": False, "last token kept": True}  # what deletion may reach
_POOR = 0.7  # an area under the ROC curve below it is said to be poor
_SHOWN = 8  # heads that disagree
_CURVES = ("RISE", "MAS", "insertion")
_EXACT_TEXTS = 4
_EXACT_LAYERS = 10
_WANTED = 0.95  # share of prompts on which routes are to beat random graphs


@dataclass(frozen=True)
class Settings:
    """What is measured, and how much of it."""

    task: str = "ioi"
    n_prompts: int = 50
    seed: int = 0
    threshold: float = 0.01  # of the routes that are compared with patching
    least: float = 0.02  # share of the clean-to-twin difference that makes a head positive
    patch_prompts: int | None = None  # the first so many are patched; None: all
    keep_prompts: int | None = None  # the first so many are ablated; None: all that are patched
    thresholds: tuple[float, ...] = THRESHOLDS  # of the graphs that are kept
    remove_thresholds: tuple[float, ...] = (0.01, 0.04)
    draws: int = 20  # of random graphs
    cost_prompts: int = 5  # that are patched position by position
    input_prompts: int = 20

    def check(self) -> None:
        """Raises ValueError for what cannot be measured."""
        if self.task not in TASKS:
            raise ValueError(f"--task: expected one of {', '.join(TASKS)}, got {self.task!r}")
        asked = ("n_prompts", "draws", "cost_prompts", "input_prompts", "patch_prompts",
                 "keep_prompts")  # fmt: skip
        for name in asked:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.least < 1:
            raise ValueError(f"least: expected a number between 0 and 1, got {self.least}")


class Results(NamedTuple):
    """What a report tells of."""

    settings: Settings
    task: Task
    exact: dict[str, float]  # largest change of a logit
    cost: list[costs.Cost]
    accounts: dict[str, Tensor]  # [P, L * H]
    effects: dict[str, Effects]  # by direction
    agreements: dict[str, dict[str, Agreement]]  # by direction (or "published"), account
    sensitivity: dict[float, dict[str, float]]  # AUC against denoising, by `least`
    kept: Survival
    removed: Survival
    inputs: dict[str, dict[str, list[Curves]]]  # by INPUTS, method
    ffn: Components  # contrastive
    published: Circuit | None


def make_report(
    tracer: Tracer, out: Path, settings: Settings, *, model_name: str | None = None
) -> Results:
    """Measures what `settings` say and writes the folder `out`; returns what was found.

    model_name: as the user named it; heads that others published are compared where it is theirs.
    """
    settings.check()
    if tracer.tokenizer is None:
        raise ValueError("tracer: has no tokenizer, and tasks are made of text")
    whole = TASKS[settings.task](tracer.tokenizer, settings.n_prompts, seed=settings.seed)
    task = _first(whole, settings.patch_prompts or len(whole))
    few = _first(whole, settings.input_prompts)
    ablated = _first(whole, settings.keep_prompts or len(task))
    step = max(1, len(whole) // settings.cost_prompts)
    sample = _first(replace(whole, prompts=whole.prompts[::step]), settings.cost_prompts)
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    stages = _Stages(work, _identity(tracer, whole))
    decoder = tracer.decoder

    exact = stages.of("exact", [], lambda: exactness(tracer, task))
    cost = [
        costs.Cost(*row)
        for row in stages.of(
            "cost",
            [len(sample), settings.threshold],
            lambda: costs.measure_cost(
                tracer, whole, sample, threshold=settings.threshold, checkpoint=work / "cost"
            ),
        )
    ]
    accounts, ffn = _accounts(tracer, task, settings.threshold)
    effects = {
        "denoise": patch(decoder, task, direction="denoise", checkpoint=work / "denoise"),
        "noise": patch(decoder, task, direction="noise", checkpoint=work / "noise"),
    }
    agreements = {
        direction: {
            name: agreement(
                scores,
                of.heads.flatten(1),
                least=settings.least,
                gap=of.prompt - of.against,
                absolute=name.endswith(_SIZE),
                seed=settings.seed,
            )
            for name, scores in accounts.items()
        }
        for direction, of in effects.items()
    }
    circuit = published_circuit(task.name, model_name)
    if circuit is not None:
        heads = as_mask(circuit, decoder.n_layers, decoder.n_heads).flatten()
        agreements["published"] = {
            name: agreement_with(scores, heads, absolute=name.endswith(_SIZE), seed=settings.seed)
            for name, scores in accounts.items()
        }

    def left(mode: Mode, thresholds: Sequence[float]) -> Survival:
        return survival(
            tracer,
            ablated,
            mode=mode,
            thresholds=thresholds,
            draws=settings.draws,
            seed=settings.seed,
            checkpoint=work / mode,
        )

    kept = left("keep", settings.thresholds)
    removed = left("remove", settings.remove_thresholds)
    inputs = {
        reach: {
            name: [Curves(*row) for row in rows]
            for name, rows in stages.of(
                f"inputs-{reach.replace(' ', '-')}",
                [len(few), available(tracer)],
                partial(token_faithfulness, tracer, few, keep_last=keep_last, seed=settings.seed),
            ).items()
        }
        for reach, keep_last in INPUTS.items()
    }
    results = Results(
        settings,
        task,
        exact,
        cost,
        accounts,
        effects,
        agreements,
        _sensitivity(accounts, effects["denoise"]),
        kept,
        removed,
        inputs,
        ffn,
        circuit,
    )
    _write(tracer, results, out, model_name)
    return results


def _first(task: Task, n: int) -> Task:
    return replace(task, prompts=task.prompts[:n])


class _Stages(NamedTuple):
    """Results of stages as JSON files of a folder."""

    folder: Path
    identity: str

    def of(self, name: str, asked: list[Any], compute: Callable[[], Any]) -> Any:
        """What a stage found, computed unless the folder has it for the same question."""
        path = self.folder / f"{name}.json"
        key = hashlib.sha256(json.dumps([self.identity, asked]).encode()).hexdigest()
        if path.exists():
            try:
                kept = json.loads(path.read_text())
                if kept["identity"] == key:
                    return kept["found"]
            except (ValueError, LookupError, TypeError) as error:
                raise FormatError(f"{path}: is no stage's result ({error})") from error
        found = json.loads(json.dumps(compute()))
        write_text(path, json.dumps({"identity": key, "found": found}) + "\n")
        return found


def _identity(tracer: Tracer, task: Task) -> str:
    asked = [tracer.decoder.fingerprint(), task.texts, task.twins, [p.right for p in task.prompts]]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


@torch.inference_mode()
def exactness(tracer: Tracer, task: Task) -> dict[str, float]:
    """The largest change of any logit of the model itself, called by nobody else, in interventions
    that should change none.
    """
    decoder = tracer.decoder
    seen = [observe(decoder, [text]) for text in task.texts[:_EXACT_TEXTS]]
    names = ("nothing", "own activations, whole run", "own activations, restarted")
    worst = dict.fromkeys((*names, "own activations, restarted alone"), 0.0)
    step = max(1, decoder.n_layers // _EXACT_LAYERS)
    of = torch.zeros(1, dtype=torch.int64)
    for one, text in zip(seen, task.texts, strict=False):
        plain = tracer.model(input_ids=torch.tensor([text], device=decoder.device)).logits[:, -1]

        def note(name: str, got: Tensor, plain: Tensor = plain) -> None:
            worst[name] = max(worst[name], float((got - plain).abs().max()))

        note("nothing", run(decoder, [text], heads=lambda _, z: z, ffn=lambda _, x: x))
        own = run(
            decoder,
            [text],
            heads=lambda layer, _, one=one: one.z[layer],  # type: ignore[misc]
            ffn=lambda layer, _, one=one: one.ffn[layer],  # type: ignore[misc]
        )
        note("own activations, whole run", own)
        with restarting(decoder):
            for layer in range(0, decoder.n_layers, step):
                for t in (0, one.n_tokens // 2, one.n_tokens - 1):
                    for paired, name in ((True, names[2]), (False, f"{names[2]} alone")):
                        span = (layer, of, t, t + 1)
                        z, ffn = one.z[layer][:, t : t + 1], one.ffn[layer][:, t : t + 1]
                        note(name, one.restart(*span, z=z, paired=paired))
                        note(name, one.restart(*span, ffn=ffn, paired=paired))
    return worst


@torch.inference_mode()
def _accounts(tracer: Tracer, task: Task, threshold: float) -> tuple[dict[str, Tensor], Components]:
    """Scores of heads by each account, [P, L * H] each; and FFN blocks' contrastive ones."""
    graphs = tracer.trace(task.texts, threshold=threshold)
    twins = tracer.trace(task.twins, threshold=threshold)
    found: dict[str, Tensor] = {}
    for suffix, measure in (("", "importance"), (", frequency", "frequency")):
        plain, other = components(graphs, measure), components(twins, measure)  # type: ignore[arg-type]
        found["contrastive routes" + suffix] = (plain - other).heads.flatten(1)
        found["plain routes" + suffix] = plain.heads.flatten(1)
        if measure == "importance":
            ffn = plain - other
    largest, moved = [], []
    for text, twin in zip(task.texts, task.twins, strict=True):
        weights, others = (
            attention_weights(tracer.decoder, x)[:, :, -1].double() for x in (text, twin)
        )
        largest.append(weights[..., 1:-1].amax(-1).flatten())
        moved.append((weights - others).abs().sum(-1).flatten() / 2)
    found["contrastive routes" + _SIZE] = found["contrastive routes"]
    found["attention"] = torch.stack(largest)
    found["contrastive attention"] = torch.stack(moved)
    return {name: found[name] for name in ACCOUNTS}, ffn


def _means(name: str, scores: Tensor) -> Tensor:
    """[N] what an account ranks heads by."""
    return scores.mean(0).abs() if name.endswith(_SIZE) else scores.mean(0)


def _shares(effects: Effects) -> Tensor:
    """[P, L, H] effects in shares of the mean difference that there was."""
    return effects.heads / effects.gap


def _sensitivity(accounts: Mapping[str, Tensor], effects: Effects) -> dict[float, dict[str, float]]:
    """Areas under the ROC curve where other effects make a head positive; NaN where none or all
    are.
    """
    size = _shares(effects).mean(0).abs().flatten()
    found = {}
    for least in (0.005, 0.01, 0.02, 0.05, 0.1):
        hits = size >= least
        both = 0 < int(hits.sum()) < len(hits)
        found[least] = {
            name: auc(_means(name, scores), hits) if both else math.nan
            for name, scores in accounts.items()
        } | {"positives": float(hits.sum())}
    return found


# Writing


def _write(tracer: Tracer, results: Results, out: Path, model_name: str | None) -> None:
    decoder = tracer.decoder
    L, H = decoder.n_layers, decoder.n_heads
    effects = {name: _shares(of).mean(0) for name, of in results.effects.items()}
    means = {name: _means(name, x).view(L, H) for name, x in results.accounts.items()}
    rows = [
        [layer, head]
        + [f"{float(x[layer, head]):.6g}" for x in (*means.values(), *effects.values())]
        for layer in range(L)
        for head in range(H)
    ]
    _table(out / "heads.csv", ["layer", "head", *means, *effects], rows)
    of_ffn = {
        "contrastive routes": results.ffn.ffn.mean(0),
        **{name: (of.ffn / of.gap).mean(0) for name, of in results.effects.items()},
    }
    _table(
        out / "ffn.csv",
        ["layer", *of_ffn],
        [[layer, *(f"{float(x[layer]):.6g}" for x in of_ffn.values())] for layer in range(L)],
    )
    for name, of in (("keep.csv", results.kept), ("remove.csv", results.removed)):
        header, lines = _survival_rows(of, results.settings.seed)
        _table(out / name, header, lines)
    header, lines = _input_rows(results)
    _table(out / "inputs.csv", header, lines)
    write_text(
        out / "results.json",
        json.dumps(_finite(_document(tracer, results, model_name)), indent=1, allow_nan=False)
        + "\n",
    )
    _savefig(_roc_figure(results, L, H), out / "roc.png")
    _savefig(_heads_figure(results, L, H), out / "heads.png")
    _savefig(_survival_figure(results), out / "keep.png")
    write_text(out / "report.md", _report(tracer, results, model_name))


def _table(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _survival_rows(of: Survival, seed: int) -> tuple[list[str], list[list[str]]]:
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
                left = [_ratio(of, unit, method, m, what, seed) for what in ("ld", "probability")]
                left.append(_restored(of, unit, method, m, seed))
                rows.append(
                    [f"each {unit}", f"{threshold:g}", method]
                    + [f"{x:.4f}" for x in (*sizes, *left[0], *left[1], *left[2])]
                    + (beats if method == "routes" else ["", ""])
                )
    return header, rows


def _ratio(of: Survival, unit: Unit, method: str, m: int, what: Of, seed: int) -> Interval:
    """What is left of the prompts' mean logit difference or probability."""
    full = of.full[what == "probability"]
    return ratio_interval(of.left(unit, method, what)[:, m], full, seed=seed)


def _restored(of: Survival, unit: Unit, method: str, m: int, seed: int) -> Interval:
    """What is left of the mean logit difference beyond what is there with everything ablated."""
    empty = of.empty[0]
    return ratio_interval(of.left(unit, method)[:, m] - empty, of.full[0] - empty, seed=seed)


def _input_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    header = ["deleted", "method"]
    header += [f"{name}{edge}" for name in _CURVES for edge in ("", " low", " high")]
    rows = []
    for reach, of_methods in results.inputs.items():
        for name, curves in of_methods.items():
            found = _curve_means(curves, results.settings.seed)
            rows.append([reach, name, *(f"{x:.4f}" for interval in found for x in interval)])
    return header, rows


def _curve_means(curves: Sequence[Curves], seed: int) -> list[Interval]:
    """RISE, MAS and insertion."""
    return [mean_interval(x, seed=seed) for x in torch.tensor(curves, dtype=torch.float64).T]


def _document(tracer: Tracer, results: Results, model_name: str | None) -> dict[str, Any]:
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
                for name, found in by_account.items()
            }
            for direction, by_account in results.agreements.items()
        },
        "sensitivity": results.sensitivity,
    }


def _finite(x: Any) -> Any:
    """A document with null for every number that is not defined: JSON has none for it."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise IfrError("matplotlib is not installed: pip install 'ifr-fast[circuits]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _savefig(figure: Figure, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _roc_figure(results: Results, L: int, H: int) -> Figure:
    figure = _figure(10, 4.6)
    for axes, (direction, effects) in zip(
        figure.subplots(1, 2), results.effects.items(), strict=True
    ):
        hits = _shares(effects).mean(0).abs().flatten() >= results.settings.least
        both = 0 < int(hits.sum()) < len(hits)  # else there is no curve
        for name, scores in results.accounts.items() if both else ():
            found = results.agreements[direction][name].auc
            axes.plot(*roc_curve(_means(name, scores), hits), label=f"{name}: {found.value:.2f}")
        axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8, label="chance: 0.50")
        axes.set(xlabel="false positive rate", ylabel="true positive rate")
        axes.set_title(f"against patching ({direction}): {int(hits.sum())} of {L * H} heads")
        axes.legend(fontsize=7, title="area under the curve", title_fontsize=7, loc="lower right")
    return figure


def _heads_figure(results: Results, L: int, H: int) -> Figure:
    figure = _figure(12, max(4, 0.2 * L))
    shown = {
        "plain routes": results.accounts["plain routes"].mean(0).view(L, H),
        "contrastive routes": results.accounts["contrastive routes"].mean(0).view(L, H),
        **{f"patching ({k})": _shares(of).mean(0) for k, of in results.effects.items()},
    }
    for axes, (name, values) in zip(figure.subplots(1, 4), shown.items(), strict=True):
        limit = float(values.abs().max()) or 1.0
        image = axes.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        axes.set(title=name, xlabel="head", ylabel="layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes, fraction=0.05)
    return figure


def _survival_figure(results: Results) -> Figure:
    figure = _figure(11, 7.5)
    grid = figure.subplots(2, 2, sharex=True)
    of, titles = results.kept, {"ld": "logit difference", "probability": "probability"}
    for row, (what, title) in zip(grid, titles.items(), strict=True):
        for axes, unit in zip(row, UNITS, strict=True):
            for method in METHODS:
                found = [
                    _ratio(of, unit, method, m, what, 0)  # type: ignore[arg-type]
                    for m in range(len(of.thresholds))
                ]
                values, low, high = zip(*found, strict=True)
                (line,) = axes.plot(of.thresholds, values, marker="o", markersize=4, label=method)
                axes.fill_between(of.thresholds, low, high, color=line.get_color(), alpha=0.12)
            for level in (0, 1):
                axes.axhline(level, color="#999999", linewidth=0.8, zorder=0)
            axes.set_xscale("log")
            axes.set_xticks(of.thresholds, [f"{x:g}" for x in of.thresholds])
            axes.set_xticks([], minor=True)
            axes.set(ylabel=f"share of the {title} left", title=f"each {unit}")
    for axes in grid[1]:
        axes.set_xlabel("threshold of the route graph")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _report(tracer: Tracer, results: Results, model_name: str | None) -> str:
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
        f"{mean_interval(denoised.against)} on their twins; it is above 0 on "
        f"{float((denoised.prompt > 0).double().mean()):.0%} of the prompts.\n",
        "## Interventions\n",
        "Largest change of any logit, where none should change:\n",
        _markdown(["put in", "change"], [[k, f"{x:.1e}"] for k, x in results.exact.items()]),
        "A restarted run is taken against the same batch's run of the text with its own "
        "activations, so that these change nothing by the way they are counted; “alone” is without "
        "that, and shows how a restarted batch rounds.\n",
        "## Cost\n",
        _cost_text(results),
        "## Agreement with patching, per head\n",
        *_agreement_texts(results, tracer),
        "## Keep-only\n",
        "Everything outside a graph is set to its mean over texts of the same template, position "
        "by position.\n",
        *_survival_texts(results.kept, s),
        "## Remove-only\n",
        "The graph's components are set to their means, the rest is kept: the less is left, the "
        "more of the prediction went through them.\n",
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
    header = ["what", "prompts", "model runs", "computed, in forward passes", "seconds",
              "seconds a prompt", "in forward passes' time"]  # fmt: skip
    rows = []
    for c in results.cost:
        each_in_units = f"{c.seconds_each / unit:,.1f}"
        times = (f"{c.seconds:.2f}", f"{c.seconds_each:.3f}", each_in_units)
        rows.append([c.what, c.prompts, f"{c.runs:,}", f"{c.passes:,.0f}", *times])
    table = _markdown(header, rows)
    each, heads = by_name[costs.EACH][0], by_name[costs.HEADS][0]
    same, whole = by_name[costs.ROUTES][-1], by_name[costs.ROUTES][0]
    twins = by_name[costs.ROUTES_OF_BOTH][-1]
    return (
        f"{results.cost[0].threads} threads; patching heads alone.\n\n{table}\n"
        f"Of the same prompts ({each.prompts}), patching heads at each position takes "
        f"**{each.seconds / same.seconds:,.0f} times** as long as plain routes and "
        f"{each.seconds / twins.seconds:,.0f} times as long as contrastive ones (which trace the "
        f"twins too); patching heads at all positions at once {heads.seconds / same.seconds:,.0f} "
        f"and {heads.seconds / twins.seconds:,.0f} times. Routes of all {whole.prompts} prompts "
        f"took {whole.seconds:.2f} s; at {each.seconds_each:.1f} s a prompt (scaled, not run), "
        "patching them at each position would take "
        f"{each.seconds_each * whole.prompts:,.0f} s.\n"
    )


def _agreement_texts(results: Results, tracer: Tracer) -> list[str]:
    L, H = tracer.decoder.n_layers, tracer.decoder.n_heads
    parts = []
    for direction, by_account in results.agreements.items():
        one = next(iter(by_account.values()))
        if direction == "published":
            parts.append(f"### The published circuit: {one.n_positive} of {L * H} heads\n")
        else:
            parts.append(
                f"### Patching ({direction}): {one.n_positive} of {L * H} heads have an effect "
                f"of at least {results.settings.least:.0%} of the difference\n"
            )
        parts.append(
            _markdown(
                ["account", "area under ROC", "rank correlation"]
                + [f"precision at {k}" for k in one.precision],
                [
                    [name, found.auc, found.rank_correlation, *found.precision.values()]
                    for name, found in by_account.items()
                ],
            )
        )
        if direction != "published":
            values = {name: found.auc.value for name, found in by_account.items()}
            best = max(values, key=lambda name: values[name])
            if math.isnan(values[best]):
                parts.append(
                    "Heads with an effect must be some, and not all: no area is defined.\n"
                )
                continue
            parts.append(f"The largest area is that of {best}, {by_account[best].auc}.\n")
            for name in (ACCOUNTS[0], ACCOUNTS[1]):
                parts.append(_disagreement(results, direction, name, H))
    least = list(results.sensitivity)
    counts = [f"{x:.1%} ({results.sensitivity[x]['positives']:.0f} heads)" for x in least]
    parts.append("Area under the ROC curve against denoising, by the effect that counts:\n")
    parts.append(
        _markdown(
            ["account", *counts],
            [
                [name, *(f"{results.sensitivity[x][name]:.2f}" for x in least)]
                for name in results.accounts
            ],
        )
    )
    return parts


def _disagreement(results: Results, direction: str, name: str, H: int) -> str:
    """Which heads an account and patching see otherwise, and whether that is much."""
    scores, signed = _means(name, results.accounts[name]), results.accounts[name].mean(0)
    effects = _shares(results.effects[direction]).mean(0).flatten()
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
        f"The area of {name}, {found}, {verdict} (below {_POOR} is called so). "
        f"Heads with an effect that they rank lowest: {listed(missed) or 'none'}. "
        f"Heads without one that they rank highest: {listed(extra) or 'none'}.\n"
    )


def _survival_texts(of: Survival, s: Settings) -> list[str]:
    full, empty = (mean_interval(x[0], seed=s.seed) for x in (of.full, of.empty))
    parts = [
        f"The logit difference is {full} with nothing set to its mean, and {empty} with everything "
        f"(where small graphs begin, and not at 0). The model solves {int(of.solved.sum())} of "
        f"{len(of.solved)} prompts, that is, prefers the right tokens; in the others a share of "
        "the logit difference is a share of its error. Shares are of means over all prompts.\n"
    ]
    for unit in UNITS:
        for what, name in (("ld", "logit difference"), ("probability", "probability")):
            rows = []
            for m, threshold in enumerate(of.thresholds):
                sizes = ", ".join(f"{x:.0%}" for x in of.kept[unit][:, m].mean(0).tolist())
                shares = [_ratio(of, unit, method, m, what, s.seed) for method in METHODS]  # type: ignore[arg-type]
                rows.append([f"{threshold:g}", sizes, *shares])
            parts.append(f"Each {unit}: share of the {name} left\n")
            parts.append(_markdown(["threshold", "heads, FFN in it", *METHODS], rows))
    kind = "more is left by routes" if of.mode == "keep" else "less is left without routes"
    parts.append(
        f"Share of prompts on which {kind} than by the mean of {s.draws} random graphs, with "
        "Wilson's interval; “over thresholds” compares areas under the curves:\n"
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
    """At which thresholds routes keep more often enough, and what prompts are where they fail."""
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
        "“Answer appended”: the likeliest right token is put behind the prompt, and what is "
        "explained is its own position, as FlashTrace does.\n"
    ]
    for reach, of_methods in results.inputs.items():
        rows = [[name, *_curve_means(curves, seed)] for name, curves in of_methods.items()]
        said = "Any token may be deleted" if reach == "all tokens" else "The last token is kept"
        parts += [f"{said}:\n", _markdown(["method", *_CURVES], rows)]
        rise = {name: _curve_means(curves, seed)[0].value for name, curves in of_methods.items()}
        poor = [name for name in rise if name != "random" and rise[name] >= rise["random"]]
        if poor:
            parts.append(f"By RISE no better than a random order: {', '.join(poor)}.\n")
    return parts
