"""Checks of graphs read from files. Each raises ValueError."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..arguments import check_options
from .data import GraphData
from .tables import EdgeKind, LayerTable, NodeKind, Prediction, Span

_ROUNDING = 1e-3  # in files of versions that did not cut weights at 1


def check_graph(graph: GraphData) -> None:
    """Checks all that a graph says of itself and its tables."""
    check_text(graph.tokens, graph.token_ids, graph.threshold, graph.granularity)
    T = len(graph.tokens)
    L, H = (_check_int(name, getattr(graph, name), 1, None) for name in ("n_layers", "n_heads"))
    _check_int("position", graph.position, 0, T)
    check_predictions("predictions", [graph.predictions], 1)
    if graph.span is not None:
        _check_span(graph.span, graph)
    _check_tensor("parallel", graph.parallel, torch.bool, L)
    check_value_layers(graph.value_layers, L)
    for name, table in (("edges", graph.edges), ("head_edges", graph.head_edges)):
        n = len(table[0]) if table[0].ndim else 0
        for column, x in table._asdict().items():
            of = f"{name}.{column}"
            _check_tensor(of, x, torch.float32 if column == "weight" else torch.int64, n)
            if column != "weight":
                end = {"layer": L, "kind": len(EdgeKind), "head": H}.get(column, T)
                _check_range(of, x, end)
        _check_weights(f"{name}.weight", table.weight)

    layer, kind, target, source, _ = graph.edges
    _check_order("edges", ((layer * len(EdgeKind) + kind) * T + target) * T + source)
    attention = kind == EdgeKind.ATTENTION
    if bool((source > target).any() or ((source < target) & ~attention).any()):
        raise ValueError("edges: a source is no position that its target reads")
    if bool((graph.parallel[layer] & (kind == EdgeKind.RESIDUAL_MID)).any()):
        raise ValueError("edges.kind: RESIDUAL_MID in a parallel block")
    pair = (layer * T + target) * T + source
    layer, head, target, source, _ = graph.head_edges
    pair_of_head = (layer * T + target) * T + source
    _check_order("head_edges", pair_of_head * H + head)
    if not bool(torch.isin(pair_of_head, pair[attention]).all()):
        raise ValueError("head_edges: not all belong to an attention edge")
    for node in graph.unattributed:
        _check_int("unattributed", node.layer, 0, L)
        _check_int("unattributed", node.position, 0, T)
        if node.kind not in (NodeKind.MID, NodeKind.POST):
            raise ValueError(f"unattributed: expected mid or post, got {node.kind}")


def _check_span(span: Span, graph: GraphData) -> None:
    positions, weights, predictions = span
    for position in positions:
        _check_int("span", position, 0, len(graph.tokens))
    if len(positions) < 2 or any(b <= a for a, b in pairwise(positions)):
        raise ValueError("span: expected two positions or more, ascending")
    if not all(isinstance(w, float) and w >= 0 for w in weights) or len(weights) != len(positions):
        raise ValueError("span: expected a weight of at least 0 for each position")
    if not abs(sum(weights) - 1) < 1e-6:
        raise ValueError("span: expected weights that sum to 1")
    check_predictions("span", predictions, len(positions))
    if positions[-1] != graph.position or predictions[-1] != graph.predictions:
        raise ValueError("span: its last position is not the graph's")


def check_value_layers(value_layers: list[int] | None, n_layers: int) -> None:
    """Checks that each layer reads values of its own, or of a lower layer that has its own."""
    if value_layers is None:
        return
    if not isinstance(value_layers, list) or len(value_layers) != n_layers:
        raise ValueError(f"value_layers: expected a list of {n_layers} layers")
    for i, of in enumerate(value_layers):
        if value_layers[_check_int("value_layers", of, 0, i + 1)] != of:
            raise ValueError(f"value_layers: layer {of} has no values of its own")


def check_tables(layers: list[LayerTable], n_tokens: int) -> None:
    """Checks the tables of all layers of a text, each with a row for every token."""
    if not layers:
        raise ValueError("parallel: is empty; expected at least one layer")
    T, n_heads = n_tokens, layers[0].edges.head_weight.shape[1]
    for i, table in enumerate(layers):
        for name in ("residual", "ffn", "ffn_residual"):
            if (x := getattr(table, name)) is not None:
                _check_tensor(f"{i}.{name}", x, None, T)
                _check_weights(f"{i}.{name}", x)
        for name in ("unattributed", "ffn_unattributed"):
            if (x := getattr(table, name)) is not None:
                _check_tensor(f"{i}.{name}", x, torch.bool, T)
        row, source, weight, head_weight = table.edges
        n = len(row) if row.ndim else 0
        _check_tensor(f"{i}.row", row, torch.int64, n)
        _check_tensor(f"{i}.source", source, torch.int64, n)
        _check_tensor(f"{i}.weight", weight, None, n)
        _check_tensor(f"{i}.head_weight", head_weight, None, n, max(1, n_heads))
        _check_range(f"{i}.row", row, T)
        _check_range(f"{i}.source", source, T)
        _check_weights(f"{i}.weight", weight)
        _check_weights(f"{i}.head_weight", head_weight)
        row, source = row[weight > 0], source[weight > 0]
        if bool((source > row).any()) or len(torch.unique(row * T + source)) < len(row):
            raise ValueError(f"{i}.source: edges from later positions, or listed twice")


def check_layer(table: LayerTable, n_tokens: int, n_heads: int) -> None:
    """Checks the table of one layer of a text, with a row for every token, in order."""
    rows, heads = table.rows, table.edges.head_weight
    if not torch.equal(rows.cpu(), torch.arange(n_tokens)):
        raise ValueError(f"rows: expected 0 to {n_tokens - 1}, in order")
    if heads.ndim != 2 or heads.shape[1] != n_heads:
        raise ValueError(f"head_weight: expected {n_heads} heads, got shape {list(heads.shape)}")
    check_tables([table], n_tokens)


def check_text(tokens: list[str], token_ids: Tensor, threshold: float, granularity: str) -> None:
    """Checks what a file says of its text and of the options that it was traced with."""
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("tokens: expected strings")
    if not tokens:
        raise ValueError("tokens: is empty; expected at least one")
    _check_tensor("token_ids", token_ids, torch.int64, len(tokens))
    check_options(threshold, granularity)


def check_predictions(name: str, predictions: list[list[Prediction]], n: int) -> None:
    """Checks the predictions of n positions."""
    if len(predictions) != n:
        raise ValueError(f"{name}: expected those of {n} positions, got {len(predictions)}")
    for token, token_id, probability in (p for of in predictions for p in of):
        if not isinstance(token, str) or not isinstance(probability, float):
            raise ValueError(f"{name}: expected a token, its id and probability")
        _check_int(name, token_id, 0, None)


def _check_int(name: str, value: int, start: int, end: int | None) -> int:
    if type(value) is not int or value < start or (end is not None and value >= end):
        upper = "" if end is None else f" and below {end}"
        raise ValueError(f"{name}: expected an int of at least {start}{upper}, got {value!r}")
    return value


def _check_tensor(name: str, x: Tensor, dtype: torch.dtype | None, *shape: int) -> None:
    """Checks the shape and the dtype of a tensor; a dtype of None is any floating one."""
    if tuple(x.shape) != shape or (x.dtype != dtype if dtype else not x.is_floating_point()):
        kind = str(dtype or "floats").removeprefix("torch.")
        got = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected {kind} {list(shape)}, got {got} {list(x.shape)}")


def _check_range(name: str, x: Tensor, end: int) -> None:
    if len(x) and not 0 <= int(x.min()) <= int(x.max()) < end:
        raise ValueError(f"{name}: expected 0 to {end - 1}, got {int(x.min())} to {int(x.max())}")


def _check_weights(name: str, x: Tensor) -> None:
    if not bool(((x >= 0) & (x <= 1 + _ROUNDING)).all()):
        raise ValueError(f"{name}: expected numbers from 0 to 1")


def _check_order(name: str, keys: Tensor) -> None:
    if not bool((keys[1:] > keys[:-1]).all()):
        raise ValueError(f"{name}: not in canonical order, each once")
