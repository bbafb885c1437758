"""Details behind a graph: the map of a head, the tokens of a node, the neurons of a node.

Everything is computed from a Recording; `Tracer` offers these functions to users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .graph import Node, NodeKind, Prediction, as_index
from .kernels.contract import LayerInputs, visible
from .lens import direct_logits, lens_logits
from .neurons import NeuronBases, activations
from .prefill import attended
from .recording import Recording, layer_inputs
from .scoring import check_closure, load_kernel, score_layer
from .tokens import token_strings

_MAP_ELEMENTS = 1 << 22  # limit on [R, S, H] that is scored at once


class TokenScore(NamedTuple):
    """A token, and the number that is added to its logit."""

    token: str
    token_id: int
    logit: float


@dataclass(frozen=True, eq=False)
class NodeLens:
    """The predictions of a node, decoded as if it were the final state (logit lens)."""

    node: Node
    logits: Tensor  # [vocab] float32
    predictions: list[Prediction]  # most probable first

    def rank(self, token_id: int) -> int:
        """The token's place: 1 is the most probable; tokens that tie share the better place."""
        return int((self.logits > self.logits[self._known(token_id)]).sum()) + 1

    def probability(self, token_id: int) -> float:
        """The token's probability by the softmax of the logits."""
        return float(self.logits.double().softmax(-1)[self._known(token_id)])

    def _known(self, token_id: int) -> int:
        if not 0 <= as_index("token_id", token_id) < len(self.logits):
            raise ValueError(f"token_id: expected 0 to {len(self.logits) - 1}, got {token_id}")
        return token_id


@dataclass(frozen=True, eq=False)
class PromotedTokens:
    """The logits that one part of a residual stream adds at its position."""

    part: Tensor  # [D] float32
    logits: Tensor  # [vocab] float32, a summand of the logits of all parts
    promoted: list[TokenScore]  # largest first
    suppressed: list[TokenScore]  # most negative first


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
        if as_index("k", k) < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        found = []
        order = self.importance.argsort(dim=-1, descending=True, stable=True)[:, :k]
        for chosen, activation, importance in zip(
            order, self.activations, self.importance, strict=True
        ):
            columns = chosen.tolist(), activation[chosen].tolist(), importance[chosen].tolist()
            found.append([Neuron(*row) for row in zip(*columns, strict=True)])
        return found


