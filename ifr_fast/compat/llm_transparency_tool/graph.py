"""The published tool's networkx graphs, with its node names, built from arrays.

- X0_t: the embedding of token t;
- A{l}_t: the residual stream after attention in layer l;
- M{l}_t: the FFN of layer l;
- I{l}_t: the residual stream after layer l.

Edges run in the direction of information and have a `weight`. An FFN's weight is on both of its
edges, A to M and M to I. The residual edge and the attention to the token itself join the same
nodes. They are one edge with the sum of their weights; the residual stream's own weight is its
`residual`. In a parallel block, whose parts have one denominator, all edges run from I{l-1} into
I{l}, and no A{l} is on a path.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...arguments import shown
from ...errors import needing
from ...scoring.closure import cat_on
from . import contributions

if TYPE_CHECKING:
    import networkx as nx

_Neighbours = dict[str, dict[str, dict[str, Any]]]  # node -> neighbour -> data of the edge

_BLOCKS = 3  # blocks of nodes in each layer: A, M, I; one block, X0, comes before them


class EdgeWeights(NamedTuple):
    """The edges of L layers between T tokens; a row is layer * T + token."""

    target: Tensor  # [N] int64, a row
    source: Tensor  # [N] int64, a token
    weight: Tensor  # [N] summed over heads
    residual: Tensor  # [L, T] of resid_pre
    ffn: Tensor  # [L, T]
    ffn_residual: Tensor  # [L, T] of resid_mid; 0 in parallel blocks
    parallel: Tensor  # [L] bool


@torch.no_grad()
def build_full_graph(
    model: Any, batch_i: int = 0, renormalizing_threshold: float | None = None
) -> nx.DiGraph:
    """The contribution graph of all blocks and all tokens of sentence `batch_i`.

    model: a `TransparentLlm` that has run, whose arithmetic is used; or any other object with its
    methods, whose decomposition is then formed. renormalizing_threshold: contributions up to it are
    dropped, each head by itself, and the others of a node are rescaled to sum to 1. Edges of weight
    0 are left out.

    Raises IfrError if networkx is not installed.
    """
    networkx = _networkx()
    if not callable(getattr(model, "model_info", None)):
        raise ValueError(f"model: expected a TransparentLlm, got {shown(model)}")
    n_layers, n_tokens = model.model_info().n_layers, int(model.tokens().shape[1])
    own = getattr(model, "edge_weights", None)
    weights = (
        _formed_weights(model, batch_i, n_layers, renormalizing_threshold)
        if own is None
        else own(batch_i, renormalizing_threshold)
    )
    names = np.array(_node_names(n_layers, n_tokens), dtype=object)
    edges, residual = _edges(weights, n_tokens)
    with _uncollected():
        after: _Neighbours = {name: {} for name in names.tolist()}
        before: _Neighbours = {name: {} for name in after}
        for source, target, weight in _rows(names, edges):
            after[source][target] = before[target][source] = {"weight": weight}
        for source, target, weight in _rows(names, residual):
            after[source][target]["residual"] = weight
        return _digraph(networkx, after, before)


def build_paths_to_predictions(
    graph: nx.DiGraph,
    n_layers: int,
    n_tokens: int,
    starting_tokens: Iterable[int],
    threshold: float,
) -> list[nx.DiGraph]:
    """The part of a full graph that leads to the prediction at each of `starting_tokens`.

    Only edges with a weight above `threshold` are followed. Each result has these edges and their
    nodes.
    """
    networkx = _networkx()
    trees = []
    with _uncollected():
        into = dict(networkx.reverse_view(graph).adjacency())
        above: dict[str, list[tuple[str, dict[str, Any]]]] = {}  # those of `into`, once asked for
        for start in starting_tokens:
            if not 0 <= start < n_tokens:
                raise ValueError(
                    f"starting_tokens: expected positions from 0 to {n_tokens - 1}, got {start}"
                )
            output = f"I{n_layers - 1}_{start}"
            if output not in into:
                raise ValueError(f"n_layers: the graph has no node {output}")
            after: _Neighbours = {output: {}}
            before: _Neighbours = {}
            waiting = [output]
            while waiting:
                node = waiting.pop()
                edges = above.get(node)
                if edges is None:
                    edges = above[node] = [
                        (below, data)
                        for below, data in into[node].items()
                        if data["weight"] > threshold
                    ]
                sources = before[node] = {}
                for below, data in edges:
                    targets = after.get(below)
                    if targets is None:
                        targets = after[below] = {}
                        waiting.append(below)
                    targets[node] = sources[below] = data.copy()
            # A node without an edge is in no tree. Only the output can have no edge.
            trees.append(_digraph(networkx, *((after, before) if before[output] else ({}, {}))))
    return trees


def _digraph(networkx: Any, after: _Neighbours, before: _Neighbours) -> nx.DiGraph:
    """The graph with these edges to and from each node; both share the edges' data.

    `add_edges_from` makes the same graph, but takes several times as long. networkx has no public
    way to fill its dicts at once.
    """
    graph = networkx.DiGraph()
    graph._node = {name: {} for name in after}
    graph._adj, graph._pred = after, before
    return graph


@contextmanager
def _uncollected() -> Iterator[None]:
    """Suspends Python's search for cyclic garbage.

    A graph has a dict for each edge and no garbage among them, but new dicts would make Python
    search all objects of the process again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _networkx() -> Any:
    with needing(
        "the graphs of compat.llm_transparency_tool", "networkx", "pip install 'ifr-fast[networkx]'"
    ):
        import networkx as nx
    return nx


