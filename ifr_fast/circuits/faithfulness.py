"""Faithfulness: how much of a prediction is left with only a route graph's components, or without.

Mean ablation sets every head and FFN block outside a graph ("keep"), or inside it ("remove"), to
its mean over a reference corpus. The model is then run: how much of the logit difference is left,
and how much of the probability of the right tokens? The unit is a component, which is kept at all
positions if the graph has it at any ("component"), or one position of a component ("position"): a
graph has a head at the positions that it reads into, and an FFN block at its own positions.

Other selections, in each layer as large as the graph:

- random: as many heads and FFN blocks in each layer, drawn without replacement (for single
  positions: as many pairs of head and position);
- attention: a graph grown as routes are, from the prediction down, but along the largest attention
  weights. Attention weights do not rank FFN blocks, so the route graph's FFN blocks are taken;
- attention without the first token: the same graph, but no edge may lead to the text's first token,
  the sink of most heads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_choice, check_count, check_fraction, check_seed, listed
from ..errors import FormatError
from ..model.attention import AttentionCall, attend_rows
from ..model.decoder import Decoder
from ..model.modes import evaluating
from ..progress import progress
from ..routes.route_graph import RouteGraph
from ..storage.tensors import Format, load_tensors, save_tensors
from ..tracer import Tracer
from .contrast import membership
from .interventions import run
from .patching import Activations, ablated_logits, mean_activations
from .tasks import Task

Unit = Literal["component", "position"]
Quantity = Literal["ld", "probability"]
Mode = Literal["keep", "remove"]

UNITS: tuple[Unit, ...] = ("component", "position")
METHODS = ("routes", "attention", "attention without the first token", "random")
THRESHOLDS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04)
_FORMAT = Format("ifr_fast.faithfulness", version=2, oldest=2, checked_from=2)


class Selection(NamedTuple):
    """A set of a model's components, or of their positions in a text."""

    heads: Tensor  # bool [L, H], or [L, H, T]
    ffn: Tensor  # bool [L], or [L, T]


def selected(graph: RouteGraph, unit: Unit) -> Selection:
    """The components, or their positions, that a graph has."""
    if unit not in UNITS:
        raise ValueError(f"unit: expected 'component' or 'position', got {unit!r}")
    heads, ffn = membership(graph)
    return Selection(heads, ffn) if unit == "position" else Selection(heads.any(-1), ffn.any(-1))


def random_selection(like: Selection, generator: torch.Generator) -> Selection:
    """A random selection with as many heads and FFN blocks in each layer as `like` has."""

    def shuffled(x: Tensor) -> Tensor:
        flat = x.reshape(len(x), -1)
        order = torch.rand(flat.shape, generator=generator).argsort(-1)
        return flat.gather(-1, order).view(x.shape)

    return Selection(shuffled(like.heads), shuffled(like.ffn))


def attention_selection(
    weights: Tensor, like: Selection, *, position: int = -1, first_token: bool = True
) -> Selection:
    """A selection as large as `like` in each layer, grown along the largest attention weights.

    weights: [L, H, T, T]. Layers are visited from the top down, beginning with the prediction's
    position. In each layer the edges into the positions reached so far are taken, largest first,
    until as many heads (or pairs of head and position) have an edge as `like` has. Their sources
    are then reached too. FFN blocks are those of `like`. first_token: whether edges may lead to the
    first token.
    """
    L, _, T, _ = weights.shape
    heads = torch.zeros_like(like.heads)
    reached = torch.zeros(T, dtype=torch.bool)
    reached[position] = True
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    if not first_token:
        visible[1:, 0] = False
    for layer in reversed(range(L)):
        wanted = int(like.heads[layer].sum())
        candidates = torch.where(visible & reached[:, None], weights[layer], -1.0).flatten()
        for edge in candidates.argsort(descending=True, stable=True).tolist():
            if int(heads[layer].sum()) == wanted or candidates[edge] < 0:
                break
            head, target, source = edge // (T * T), edge // T % T, edge % T
            if heads.ndim == 3:
                heads[layer, head, target] = True
            else:
                heads[layer, head] = True
            reached[source] = True
    return Selection(heads, like.ffn)


