"""All measurements of a task on one model, and the folder that holds them.

The stages are: whether interventions are exact; the cost of routes and patching; routes of prompts
and corrupted prompts; denoising and noising; agreement; keep-only and remove-only; input tokens.
Each stage is saved in the folder's `work/` as soon as it is done. After an interruption, run the
same command again to resume.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import FormatError
from ...storage.checksums import checksum_of_json, damaged
from ...storage.files import write_text
from ...tracer import Tracer
from .. import cost as costs
from ..agreement import agreement, agreement_with, auc
from ..contrast import Components, components
from ..deletion import Curves
from ..exactness import exactness
from ..faithfulness import Mode, Survival, attention_weights, survival
from ..inputs import available, token_faithfulness
from ..patching import Effects, patch
from ..published import as_mask, published_circuit
from ..tasks import TASKS, Task
from .figures import heads_figure, roc_figure, save_figure, survival_figure
from .results import BY_SIZE, HEAD_METHODS, INPUTS, Results, Settings, ranking, shares
from .tables import document, finite, input_rows, survival_rows, write_table
from .text import report_text


def make_report(
    tracer: Tracer, out: Path, settings: Settings, *, model_name: str | None = None
) -> Results:
    """Makes the measurements of `settings`, writes the folder `out` and returns the results.

    model_name: as the user named it. If others published a circuit of that model, heads are
    compared with it.
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
    scores, ffn = _head_scores(tracer, task, settings.threshold)
    effects = {
        "denoise": patch(decoder, task, direction="denoise", checkpoint=work / "denoise"),
        "noise": patch(decoder, task, direction="noise", checkpoint=work / "noise"),
    }
    agreements = {
        direction: {
            name: agreement(
                of_heads,
                of.heads.flatten(1),
                least=settings.least,
                gap=of.prompt - of.against,
                absolute=name.endswith(BY_SIZE),
                seed=settings.seed,
            )
            for name, of_heads in scores.items()
        }
        for direction, of in effects.items()
    }
    circuit = published_circuit(task.name, model_name)
    if circuit is not None:
        heads = as_mask(circuit, decoder.n_layers, decoder.n_heads).flatten()
        agreements["published"] = {
            name: agreement_with(
                of_heads, heads, absolute=name.endswith(BY_SIZE), seed=settings.seed
            )
            for name, of_heads in scores.items()
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
        scores,
        effects,
        agreements,
        _sensitivity(scores, effects["denoise"]),
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
    """A folder with the results of stages, one JSON file each."""

    folder: Path
    identity: str

    def of(self, name: str, question: list[Any], compute: Callable[[], Any]) -> Any:
        """A stage's result, computed unless the folder has it for the same question."""
        path = self.folder / f"{name}.json"
        key = hashlib.sha256(json.dumps([self.identity, question]).encode()).hexdigest()
        if path.exists():
            try:
                kept = json.loads(path.read_text())
                if kept["identity"] == key:
                    if kept["checksum"] != checksum_of_json(kept["found"]):
                        raise damaged(path, "its content")
                    return kept["found"]
            except (ValueError, LookupError, TypeError) as error:
                raise FormatError(f"{path}: is not the result of a stage ({error})") from error
        found = json.loads(json.dumps(compute()))
        kept = {"identity": key, "found": found, "checksum": checksum_of_json(found)}
        write_text(path, json.dumps(kept) + "\n")
        return found


def _identity(tracer: Tracer, task: Task) -> str:
    identity = [
        tracer.decoder.fingerprint(),
        task.texts,
        task.twins,
        [p.right for p in task.prompts],
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


@torch.inference_mode()
def _head_scores(
    tracer: Tracer, task: Task, threshold: float
) -> tuple[dict[str, Tensor], Components]:
    """Scores of heads by each method, [P, L * H] each, and contrastive scores of FFN blocks."""
    graphs = tracer.trace(task.texts, threshold=threshold)
    corrupted = tracer.trace(task.twins, threshold=threshold)
    found: dict[str, Tensor] = {}
    for suffix, measure in (("", "importance"), (", frequency", "frequency")):
        plain, other = components(graphs, measure), components(corrupted, measure)  # type: ignore[arg-type]
        found["contrastive routes" + suffix] = (plain - other).heads.flatten(1)
        found["plain routes" + suffix] = plain.heads.flatten(1)
        if measure == "importance":
            ffn = plain - other
    largest, moved = [], []
    for text, corrupted_text in zip(task.texts, task.twins, strict=True):
        weights, others = (
            attention_weights(tracer.decoder, x)[:, :, -1].double() for x in (text, corrupted_text)
        )
        largest.append(weights[..., 1:-1].amax(-1).flatten())
        moved.append((weights - others).abs().sum(-1).flatten() / 2)
    found["contrastive routes" + BY_SIZE] = found["contrastive routes"]
    found["attention"] = torch.stack(largest)
    found["contrastive attention"] = torch.stack(moved)
    return {name: found[name] for name in HEAD_METHODS}, ffn


def _sensitivity(scores: Mapping[str, Tensor], effects: Effects) -> dict[float, dict[str, float]]:
    """Areas under the ROC curve with other values of `least`; NaN where all heads are positive or
    none is.
    """
    size = shares(effects).mean(0).abs().flatten()
    found = {}
    for least in (0.005, 0.01, 0.02, 0.05, 0.1):
        hits = size >= least
        both = 0 < int(hits.sum()) < len(hits)
        found[least] = {
            name: auc(ranking(name, of_heads), hits) if both else math.nan
            for name, of_heads in scores.items()
        } | {"positives": float(hits.sum())}
    return found


def _write(tracer: Tracer, results: Results, out: Path, model_name: str | None) -> None:
    decoder = tracer.decoder
    L, H = decoder.n_layers, decoder.n_heads
    effects = {name: shares(of).mean(0) for name, of in results.effects.items()}
    means = {name: ranking(name, x).view(L, H) for name, x in results.scores.items()}
    rows = [
        [layer, head]
        + [f"{float(x[layer, head]):.6g}" for x in (*means.values(), *effects.values())]
        for layer in range(L)
        for head in range(H)
    ]
    write_table(out / "heads.csv", ["layer", "head", *means, *effects], rows)
    of_ffn = {
        "contrastive routes": results.ffn.ffn.mean(0),
        **{name: (of.ffn / of.gap).mean(0) for name, of in results.effects.items()},
    }
    write_table(
        out / "ffn.csv",
        ["layer", *of_ffn],
        [[layer, *(f"{float(x[layer]):.6g}" for x in of_ffn.values())] for layer in range(L)],
    )
    for name, of in (("keep.csv", results.kept), ("remove.csv", results.removed)):
        header, lines = survival_rows(of, results.settings.seed)
        write_table(out / name, header, lines)
    header, lines = input_rows(results)
    write_table(out / "inputs.csv", header, lines)
    write_text(
        out / "results.json",
        json.dumps(finite(document(tracer, results, model_name)), indent=1, allow_nan=False) + "\n",
    )
    save_figure(roc_figure(results, L, H), out / "roc.png")
    save_figure(heads_figure(results, L, H), out / "heads.png")
    save_figure(survival_figure(results), out / "keep.png")
    write_text(out / "report.md", report_text(tracer, results, model_name))
