"""The graphs of all predictions of a batch: their components, and the importance of each.

Two quantities are computed for all predictions at once, from the top layer downwards:

- flow: the weight of all paths from the prediction to a node, at the lowest threshold. Columns are
  predictions, rows are nodes, and the attention edges of a layer are one sparse matrix.
- reach: membership of a node in the graph, for each threshold. A node has one bit per prediction of
  its document, so that a layer takes a few bitwise ORs along its edges.

Edges and thresholds are compared as in `RouteGraph`, at token granularity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..graph.flow import LayerFlow, component_importances, exceeds
from ..graph.tables import LayerTable
from ..kernels.contract import EdgeList
from .sweep import Swept

Array: TypeAlias = "np.ndarray[Any, Any]"

_FLOW_ELEMENTS = 1 << 23  # most elements of a flow [B * T, P], for P predictions per document


class Importances(NamedTuple):
    """Importances of components in the graph of each prediction, at `keep`; float32."""

    head: Array  # [B, T, L, H]
    ffn: Array  # [B, T, L]


class Membership(NamedTuple):
    """Components in the graph of each prediction, at one threshold."""

    head: Array  # [B, T, L, H] bool
    ffn: Array  # [B, T, L] bool
    depth: Array  # [B, T] int16: the lowest layer with an edge that changes position, else L


def importances(swept: Swept, keep: float) -> Importances:
    """`RouteGraph.head_importance` and `ffn_importance` of every prediction. keep: the threshold of
    the scored edges.
    """
    layers = [_layer_flow(swept, layer, keep) for layer in range(len(swept.parallel))]
    head, ffn = component_importances(layers, len(swept.lengths), _FLOW_ELEMENTS)
    return Importances(head.numpy(), ffn.numpy())


def _layer_flow(swept: Swept, layer: int, threshold: float) -> LayerFlow:
    """The weights of one layer, between the nodes of all documents."""
    target, source, weight, head_weight = swept.edges[layer]
    none = torch.zeros(len(swept.ffn[layer]), dtype=torch.bool)
    parallel = swept.parallel[layer]
    table = LayerTable(
        rows=torch.arange(len(none)),
        residual=swept.residual[layer],
        ffn=swept.ffn[layer],
        ffn_residual=None if parallel else swept.ffn_residual[layer],
        edges=EdgeList(target, source, weight, head_weight),
        unattributed=none,
        ffn_unattributed=None if parallel else none,
        value_layer=None if swept.value_layers[layer] == layer else swept.value_layers[layer],
    )
    return LayerFlow.of(table, threshold, "token")


def membership(swept: Swept, thresholds: Sequence[float]) -> list[Membership]:
    """Components in the graph of every prediction at each threshold. No threshold may be below that
    of the scored edges.
    """
    B, T, L = len(swept.lengths), swept.n_rows, len(swept.parallel)
    H, K, W = swept.head_mass.shape[-1], len(thresholds), -(-T // 64)
    alone = np.zeros((B, T, 1, W), np.uint64)
    for b, n in enumerate(swept.lengths):
        t = np.arange(n)
        alone[b, t, 0, t // 64] = np.uint64(1) << (t % 64).astype(np.uint64)
    reach = np.repeat(alone.reshape(B * T, 1, W), K, axis=1)
    heads = np.zeros((L, B * H, K, W), np.uint64)
    ffns = np.zeros((L, B, K, W), np.uint64)
    moved = np.zeros((L, B, K, W), np.uint64)
    read: dict[int, Array] = {}  # nodes of lower layers' resid_pre that attention reads
    bounds = torch.tensor(thresholds, dtype=torch.float32)

    def kept(x: Tensor) -> Array:
        """Masks [N, K, 1] for weights [N]: words of ones if above the threshold, else 0."""
        flags = exceeds(x[:, None], bounds).numpy()
        return (np.uint64(0) - flags.astype(np.uint64))[:, :, None]

    for layer in reversed(range(L)):
        target, source, weight, head_weight = swept.edges[layer]
        ffn, passes = kept(swept.ffn[layer]), kept(swept.residual[layer])
        ffns[layer] = np.bitwise_or.reduce((reach & ffn).reshape(B, T, K, W), 1)
        if swept.parallel[layer]:
            passes = passes | ffn
        else:
            reach &= ffn | kept(swept.ffn_residual[layer])
        edge, head = exceeds(head_weight, bounds[0]).nonzero(as_tuple=True)
        at = target[edge]
        strong = reach[at.numpy()] & kept(head_weight[edge, head])
        _merge(heads[layer], (at // T * H + head).numpy(), strong)
        into, out_of = target.numpy(), source.numpy()
        carried = reach[into] & kept(weight)
        elsewhere = into != out_of
        _merge(moved[layer], into[elsewhere] // T, carried[elsewhere])
        reach &= passes
        source_layer = swept.value_layers[layer]
        into_sources = (
            reach if source_layer == layer else read.setdefault(source_layer, np.zeros_like(reach))
        )
        _merge(into_sources, out_of, carried)
        if layer in read:
            reach |= read.pop(layer)

    of_head = _unpacked(heads, T).reshape(L, B, H, K, T).transpose(3, 1, 4, 0, 2)
    of_ffn = _unpacked(ffns, T).transpose(2, 1, 3, 0)
    changes = _unpacked(moved, T).transpose(2, 0, 1, 3)  # [K, L, B, T]
    depth = np.where(changes.any(1), changes.argmax(1), L).astype(np.int16)
    return [Membership(*of) for of in zip(of_head, of_ffn, depth, strict=True)]


def _merge(into: Array, group: Array, bits: Array) -> None:
    """ORs rows of `bits` [N, K, W] into the rows of `into` that `group` [N] names."""
    if len(group) == 0:
        return
    order = group.argsort(kind="stable")
    ordered = group[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    into[ordered[first]] |= np.bitwise_or.reduceat(bits[order], first, axis=0)


def _unpacked(bits: Array, n: int) -> Array:
    """[..., W] words -> [..., n] bool."""
    octets = bits.astype("<u8", copy=False).view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=n, bitorder="little").astype(bool)
