"""The walk down the layers: of one graph, whose reached rows alone are scored, or of all rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from ..graph.growth import Frontier, Grown
from ..graph.tables import Granularity, LayerTable
from ..progress import progress
from ..recording.plan import LONG
from ..recording.recording import Recording
from .checkpoint import Checkpoint
from .closure import check_closure
from .implementations import Kernel
from .layer import score_layer
from .scores import LayerScores


def grow(
    score: Callable[[int, Tensor], LayerScores],
    n_layers: int,
    reached: Tensor,
    threshold: float,
    granularity: Granularity,
) -> list[Grown]:
    """Routes from the `reached` [T] bool positions down, a layer's step each, top layer first.

    score: scores a layer at rows [R], with its edges above `threshold`.
    """
    grown, closures = [], {}
    frontier = Frontier(reached)
    for layer in reversed(range(n_layers)):
        rows = frontier.reached.cpu().nonzero().squeeze(1)  # one device synchronization a layer
        if len(rows) == 0:
            if frontier.is_done:
                break
            frontier.skip(layer)
            continue
        scores = score(layer, rows)
        closures[layer] = scores.closure
        table = scores.table(reached.device)
        grown.append(frontier.descend(layer, table, threshold, granularity))
    check_closure(closures)
    return grown


def score_all(
    recording: Recording,
    threshold: float,
    kernel: Kernel,
    checkpoint: str | os.PathLike[str] | None = None,
) -> list[LayerTable]:
    """The tables of all rows of all layers, bottom first, with edges above `threshold`.

    checkpoint: a folder that keeps each layer's table, from which an interrupted run resumes.
    Raises FormatError where the folder is another trace's.
    """
    rows = torch.arange(len(recording))
    device = recording.resid_final.device
    kept = None if checkpoint is None else Checkpoint.of(checkpoint, recording, threshold)
    tables, closures = [], {}
    L = len(recording.layers)
    shown = progress("scoring", L) if len(recording) > LONG else nullcontext(lambda _: None)
    with recording.replaying(), shown as show:
        for layer in range(L):
            table = None if kept is None else kept.load(layer, device)
            if table is None:
                scores = score_layer(recording, layer, rows, threshold, kernel)
                table = scores.table(device)
                if kept is None:
                    closures[layer] = scores.closure
                else:
                    check_closure({layer: scores.closure})
                    kept.save(layer, table)
            tables.append(table)
            show(layer + 1)
    if closures:
        check_closure(closures)
    return tables