@torch.inference_mode()
def attention_weights(decoder: Decoder, token_ids: Sequence[int] | Tensor) -> Tensor:
    """Attention weights of a text, [L, H, T, T] in the model's dtype, on the CPU.

    If each position's value is its own unit vector, the attention output is the weights.
    """
    decoder.refuse_recurrences("that has no attention weights of this kind")
    ids = torch.as_tensor(token_ids, dtype=torch.int64)
    of_module = {block.attention: block.layer for block in decoder.blocks}
    found: dict[int, Tensor] = {}

    def answer(call: AttentionCall) -> Tensor:
        T = call.q.shape[2]
        rows = torch.arange(T)
        unit = torch.eye(T, dtype=call.v.dtype, device=call.v.device)
        units = call._replace(v=unit.expand(*call.v.shape[:2], T, T))
        found[of_module[call.module]] = attend_rows(units, call.q, rows)[0].transpose(0, 1)
        return attend_rows(call, call.q, rows)

    with evaluating(decoder.model), decoder.attention_through(decoder.model, answer):
        decoder.forward(ids)
    return torch.stack([found[layer].cpu() for layer in range(decoder.n_layers)])


@dataclass(frozen=True, eq=False)
class Survival:
    """The part of P prompts' predictions that is left at M thresholds, float64."""

    mode: Mode
    thresholds: list[float]
    logit_difference: dict[tuple[Unit, str], Tensor]  # [P, M], "random" [P, M, draws]
    probability: dict[tuple[Unit, str], Tensor]  # shapes as above
    kept: dict[Unit, Tensor]  # [P, M, 2] share of heads and of FFN blocks that the graph has
    full: tuple[Tensor, Tensor]  # [P] logit difference and probability with nothing ablated
    empty: tuple[Tensor, Tensor]  # [P] with everything ablated

    @property
    def solved(self) -> Tensor:
        """[P] bool: whether the model prefers the right tokens with nothing ablated. Elsewhere the
        share of the logit difference that is kept is a share of an error.
        """
        return self.full[0] > 0

    def left(self, unit: Unit, method: str, of: Quantity = "ld") -> Tensor:
        """[P, M] logit difference or probability; for random graphs, the mean over draws."""
        found = (self.logit_difference if of == "ld" else self.probability)[unit, method]
        return found.mean(-1) if found.ndim == 3 else found

    def share(self, unit: Unit, method: str, of: Quantity = "ld") -> Tensor:
        """[P, M] the share of the unablated logit difference or probability that is left."""
        return self.left(unit, method, of) / self.full[of == "probability"][:, None]

    def area(self, unit: Unit, method: str, of: Quantity = "ld") -> Tensor:
        """[P] the mean share over the logarithm of the threshold, by trapezoids. With a single
        threshold it is the share itself.
        """
        share, x = self.share(unit, method, of), torch.tensor(self.thresholds).double().log()
        if len(x) == 1:
            return share[:, 0]
        return torch.trapezoid(share, x) / (x[-1] - x[0])

    def beats_random(self, unit: Unit, of: Quantity = "ld") -> Tensor:
        """[P, M] bool: whether routes keep a larger share than the mean of the random graphs (in
        "remove" mode: whether less is left without the routes than without random graphs).
        """
        return self._better(self.share(unit, "routes", of), self.share(unit, "random", of))

    def area_beats_random(self, unit: Unit, of: Quantity = "ld") -> Tensor:
        """[P] bool: as `beats_random`, with areas over thresholds in place of shares."""
        return self._better(self.area(unit, "routes", of), self.area(unit, "random", of))

    def _better(self, routes: Tensor, random: Tensor) -> Tensor:
        return routes > random if self.mode == "keep" else routes < random


