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
    B, T, L = len(swept.lengths), swept.n_rows, len(swept.parallel)
    steps = [_FlowStep.of(swept, layer, keep) for layer in range(L)]
    H = swept.head_mass.shape[-1]
    head, ffn = torch.zeros(B, T, L, H), torch.zeros(B, T, L)
    size = max(1, _FLOW_ELEMENTS // (B * T))
    for begin in range(0, T, size):
        P = min(T, begin + size) - begin
        flow = torch.zeros(B, T, P)
        flow[:, begin : begin + P] = torch.eye(P)
        for layer in reversed(range(L)):
            step = steps[layer]
            ffn[:, begin : begin + P, layer] = (step.ffn[:, None] @ flow)[:, 0]
            flow *= step.to_mid[:, :, None]
            head[:, begin : begin + P, layer] = (step.head_sum @ flow).transpose(1, 2)
            flow = step.down(flow)
    return Importances(head.numpy(), ffn.numpy())


class _FlowStep(NamedTuple):
    """One layer's weights above the threshold; nodes as [B, T]."""

    ffn: Tensor  # [B, T]
    to_mid: Tensor  # [B, T] weight from post to mid, FFN and residual together
    to_pre: Tensor  # [B * T, 1] weight from mid to pre at the same position
    head_sum: Tensor  # [B, H, T] weights of a target's heads, summed over sources
    matrix: Tensor  # [B * T, B * T] sparse: from targets to sources

    @staticmethod
    def of(swept: Swept, layer: int, threshold: float) -> _FlowStep:
        B, T = len(swept.lengths), swept.n_rows

        def above(x: Tensor) -> Tensor:
            return torch.where(x > threshold, x, 0)

        target, source, weight, head_weight = swept.edges[layer]
        H = head_weight.shape[1]
        ffn, residual = above(swept.ffn[layer]), above(swept.residual[layer])
        parallel = swept.parallel[layer]
        through = torch.ones_like(ffn) if parallel else ffn + above(swept.ffn_residual[layer])
        # A target's edges are contiguous, but differences of running sums would round.
        head_sum = torch.zeros(B * T, H).index_add_(0, target, head_weight)
        indices = torch.stack([source, target])
        size = (B * T, B * T)
        matrix = torch.sparse_coo_tensor(indices, weight, size, check_invariants=False)
        return _FlowStep(
            ffn.view(B, T),
            through.view(B, T),
            (ffn + residual if parallel else residual)[:, None],
            head_sum.view(B, T, H).transpose(1, 2),
            matrix,
        )

    def down(self, flow: Tensor) -> Tensor:
        """Flow at pre, from the flow [B, T, P] at mid."""
        flat = flow.reshape(-1, flow.shape[-1])
        return torch.addmm(flat * self.to_pre, self.matrix, flat).view(flow.shape)


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
    bounds = torch.tensor(thresholds, dtype=torch.float32)

    def kept(x: Tensor) -> Array:
        """Masks [N, K, 1] for weights [N]: words of ones if above the threshold, else 0."""
        flags = (x[:, None] > bounds).numpy()
        return (np.uint64(0) - flags.astype(np.uint64))[:, :, None]

    for layer in reversed(range(L)):
        target, source, weight, head_weight = swept.edges[layer]
        ffn, passes = kept(swept.ffn[layer]), kept(swept.residual[layer])
        ffns[layer] = np.bitwise_or.reduce((reach & ffn).reshape(B, T, K, W), 1)
        if swept.parallel[layer]:
            passes = passes | ffn
        else:
            reach &= ffn | kept(swept.ffn_residual[layer])
        edge, head = (head_weight > bounds[0]).nonzero(as_tuple=True)
        at = target[edge]
        strong = reach[at.numpy()] & kept(head_weight[edge, head])
        _merge(heads[layer], (at // T * H + head).numpy(), strong)
        into, out_of = target.numpy(), source.numpy()
        carried = reach[into] & kept(weight)
        elsewhere = into != out_of
        _merge(moved[layer], into[elsewhere] // T, carried[elsewhere])
        reach &= passes
        _merge(reach, out_of, carried)

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
