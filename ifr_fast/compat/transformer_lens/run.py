"""A cached run of TransformerLens, and its routes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ...arguments import Position, check_fraction, check_options, indices, spanned
from ...characters import text_tokens
from ...graph.tables import Granularity, GraphHeader
from ...recording.predictions import KnownPredictions, Predictor
from ...routes.all_positions import Routes
from ...routes.route_graph import RouteGraph
from ...routes.tracing import trace_scores
from ...scoring.closure import check_closure
from ...scoring.implementations import choose_impl, load_kernel
from ...scoring.scores import LayerScores, joined

if TYPE_CHECKING:
    from torch import nn

from .layers import LAYER_ENTRIES, Entries, batch_row, open_layer, score_block

# Rows of one kernel call. Each row has its own keys, so more rows would only fill masked tiles, and
# fewer rows would prepare W_O more often (measured at 512 tokens of SmolLM2's shape).
_BLOCK_ROWS = 4
_BLOCK_VALUES = 1 << 25  # weighted values of such a block, off the CPU


class Cache(Protocol):
    """An ActivationCache, or a dict of its entries."""

    def items(self) -> Iterable[tuple[str, Tensor]]: ...


class CachedRun:
    """A TransformerLens model's run on a text, ready to be traced at any position and threshold.

    model: a TransformerBridge or HookedTransformer, with the weights that it ran with.
    tokens: the token ids [T] or [B, T] of the run, or the text. cache: the result of
    `run_with_cache` for all positions, with or without its batch dimension. logits: [T, vocab] or
    [B, T, vocab], for the graphs' predictions; without them, graphs have none. batch_item: index
    of the text in a batch. impl: as in `Tracer`.

    Raises ValueError if the cache lacks an entry or belongs to another text, and
    `UnsupportedArchitectureError` if a layer's parts do not add up.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: str | Tensor,
        cache: Cache,
        logits: Tensor | None = None,
        *,
        batch_item: int = 0,
        impl: str = "auto",
    ) -> None:
        ids = _token_ids(model, tokens, batch_item)
        self.model = model
        self.token_ids = ids.cpu()
        self.tokens = text_tokens(self.token_ids, getattr(model, "tokenizer", None))
        T = len(ids)
        entries = dict(cache.items())
        n_layers = int(model.cfg.n_layers)  # type: ignore[arg-type, union-attr]
        with torch.no_grad():
            self._layers = [
                open_layer(model, Entries(entries, i, T, batch_item)) for i in range(n_layers)
            ]
        first = self._layers[0]
        self.impl = choose_impl(impl, first.y.device, first.y.dtype)
        self._kernel = load_kernel(self.impl)
        self._predict: Predictor | KnownPredictions = KnownPredictions([[]] * T)
        if logits is not None:
            of_item = batch_row(logits.detach(), 2, batch_item, "logits")
            if len(of_item) != T:
                raise ValueError(f"logits: expected those of {T} tokens, got {len(of_item)}")
            tokenizer = getattr(model, "tokenizer", None)
            self._predict = Predictor(of_item.__getitem__, self.token_ids, tokenizer)

    @classmethod
    def of(cls, model: nn.Module, text: str | Tensor, *, impl: str = "auto") -> CachedRun:
        """Runs the model on a text, or on token ids [T] or [1, T], and caches what is needed."""
        ids = _token_ids(model, text, 0)
        names = {f"blocks.{i}.{x}" for i in range(int(model.cfg.n_layers)) for x in LAYER_ENTRIES}  # type: ignore[arg-type, union-attr]
        with torch.no_grad():
            logits, cache = model.run_with_cache(ids[None], names_filter=names.__contains__)  # type: ignore[operator]
        return cls(model, ids, cache, logits, impl=impl)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self._layers)

    @property
    def n_heads(self) -> int:
        """Number of attention heads in each layer."""
        return len(self._layers[0].W_O)

    def contributions(
        self,
        *,
        rows: Iterable[int] | Tensor | None = None,
        layers: Iterable[int] | None = None,
        keep: float = 0.01,
    ) -> Iterator[LayerScores]:
        """As `Tracer.contributions`: importances at `rows` in each of `layers`, top layer first."""
        keep = check_fraction("keep", keep)
        at = torch.tensor(indices("rows", rows, len(self)))
        return self._contributions(at, indices("layers", layers, self.n_layers), keep)

    def _contributions(self, rows: Tensor, layers: list[int], keep: float) -> Iterator[LayerScores]:
        for layer in reversed(layers):
            scores = self._score(layer, rows, keep)
            check_closure({layer: scores.closure})
            yield scores

    @torch.no_grad()
    def trace(
        self,
        *,
        position: Position = -1,
        position_weights: Sequence[float] | Tensor | None = None,
        threshold: float = 0.04,
        granularity: Granularity = "token",
    ) -> RouteGraph:
        """As `Tracer.trace`: the route graph of the prediction made at `position`."""
        threshold = check_options(threshold, granularity)
        starts = spanned(position, position_weights, len(self))
        header = GraphHeader.of(
            starts,
            self._predict(list(starts)),
            tokens=self.tokens,
            token_ids=self.token_ids,
            threshold=threshold,
            granularity=granularity,
            n_heads=self.n_heads,
            parallel=[layer.parallel for layer in self._layers],
        )

        def score(layer: int, rows: Tensor) -> LayerScores:
            return self._score(layer, rows, threshold)

        return trace_scores(score, header, self._layers[0].y.device)

    @torch.no_grad()
    def trace_all(self, *, threshold: float = 0.04, granularity: Granularity = "token") -> Routes:
        """As `Tracer.trace_all`: the route graphs of every position's prediction."""
        threshold = check_options(threshold, granularity)
        rows, device = torch.arange(len(self)), self._layers[0].y.device
        tables, closures = [], {}
        for layer in range(self.n_layers):
            scores = self._score(layer, rows, threshold)
            closures[layer] = scores.closure
            tables.append(scores.table(device))
        check_closure(closures)
        return Routes(
            tokens=self.tokens,
            token_ids=self.token_ids,
            threshold=threshold,
            granularity=granularity,
            layers=tables,
            predict=self._predict,
            scored_threshold=threshold,
        )

    @torch.no_grad()
    def _score(self, layer: int, rows: Tensor, keep: float) -> LayerScores:
        of = self._layers[layer]
        step = _BLOCK_ROWS
        if of.y.device.type != "cpu":
            step = max(1, _BLOCK_VALUES // of.v.numel())
        blocks = [score_block(self._kernel, layer, of, some, keep) for some in rows.split(step)]
        return joined(blocks, rows)


def _token_ids(model: nn.Module, tokens: str | Tensor, batch_item: int) -> Tensor:
    if isinstance(tokens, str):
        tokens = model.to_tokens(tokens)  # type: ignore[operator]
    return batch_row(torch.as_tensor(tokens), 1, batch_item, "tokens")
