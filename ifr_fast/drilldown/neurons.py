"""The neurons of an FFN block as parts of a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_choice, check_count
from ..graph.tables import NodeKind, plain_tensor
from ..kernels.contract import LayerInputs, visible
from ..recording.recording import Recording
from ..scoring.implementations import Kernel, kernel_of
from .neuron_basis import NeuronBases, activations
from .parts import ffn_rows


class Neuron(NamedTuple):
    """One neuron at one position."""

    neuron: int
    activation: float
    importance: float


@dataclass(frozen=True, eq=False)
class NeuronScores:
    """The neurons of one layer's FFN block at R positions, as parts of a node.

    A row's importances, with `residual` and `attention` where they are parts too, sum to 1.
    """

    layer: int
    kind: NodeKind  # the node's kind: `post` or `ffn`
    rows: Tensor  # [R] int64, positions
    activations: Tensor  # [R, F] float32, the input of the down projection
    importance: Tensor  # [R, F] float32
    residual: Tensor | None  # [R] importance of the stream before the FFN; for `post` only
    attention: Tensor | None  # [R] importance of all heads; for `post` of parallel blocks only
    unattributed: Tensor  # [R] bool: every proximity is 0, and each of the n parts got 1/n

    def top(self, k: int = 10) -> list[list[Neuron]]:
        """The k most important neurons of each row, most important first."""
        k = check_count("k", k)
        found = []
        order = self.importance.argsort(dim=-1, descending=True, stable=True)[:, :k]
        for chosen, activation, importance in zip(
            order, self.activations, self.importance, strict=True
        ):
            columns = chosen.tolist(), activation[chosen].tolist(), importance[chosen].tolist()
            found.append([Neuron(*row) for row in zip(*columns, strict=True)])
        return found


def check_neuron_kind(kind: NodeKind | str) -> NodeKind:
    """The kind of node that neurons are parts of. Raises ValueError unless `post` or `ffn`."""
    return NodeKind(check_choice("kind", kind, (NodeKind.POST, NodeKind.FFN)))


@torch.inference_mode()
def neuron_output(
    recording: Recording, layer: int, neuron: int, position: int, bases: NeuronBases
) -> Tensor:
    """[D] one neuron's output at a position, in float32 or wider.

    neuron: a negative index counts from the end; ValueError is raised if it is out of range.
    """
    basis, rows = bases[layer], torch.tensor([position])
    F = len(basis.W)
    if not -F <= neuron < F:
        raise ValueError(f"neuron: expected {-F} to {F - 1}, got {neuron}")
    added = ffn_rows(recording, layer, rows).added
    values, scale = activations(recording, layer, rows, basis, added)
    wide = added.dtype
    part = values[0, neuron].to(wide) * basis.W[neuron].to(wide)
    return part if scale is None else part * scale[0]


@torch.inference_mode()
def neuron_scores(
    recording: Recording,
    layer: int,
    rows: Tensor,
    kind: NodeKind,
    bases: NeuronBases,
    kernel: Kernel,
) -> NeuronScores:
    """The neurons as parts of `post`, beside the stream (and attention in a parallel block), or as
    parts of the `ffn` node, their sum. rows: [R] int64, CPU, ascending.
    """
    from ..kernels.neurons import neuron_proximities

    basis, ffn = bases[layer], ffn_rows(recording, layer, rows)
    values, scale = activations(recording, layer, rows, basis, ffn.added)
    c = values.to(ffn.added.dtype)
    if scale is not None:
        c = c * scale[:, None]
    y = ffn.added if kind == NodeKind.FFN else ffn.post
    of_neurons = neuron_proximities(c, basis.W, y)
    total = of_neurons.sum(-1)
    n_parts = torch.full_like(total, of_neurons.shape[1])
    of_residual = of_attention = None
    if kind == NodeKind.POST:
        of_residual = (y.abs() - (y - ffn.before).abs()).sum(-1).clamp(min=0)
        total, n_parts = total + of_residual, n_parts + 1
        if ffn.inputs.ffn is not None:
            of_attention, n_pairs = _of_attention(ffn.inputs, y, kernel)
            total, n_parts = total + of_attention, n_parts + n_pairs
    unattributed = total == 0
    total = torch.where(unattributed, n_parts, total)

    def share(x: Tensor | None, n: Tensor | float = 1.0) -> Tensor | None:
        if x is None:
            return None
        column = (-1, *(1 for _ in x.shape[1:]))
        share = torch.where(unattributed.view(column), n, x) / total.view(column)
        return plain_tensor(share.float().clamp_(max=1).cpu())

    importance = share(of_neurons)
    assert importance is not None
    return NeuronScores(
        layer,
        kind,
        rows,
        plain_tensor(values.float().cpu()),
        importance,
        share(of_residual),
        None if of_attention is None else share(of_attention, n_pairs),
        plain_tensor(unattributed.cpu()),
    )


def _of_attention(inputs: LayerInputs, y: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """The summed proximity of all (head, key) pairs of a parallel block's rows, and their number,
    both [R].
    """
    scores = kernel_of(kernel, inputs).score_attention(inputs, 1.0)
    total = scores.total.masked_fill(scores.unattributed, 0).to(y.dtype)
    n_keys = visible(inputs.rows, len(inputs.k), inputs.window).sum(-1).to(y)
    return scores.head_total.to(y.dtype).sum(-1) * total, inputs.q.shape[1] * n_keys
