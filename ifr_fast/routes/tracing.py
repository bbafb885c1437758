"""Scores -> RouteGraph or Routes: scores what a graph needs, and assembles it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..graph.tables import Granularity, GraphHeader
from ..recording.predictions import Predictor
from ..recording.recording import Recording
from ..scoring.frontier import grow, score_all
from ..scoring.implementations import Kernel
from ..scoring.layer import score_layer
from ..scoring.scores import LayerScores
from .all_positions import Routes
from .route_graph import RouteGraph, assemble


def trace_recording(
    recording: Recording,
    starts: dict[int, float],
    threshold: float,
    granularity: Granularity,
    kernel: Kernel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> RouteGraph:
    """The graph of the predictions at the positions `starts`, ascending, with their weights."""
    decoder = recording.decoder
    header = GraphHeader.of(
        starts,
        Predictor.of(recording, tokenizer)(list(starts)),
        tokens=recording.tokens,
        token_ids=recording.token_ids,
        threshold=threshold,
        granularity=granularity,
        n_heads=decoder.n_heads,
        parallel=[block.parallel for block in decoder.blocks],
        value_layers=decoder.value_layers,
    )

    def score(layer: int, rows: Tensor) -> LayerScores:
        return score_layer(recording, layer, rows, threshold, kernel)

    with recording.replaying():
        return trace_scores(score, header, recording.resid_final.device)


def trace_scores(
    score: Callable[[int, Tensor], LayerScores], header: GraphHeader, device: torch.device
) -> RouteGraph:
    """The graph with this header, grown on `device`.

    score: scores a layer at rows [R], with its edges above the header's threshold.
    """
    reached = torch.zeros(len(header.tokens), dtype=torch.bool, device=device)
    reached[header.positions] = True
    n_layers = len(header.parallel)
    grown = grow(score, n_layers, reached, header.threshold, header.granularity)
    return assemble(grown, header)


def trace_all_positions(
    recording: Recording,
    threshold: float,
    granularity: Granularity,
    kernel: Kernel,
    tokenizer: PreTrainedTokenizerBase | None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Routes:
    """The graphs of every position's prediction: every layer is scored once, for all of them.

    checkpoint: as `score_all` says.
    """
    return Routes(
        tokens=recording.tokens,
        token_ids=recording.token_ids,
        threshold=threshold,
        granularity=granularity,
        layers=score_all(recording, threshold, kernel, checkpoint),
        predict=Predictor.of(recording, tokenizer),
        scored_threshold=threshold,
    )