@torch.inference_mode()
def contribution_map(recording: Recording, layer: int, head: int | None, impl: str) -> Tensor:
    """[T, T] float32: importance of each source (column) in each target (row), for one head or all
    heads together. Scored in row blocks.
    """
    T, H = len(recording), recording.decoder.n_heads
    out = torch.zeros(T, T)
    step = max(1, _MAP_ELEMENTS // (T * H))
    with attended(recording.decoder):
        for rows in torch.arange(T).split(step):
            scores = score_layer(recording, layer, rows, 0.0, impl)
            check_closure({layer: scores.closure})
            row, source, weight, of_heads = (x.cpu() for x in scores.attention.edges)
            values = weight if head is None else of_heads[:, head]
            kept = weight > 0  # padding has arbitrary sources
            out[rows[row[kept]], source[kept]] = values[kept].float()
    return _plain(out)


def lenses(
    recording: Recording, nodes: list[Node], k: int, tokenizer: PreTrainedTokenizerBase | None
) -> list[NodeLens]:
    """The logits and predictions of each node by the model's own norm and head."""
    states = torch.stack([_state(recording, node) for node in nodes])
    logits = lens_logits(recording.decoder, states.to(recording.decoder.device)).float().cpu()
    found = []
    for node, row in zip(nodes, _plain(logits), strict=True):
        top = row.softmax(-1).topk(min(k, len(row)))
        strings = token_strings(top.indices, tokenizer)
        columns = strings, top.indices.tolist(), top.values.tolist()
        found.append(NodeLens(node, row, [Prediction(*p) for p in zip(*columns, strict=True)]))
    return found


def promoted_tokens(
    recording: Recording,
    part: Tensor,
    position: int,
    k: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> PromotedTokens:
    """The logits that `part` [D] of the stream adds at a position."""
    final = recording.resid_final[position].to(part.device)
    logits = _plain(direct_logits(recording.decoder, part[None], final[None])[0].float().cpu())

    def scores(top: Any) -> list[TokenScore]:
        strings = token_strings(top.indices, tokenizer)
        columns = strings, top.indices.tolist(), top.values.tolist()
        return [TokenScore(*row) for row in zip(*columns, strict=True)]

    k = min(k, len(logits))
    return PromotedTokens(
        _plain(part.float().cpu()),
        logits,
        scores(logits.topk(k)),
        scores(logits.topk(k, largest=False)),
    )


@torch.inference_mode()
def head_output(
    recording: Recording, layer: int, head: int, position: int, source: int | None = None
) -> Tensor:
    """[D] a head's output at a position, in float32 or wider; with `source`, only its part from
    that position.
    """
    from .kernels.rows import attention_pattern

    with attended(recording.decoder):
        inputs, _ = layer_inputs(recording, layer, torch.tensor([position]))
    one = _one_head(inputs, head, position + 1)
    mask = visible(one.rows, position + 1, one.window).to(one.v.device)
    alpha = attention_pattern(one, mask)[0, 0]  # [S]
    values = one.v[:, 0]
    z = alpha @ values if source is None else alpha[source] * values[source]
    if one.value_gate is not None:
        z = z * one.value_gate[0, 0]
    part = z @ one.W_O[0]
    return part if one.row_scale is None else part * one.row_scale[0]


def _one_head(inputs: LayerInputs, head: int, n_keys: int) -> LayerInputs:
    """The inputs of a single head and the keys before `n_keys`, in float32 or wider."""
    of_kv = head // (inputs.q.shape[1] // inputs.k.shape[1])

    def cut(x: Tensor | None, dim: int) -> Tensor | None:
        return None if x is None else x.narrow(dim, head, 1)

    one = inputs._replace(
        q=inputs.q[:, head : head + 1],
        k=inputs.k[:n_keys, of_kv : of_kv + 1],
        v=inputs.v[:n_keys, of_kv : of_kv + 1],
        W_O=inputs.W_O[head : head + 1],
        value_gate=cut(inputs.value_gate, 1),
        sinks=cut(inputs.sinks, 0),
        alibi_slopes=cut(inputs.alibi_slopes, 0),
        log_sum_exp=cut(inputs.log_sum_exp, 1),
    )
    return one.to(torch.promote_types(inputs.y.dtype, torch.float32))


@torch.inference_mode()
def ffn_output(recording: Recording, layer: int, position: int) -> Tensor:
    """[D] the FFN block's output at a position, in float32 or wider."""
    return _ffn_rows(recording, layer, torch.tensor([position])).added[0]


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
    added = _ffn_rows(recording, layer, rows).added
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
    impl: str,
) -> NeuronScores:
    """The neurons as parts of `post`, beside the stream (and attention in a parallel block), or as
    parts of the `ffn` node, their sum. rows: [R] int64, CPU, ascending.
    """
    from .kernels.neurons import neuron_proximities

    basis, ffn = bases[layer], _ffn_rows(recording, layer, rows)
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
            of_attention, n_pairs = _of_attention(ffn.inputs, y, impl)
            total, n_parts = total + of_attention, n_parts + n_pairs
    unattributed = total == 0
    total = torch.where(unattributed, n_parts, total)

    def share(x: Tensor | None, n: Tensor | float = 1.0) -> Tensor | None:
        if x is None:
            return None
        column = (-1, *(1 for _ in x.shape[1:]))
        share = torch.where(unattributed.view(column), n, x) / total.view(column)
        return _plain(share.float().cpu())

    importance = share(of_neurons)
    assert importance is not None
    return NeuronScores(
        layer,
        kind,
        rows,
        _plain(values.float().cpu()),
        importance,
        share(of_residual),
        None if of_attention is None else share(of_attention, n_pairs),
        _plain(unattributed.cpu()),
    )


def _of_attention(inputs: LayerInputs, y: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """The summed proximity and the number of all (head, key) pairs in each row of a parallel block,
    both [R].
    """
    scores = load_kernel(impl).score_attention(inputs, 1.0)
    total = scores.total.masked_fill(scores.unattributed, 0).to(y.dtype)
    n_keys = visible(inputs.rows, len(inputs.k), inputs.window).sum(-1).to(y)
    return scores.head_total.to(y.dtype).sum(-1) * total, inputs.q.shape[1] * n_keys


class _FFNRows(NamedTuple):
    """R rows of an FFN block, in float32 or wider."""

    before: Tensor  # [R, D] `resid_mid`; in a parallel block `resid_pre`
    added: Tensor  # [R, D]
    post: Tensor  # [R, D]
    inputs: LayerInputs


def _ffn_rows(recording: Recording, layer: int, rows: Tensor) -> _FFNRows:
    with torch.inference_mode(), attended(recording.decoder):
        inputs, resid_post = layer_inputs(recording, layer, rows)
    wide = torch.promote_types(inputs.y.dtype, torch.float32)
    if resid_post is None:
        assert inputs.ffn is not None
        return _FFNRows(inputs.resid_pre.to(wide), inputs.ffn.to(wide), inputs.y.to(wide), inputs)
    mid, post = inputs.y.to(wide), resid_post.to(wide)
    return _FFNRows(mid, post - mid, post, inputs)


@torch.inference_mode()
def _state(recording: Recording, node: Node) -> Tensor:
    """[D] the node's representation."""
    layer, kind, position = node
    match kind:
        case NodeKind.EMBED:
            return recording.layers[0].resid_pre[position]
        case NodeKind.POST:
            return recording.resid_post(layer)[position]
        case NodeKind.FFN:
            return ffn_output(recording, layer, position).to(recording.decoder.dtype)
        case NodeKind.MID:
            with attended(recording.decoder):
                inputs, resid_post = layer_inputs(recording, layer, torch.tensor([position]))
            if resid_post is None:
                raise ValueError(
                    f"nodes: layer {layer} is a parallel block, which has no {kind.value}"
                )
            return inputs.y[0]


def _plain(x: Tensor) -> Tensor:
    """`x` as a tensor that autograd accepts."""
    with torch.inference_mode(False):
        return x.clone() if x.is_inference() else x