@torch.inference_mode()
def survival(
    tracer: Tracer,
    task: Task,
    values: Activations | None = None,
    *,
    mode: Mode = "keep",
    thresholds: Sequence[float] = THRESHOLDS,
    draws: int = 20,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Survival:
    """Keeps, or removes, each prompt's route graph at each threshold, and other graphs as large.

    values: replace ablated activations, means over a reference corpus; by default the means at each
    position over the prompt's own references (`Prompt.references`). checkpoint: a folder that keeps
    the result of each prompt, so that prompts can be added later. Graphs have granularity "head".
    """
    check_choice("mode", mode, ("keep", "remove"))
    check_seed("seed", seed)
    at = sorted(check_fraction("thresholds", x) for x in listed("thresholds", thresholds))
    if not at:
        raise ValueError("thresholds: is empty; expected at least one")
    draws = check_count("draws", draws)
    decoder, folder = tracer.decoder, None if checkpoint is None else Path(checkpoint)
    digest = hashlib.sha256(decoder.fingerprint().encode())
    if values is not None:
        values.digest_into(digest)
    found = []
    with progress(f"{mode}-only", len(task)) as show:
        for i in range(len(task)):
            path = None if folder is None else folder / f"{i}.safetensors"
            prompt, of_prompt = task.prompts[i], digest.copy()
            references = prompt.references if values is None else None
            answers = prompt.right, prompt.wrong
            question = (mode, at, draws, seed, prompt.token_ids, *answers, references)
            of_prompt.update(json.dumps(question).encode())
            identity = of_prompt.hexdigest()
            if path is not None and path.exists():
                tensors, fields = load_tensors(path, _FORMAT)
                if fields.get("identity") != identity:
                    raise FormatError(f"{path}: belongs to another model, task or setting")
            else:
                tensors = _survival_of(tracer, task, i, values, mode, at, draws, seed)
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    save_tensors(path, _FORMAT, tensors, {"identity": identity})
            found.append(tensors)
            show(i + 1)

    def stacked(name: str) -> Tensor:
        return torch.stack([tensors[name] for tensors in found])

    tables: list[dict[tuple[Unit, str], Tensor]] = []
    for name in ("ld", "probability"):
        values_of = stacked(name)  # [P, U, M, 3 + draws]
        table = {}
        for u, unit in enumerate(UNITS):
            for m, method in enumerate(METHODS):
                column = values_of[:, u, :, m] if method != "random" else values_of[:, u, :, m:]
                table[unit, method] = column
        tables.append(table)
    ends = stacked("ends")  # [P, 2, 2]
    sizes = stacked("kept")
    return Survival(
        mode,
        at,
        tables[0],
        tables[1],
        {unit: sizes[:, u] for u, unit in enumerate(UNITS)},
        (ends[:, 0, 0], ends[:, 0, 1]),
        (ends[:, 1, 0], ends[:, 1, 1]),
    )


def _survival_of(
    tracer: Tracer,
    task: Task,
    i: int,
    values: Activations | None,
    mode: Mode,
    thresholds: list[float],
    draws: int,
    seed: int,
) -> dict[str, Tensor]:
    """One prompt's "ld" and "probability" [U, M, 3 + draws], "kept" [U, M, 2], "ends" [2, 2]."""
    decoder, text = tracer.decoder, task.texts[i]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
    lowest = tracer.trace(text, threshold=thresholds[0], granularity="head")
    graphs = [lowest.prune(threshold) for threshold in thresholds]
    weights = attention_weights(decoder, text).float()
    selections: list[Selection] = []
    sizes = torch.zeros(len(UNITS), len(thresholds), 2, dtype=torch.float64)
    for u, unit in enumerate(UNITS):
        for m, graph in enumerate(graphs):
            routes = selected(graph, unit)
            sizes[u, m] = torch.stack([x.double().mean() for x in routes])
            selections.append(routes)
            for first_token in (True, False):
                selections.append(attention_selection(weights, routes, first_token=first_token))
            selections += [random_selection(routes, generator) for _ in range(draws)]
    if values is None:
        values = mean_activations(decoder, task.prompts[i].references, over="texts")
    T = len(text)
    heads, ffn = (
        torch.stack([x.unsqueeze(-1).expand(*x.shape, T) if x.ndim == rank else x for x in of])
        for rank, of in ((2, [s.heads for s in selections]), (1, [s.ffn for s in selections]))
    )
    if mode == "keep":
        heads, ffn = ~heads, ~ffn
    of_all = torch.ones_like(heads[:1]), torch.ones_like(ffn[:1])
    logits = ablated_logits(
        decoder,
        [text] * (len(heads) + 1),
        values,
        torch.cat([heads, of_all[0]]),
        torch.cat([ffn, of_all[1]]),
    )
    logits = torch.cat([logits, run(decoder, [text])])
    which = torch.full((len(logits),), i)
    shape = (len(UNITS), len(thresholds), len(METHODS) - 1 + draws)
    ld = task.logit_difference(logits, which).cpu()
    probability = task.probability(logits, which).cpu()
    ends = torch.stack([ld[-2:], probability[-2:]], dim=1).flip(0)
    return {
        "ld": ld[:-2].view(shape),
        "probability": probability[:-2].view(shape),
        "kept": sizes,
        "ends": ends,
    }