def _node_names(n_layers: int, n_tokens: int) -> list[str]:
    """Names of nodes in blocks of n_tokens: X0, then A, M and I of each layer."""
    kinds = [f"{kind}{layer}_" for layer in range(n_layers) for kind in "AMI"]
    return [f"{kind}{token}" for kind in ["X0_", *kinds] for token in range(n_tokens)]


class _Edges(NamedTuple):
    """Edges between the nodes of `_node_names`, by index."""

    source: np.ndarray
    target: np.ndarray
    weight: np.ndarray

    def nonzero(self) -> _Edges:
        some = self.weight != 0
        return _Edges(self.source[some], self.target[some], self.weight[some])


def _joined(parts: Iterable[_Edges]) -> _Edges:
    columns = zip(*parts, strict=True)
    return _Edges(*(np.concatenate([x.reshape(-1) for x in column]) for column in columns))


def _rows(names: np.ndarray, edges: _Edges) -> Iterator[tuple[str, str, float]]:
    source, target, weight = edges
    return zip(names[source].tolist(), names[target].tolist(), weight.tolist(), strict=True)


def _edges(weights: EdgeWeights, n_tokens: int) -> tuple[_Edges, _Edges]:
    """All edges, and the edges of the residual stream with its own weight."""
    target, source, weight = (
        x.cpu().numpy() for x in (weights.target, weights.source, weights.weight.double())
    )
    residual, of_ffn, passed = (
        x.cpu().double().numpy() for x in (weights.residual, weights.ffn, weights.ffn_residual)
    )
    parallel = weights.parallel.numpy()
    T = residual.shape[1]  # tokens of this sentence; `n_tokens` counts those of the longest
    layer, token = target // T, target % T
    through, itself = residual.copy(), token == source
    through[layer[itself], token[itself]] += weight[itself]
    others = ~itself
    layer, token, source, weight = (x[others] for x in (layer, token, source, weight))

    below = n_tokens * _BLOCKS * np.arange(len(residual))[:, None] + np.arange(T)  # [L, T]
    mid, ffn, post = (below + n_tokens * i for i in range(1, _BLOCKS + 1))
    after_attention = np.where(parallel[:, None], post, mid)
    before_ffn = np.where(parallel[:, None], below, mid)
    edges = [
        _Edges(below[layer, source], after_attention[layer, token], weight),
        _Edges(below, after_attention, through),
        _Edges(before_ffn, ffn, of_ffn),
        _Edges(ffn, post, of_ffn),
        _Edges(mid, post, passed),
    ]
    return _joined(edges).nonzero(), _joined([_Edges(below, after_attention, residual)]).nonzero()


def _formed_weights(
    model: Any, batch_i: int, n_layers: int, threshold: float | None
) -> EdgeWeights:
    """Edge weights of a model of another class, from the tensors that its methods form."""
    found: list[tuple[Tensor, ...]] = []

    def of_sentence(x: Tensor) -> Tensor:
        return x[batch_i][None]

    for layer in range(n_layers):
        mid, post = (
            of_sentence(x) for x in (model.residual_after_attn(layer), model.residual_out(layer))
        )
        heads, residual = contributions.get_attention_contributions(
            of_sentence(model.residual_in(layer)), mid, model.decomposed_attn(batch_i, layer)[None]
        )
        ffn, ffn_residual = contributions.get_mlp_contributions(
            mid, post, of_sentence(model.ffn_out(layer))
        )
        if threshold is not None:
            cut = contributions.apply_threshold_and_renormalize
            heads, residual = cut(threshold, heads, residual)
            ffn, ffn_residual = cut(threshold, ffn, ffn_residual)
        weight = heads[0].sum(-1)
        target, source = weight.nonzero(as_tuple=True)
        row = layer * len(weight) + target
        found.append((row, source, weight[target, source], residual, ffn, ffn_residual))
    device = found[0][0].device
    columns = [cat_on(device, parts) for parts in zip(*found, strict=True)]
    row, source, weight, residual, ffn, passed = columns
    parallel = torch.zeros(n_layers, dtype=torch.bool)
    return EdgeWeights(row, source, weight, residual, ffn, passed, parallel)
