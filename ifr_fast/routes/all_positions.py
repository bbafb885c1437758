"""Routes: the route graphs of every position of a text, from one sweep over its layers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from ..arguments import as_index, check_fraction, check_path, index_within
from ..errors import FormatError
from ..graph.checks import check_predictions, check_tables, check_text, check_value_layers
from ..graph.flow import LayerFlow, component_importances, head_frequencies
from ..graph.growth import Frontier
from ..graph.reach import Reach, reach_in_layers
from ..graph.table_files import named_tensors, take_table
from ..graph.tables import (
    Granularity,
    GraphHeader,
    LayerTable,
    Prediction,
    plain_tensor,
    value_layers,
)
from ..recording.predictions import KnownPredictions
from ..storage.tensors import Format, load_tensors, save_tensors
from .route_graph import RouteGraph, assemble

_FLOW_ELEMENTS = 1 << 24  # size of the flow [T, P] for P predictions that are followed at once


@dataclass(frozen=True, eq=False)
class Routes:
    """The route graphs of every position's prediction, from one sweep over the layers.

    Each layer was scored once for all T rows; a position's graph is what its last-layer node
    reaches over these edges. Tensors are on the device that scored them.
    """

    tokens: list[str]
    token_ids: Tensor  # [T] int64
    threshold: float
    granularity: Granularity
    layers: list[LayerTable]  # bottom first, all T rows, edges above the threshold scored with
    predict: Callable[[list[int]], list[list[Prediction]]] = field(repr=False)
    scored_threshold: float

    _FORMAT = Format("ifr_fast.routes", version=2, oldest=1, checked_from=2)

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", plain_tensor(self.token_ids))

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle holds the fields, not what was computed of them.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def n_heads(self) -> int:
        """Attention heads a layer."""
        return self.layers[0].edges.head_weight.shape[1]

    def at(self, threshold: float) -> Routes:
        """These routes at another threshold, not below the one that they were scored with."""
        threshold = check_fraction("threshold", threshold)
        if threshold < self.scored_threshold:
            raise ValueError(
                f"threshold: these routes were scored with {self.scored_threshold:g}, "
                f"got {threshold:g}; call trace_all again for a lower one"
            )
        return dataclasses.replace(self, threshold=threshold)

    def __getitem__(self, position: SupportsIndex) -> RouteGraph:
        """The graph of one position, negative from the end."""
        T = len(self)
        position = as_index("position", position)
        if not -T <= position < T:
            raise IndexError(f"position: expected {-T} to {T - 1}, got {position}")
        position %= T
        reached = torch.zeros(T, dtype=torch.bool, device=self.layers[0].rows.device)
        reached[position] = True
        frontier = Frontier(reached)
        grown = [
            frontier.descend(layer, self.layers[layer], self.threshold, self.granularity)
            for layer in reversed(range(self.n_layers))
        ]
        header = GraphHeader(
            tokens=self.tokens,
            token_ids=self.token_ids,
            position=position,
            threshold=self.threshold,
            granularity=self.granularity,
            n_heads=self.n_heads,
            parallel=self._parallel,
            predictions=self.predict([position])[0],
            value_layers=self._value_layers,
        )
        return assemble(grown, header)

    def reach(self, source: SupportsIndex) -> Reach:
        """The reach of a token's information in all predictions' graphs: the weight of all paths
        from its embedding up to each node. `predictions[t]` is
        `self[t].token_importance()[source]`.
        """
        source = index_within("source", source, len(self))
        return reach_in_layers(self._flows, self._parallel, source)

    def head_frequency(self) -> Tensor:
        """[L, H] float32: share of predictions whose graph a head is in.

        A head is in a graph where one of its head_edges into a node of the graph exceeds the
        threshold by itself.
        """
        return self._head_frequency

    def head_importance(self) -> Tensor:
        """[T, L, H] float32: `RouteGraph.head_importance` of every position."""
        return self._importances[0]

    def ffn_importance(self) -> Tensor:
        """[T, L] float32: `RouteGraph.ffn_importance` of every position."""
        return self._importances[1]

    @property
    def _parallel(self) -> list[bool]:
        return [table.ffn_residual is None for table in self.layers]

    @property
    def _value_layers(self) -> list[int] | None:
        return value_layers(self.layers)

    @cached_property
    def _flows(self) -> list[LayerFlow]:
        return [LayerFlow.of(table, self.threshold, self.granularity) for table in self.layers]

    @cached_property
    def _head_frequency(self) -> Tensor:
        return head_frequencies(self._flows, _FLOW_ELEMENTS)

    @cached_property
    def _importances(self) -> tuple[Tensor, Tensor]:
        head, ffn = component_importances(self._flows, 1, _FLOW_ELEMENTS)
        return head[0], ffn[0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves to a safetensors file, with every position's predictions."""
        tensors: dict[str, Tensor] = {"token_ids": self.token_ids}
        for i, table in enumerate(self.layers):
            tensors |= named_tensors(table, f"{i}.")
            del tensors[f"{i}.rows"]  # all of them
        fields = {
            "tokens": self.tokens,
            "threshold": self.threshold,
            "granularity": self.granularity,
            "scored_threshold": self.scored_threshold,
            "parallel": self._parallel,
            "predictions": self.predict(list(range(len(self)))),
        }
        if self._value_layers is not None:
            fields["value_layers"] = self._value_layers
        save_tensors(check_path("path", path), self._FORMAT, tensors, fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Routes:
        """The routes that `save` saved. Raises FormatError for a truncated or foreign file."""
        tensors, fields = load_tensors(check_path("path", path), cls._FORMAT)
        try:
            rows = torch.arange(len(fields["tokens"]))
            parallel = fields.pop("parallel")
            read = fields.pop("value_layers", None)
            check_value_layers(read, len(parallel))
            layers = [
                take_table(tensors, parallel=flag, prefix=f"{i}.", rows=rows)
                for i, flag in enumerate(parallel)
            ]
            for i, of in enumerate(read or ()):
                layers[i] = layers[i]._replace(value_layer=None if of == i else of)
            predictions = [[Prediction(*p) for p in of] for of in fields.pop("predictions")]
            routes = cls(
                token_ids=tensors.pop("token_ids"),
                layers=layers,
                predict=KnownPredictions(predictions),
                **fields,
            )
            if tensors:
                raise ValueError(f"parallel: tells nothing of {min(tensors)}")
            check_text(routes.tokens, routes.token_ids, routes.threshold, routes.granularity)
            if not check_fraction("threshold", routes.scored_threshold) <= routes.threshold:
                raise ValueError("threshold: is below the one scored with")
            check_tables(layers, len(routes))
            check_predictions("predictions", predictions, len(routes))
            return dataclasses.replace(routes, layers=[table.at_most_one() for table in layers])
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise FormatError(f"{path}: not a whole {cls._FORMAT.name} file ({error})") from error
