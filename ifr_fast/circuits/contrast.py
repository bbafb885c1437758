"""Contrastive routes: how a task's routes differ from those of its corrupted prompts.

Routes name every component that information flowed through, also components that are active in any
text. The paper isolates those of a task by comparing prompts with corrupted prompts, which lack the
task. Here that is the mean difference of components' importances over pairs of graphs. A pair is a
prompt and its corrupted prompt, or the same text with two targets, that is, two positions whose
predictions are explained. (A route graph explains what stands at a position, whichever next token
is then asked about.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..arguments import Position, check_choice, listed, shown
from ..graph.flow import exceeds
from ..graph.tables import EdgeKind, Granularity
from ..routes.route_graph import RouteGraph
from ..tokens import Batch
from ..tracer import Tracer
from .tasks import Task

Measure = Literal["importance", "frequency"]


@dataclass(frozen=True, eq=False)
class Components:
    """One number for each component of each of P graphs."""

    heads: Tensor  # [P, L, H] float64
    ffn: Tensor  # [P, L] float64

    def __sub__(self, other: Components) -> Components:
        if self.heads.shape != other.heads.shape:
            raise ValueError(
                f"other: expected {list(self.heads.shape)} heads' importances, "
                f"got {list(other.heads.shape)}"
            )
        return Components(self.heads - other.heads, self.ffn - other.ffn)


def components(graphs: Sequence[RouteGraph], measure: Measure = "importance") -> Components:
    """The importance of every head and FFN block in each graph.

    measure: "importance" is the weight of the paths through a component. "frequency" is 1 where the
    component is in the graph, that is, has an edge above the threshold by itself, and else 0.
    """
    check_choice("measure", measure, ("importance", "frequency"))
    graphs = listed("graphs", graphs)
    if not all(isinstance(graph, RouteGraph) for graph in graphs):
        raise ValueError(f"graphs: expected RouteGraphs, got {shown(graphs)}")
    if not graphs:
        raise ValueError("graphs: is empty; expected at least one")
    if measure == "frequency":
        members = [membership(graph) for graph in graphs]
        return Components(
            torch.stack([heads.any(-1) for heads, _ in members]).double(),
            torch.stack([ffn.any(-1) for _, ffn in members]).double(),
        )
    return Components(
        torch.stack([graph.head_importance() for graph in graphs]).double(),
        torch.stack([graph.ffn_importance() for graph in graphs]).double(),
    )


def membership(graph: RouteGraph) -> tuple[Tensor, Tensor]:
    """The positions at which a graph has each head and FFN block: bool [L, H, T] and [L, T].

    A head is at a position where its edge into that position exceeds the threshold by itself.
    """
    T = len(graph.tokens)
    heads = torch.zeros(graph.n_layers, graph.n_heads, T, dtype=torch.bool)
    ffn = torch.zeros(graph.n_layers, T, dtype=torch.bool)
    edges, of_ffn = graph.head_edges, graph.edges.kind == EdgeKind.FFN
    kept = exceeds(edges.weight, graph.threshold)
    heads[edges.layer[kept], edges.head[kept], edges.target[kept]] = True
    ffn[graph.edges.layer[of_ffn], graph.edges.target[of_ffn]] = True
    return heads, ffn


def contrastive(
    tracer: Tracer,
    texts: Batch | Task,
    *,
    against: Batch | None = None,
    position: Position = -1,
    against_position: Position | None = None,
    threshold: float = 0.04,
    granularity: Granularity = "token",
    measure: Measure = "importance",
    batch_size: int | None = None,
) -> Components:
    """Differences of components' importances [P, L, H] and [P, L], one for each pair.

    texts: several texts, or a Task, which has corrupted prompts. against: the texts to compare
    with, as many and in the same order. against_position: another target to compare with; `against`
    is then by default the same texts.
    """
    if isinstance(texts, Task):
        against = texts.twins if against is None and against_position is None else against
        texts = texts.texts
    if against is None and against_position is None:
        raise ValueError("against: expected as many texts, or against_position another target")

    def found(some: Batch, where: Position) -> Components:
        graphs = tracer.trace(
            some,
            position=where,
            threshold=threshold,
            granularity=granularity,
            batch_size=batch_size,
        )
        if not isinstance(graphs, list):
            raise ValueError("texts: expected several texts, got a single one")
        return components(graphs, measure)

    check_choice("measure", measure, ("importance", "frequency"))
    other = position if against_position is None else against_position
    return found(texts, position) - found(texts if against is None else against, other)
