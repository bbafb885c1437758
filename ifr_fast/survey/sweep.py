"""A sweep is one forward pass over a batch of documents that scores each layer when it returns.

At that time the layer's q, k, v and the residual stream before and after it are still in memory.
All rows of all documents are scored, the edges above `keep` are kept, and the rest is dropped. Only
one layer is thus in memory at a time. Layers are scored bottom first: an edge's weight depends on
its target alone, so graphs can be read off the edges afterwards (walk.py).

Documents are padded on the right and nothing is masked, as in recording/record.py. The last token
of a document is predicted, but not read by the model.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.contract import LayerInputs
from ..model.block import Block
from ..model.decoder import Decoder
from ..model.hooks import LayerCall
from ..model.modes import evaluating
from ..model.node_parts import mid_parts, post_parts
from ..model.replay import gate_rows, passing_error, post_norm_inputs
from ..recording.batches import can_batch
from ..recording.layer_inputs import LayerRows
from ..recording.layer_pass import WatchedLayer, WatchedPass, pad
from ..scoring.closure import check_closure
from ..scoring.implementations import Kernel
from ..scoring.layer import score_rows
from ..scoring.scores import LayerScores

_HEAD_ROWS = 512  # rows whose logits are computed at once, unless the vocabulary is large
_HEAD_ELEMENTS = 1 << 25
_SOFTMAX_ROWS = 16  # rows of logits that fit into a CPU's cache


class LayerEdges(NamedTuple):
    """One layer's attention edges above `keep`; nodes are numbered through all documents."""

    target: Tensor  # [E] int64, b * T + t, ascending
    source: Tensor  # [E] int64, b * T + s
    weight: Tensor  # [E] float32, summed over heads
    head_weight: Tensor  # [E, H] float32


class Swept(NamedTuple):
    """The results of a pass over B documents, on the CPU; T rows each, padded with zeros.

    Node b * T + t is position t of document b. A parallel block has `residual` and `ffn` in one
    denominator, and its `ffn_residual` is NaN.
    """

    lengths: list[int]  # rows of each document: one less than its tokens
    n_rows: int  # T
    parallel: list[bool]  # [L]
    value_layers: list[int]  # [L] the layer whose resid_pre the sources of attention's edges are
    residual: Tensor  # [L, B * T] float32
    ffn: Tensor  # [L, B * T] float32
    ffn_residual: Tensor  # [L, B * T] float32
    head_mass: Tensor  # [L, B, H] float32, importance of a head summed over rows and sources
    edges: list[LayerEdges]
    logit: Tensor  # [B * T] float32, of the token that follows
    probability: Tensor  # [B * T] float32
    finite: list[bool]  # false if a document's states are not: its numbers are then meaningless


@torch.inference_mode()
def sweep(decoder: Decoder, documents: list[Tensor], keep: float, kernel: Kernel) -> Swept:
    """Scores every prediction of some documents of token ids [T_b + 1], T_b at least 1.

    Raises IfrError where parts do not add up, and UnsupportedArchitectureError where attention
    reads other keys than on the probe that the model was opened with.
    """
    lengths = [len(ids) - 1 for ids in documents]
    T = max(lengths)
    token_ids = pad(documents)[:, :-1]
    layers = _Layers(lengths, keep, kernel)
    watched = WatchedPass(decoder, lengths, left=layers.score, sums=True)
    with watched.watching():
        if can_batch(decoder):
            states = decoder.forward_batch(token_ids)
        else:
            states = decoder.forward(token_ids[0])[0][None]
    finite = watched.finite()
    for closures, is_finite in zip(layers.closures, finite, strict=True):
        if is_finite:
            check_closure(closures)
    logit, probability = torch.zeros(2, len(documents), T)
    read = torch.cat([states[b, :n] for b, n in enumerate(lengths)])
    following = torch.cat([ids[1:] for ids in documents])
    begin = 0
    found = _following(decoder, read, following)
    for b, n in enumerate(lengths):
        logit[b, :n], probability[b, :n] = found[:, begin : begin + n]
        begin += n
    return Swept(
        lengths=lengths,
        n_rows=T,
        parallel=[block.parallel for block in decoder.blocks],
        value_layers=decoder.value_layers or list(range(decoder.n_layers)),
        residual=torch.stack(layers.residual),
        ffn=torch.stack(layers.ffn),
        ffn_residual=torch.stack(layers.ffn_residual),
        head_mass=torch.stack(layers.head_mass),
        edges=layers.edges,
        logit=logit.flatten(),
        probability=probability.flatten(),
        finite=finite,
    )


class _Layers:
    """Scores each layer as it is left, and keeps what `Swept` needs, layer by layer."""

    def __init__(self, lengths: list[int], keep: float, kernel: Kernel) -> None:
        self.lengths, self.keep, self.kernel = lengths, keep, kernel
        self.residual: list[Tensor] = []
        self.ffn: list[Tensor] = []
        self.ffn_residual: list[Tensor] = []
        self.head_mass: list[Tensor] = []
        self.edges: list[LayerEdges] = []
        self.closures: list[dict[int, Tensor]] = [{} for _ in lengths]

    def score(self, layer: WatchedLayer) -> None:
        """All documents' rows of a layer."""
        scores = []
        for b, n in enumerate(self.lengths):
            found = score_rows(layer.block, _rows(layer, b, n), self.keep, self.kernel)
            self.closures[b][layer.block.layer] = found.closure
            scores.append(found)
        self._keep(scores)

    def _keep(self, scores: list[LayerScores]) -> None:
        """Keeps a layer's scores, moved to the CPU."""
        T = max(self.lengths)

        def padded(of_each: list[Tensor]) -> Tensor:
            out = of_each[0].new_zeros(len(of_each), T)
            for b, x in enumerate(of_each):
                out[b, : len(x)] = x
            return out.flatten().cpu()

        self.residual.append(padded([s.residual for s in scores]))
        self.ffn.append(padded([s.ffn for s in scores]))
        if scores[0].ffn_residual is None:
            self.ffn_residual.append(torch.full_like(self.ffn[-1], math.nan))
        else:
            self.ffn_residual.append(padded([_known(s.ffn_residual) for s in scores]))
        self.head_mass.append(torch.stack([s.head_total.sum(0) for s in scores]).cpu())
        edges = [s.edges for s in scores]
        found = LayerEdges(
            torch.cat([e.row + b * T for b, e in enumerate(edges)]),
            torch.cat([e.source + b * T for b, e in enumerate(edges)]),
            torch.cat([e.weight for e in edges]).float(),
            torch.cat([e.head_weight for e in edges]).float(),
        )
        if found.weight.device.type != "cpu":
            found = LayerEdges(*(x.cpu() for x in found))
        if not bool((found.weight > 0).all()):  # a GPU's kernels pad their lists
            kept = (found.weight > 0).nonzero().squeeze(1)
            found = LayerEdges(*(x[kept] for x in found))
        if not bool((found.target[1:] >= found.target[:-1]).all()):
            order = found.target.argsort(stable=True)
            found = LayerEdges(*(x[order] for x in found))
        self.edges.append(found)


def _rows(layer: WatchedLayer, b: int, n: int) -> LayerRows:
    """What `recording.layer_inputs` makes, for all `n` rows of document `b`."""
    block, call = layer.block, layer.attention
    device = block.W_O.device
    rows = torch.arange(n)

    def take(x: Tensor) -> Tensor:
        return x[b, :n].to(device)

    def heads(x: Tensor) -> Tensor:
        return x[b].transpose(0, 1)[:n].to(device)

    resid_pre, resid_mid, resid_post = map(
        take, (layer.resid_pre, layer.resid_mid, layer.resid_post)
    )
    value_gate, z = None, take(layer.z)
    made_of = None if call.recurrence is None else call.recurrence.of_text(b, n)
    if block.gate_site is not None:
        value_gate = gate_rows(block, layer.call_of(b), layer.resid_pre[b], rows, z)
    of_mid = mid_parts(block, resid_pre, resid_mid, z, value_gate)
    inputs = LayerInputs(
        rows=rows,
        resid_pre=of_mid.residual,
        y=resid_post if block.parallel else resid_mid,
        q=heads(call.q),
        k=heads(call.k),
        v=heads(call.v),
        W_O=block.W_O,
        scale=call.scale,
        row_scale=of_mid.row_scale,
        value_gate=value_gate,
        window=layer.window_of(n),
        softcap=call.softcap,
        sinks=call.sinks,
        alibi_slopes=call.alibi_slopes,
        log_sum_exp=None if layer.log_sum_exp is None else take(layer.log_sum_exp),
        ffn=resid_post - resid_mid if block.parallel else None,
        pattern=None if made_of is None else made_of.on(device).pattern(),
    )
    if block.parallel:
        return LayerRows(inputs, None, of_mid.bias)
    normed = None
    if block.residual is not None and block.residual.post_norm is not None:
        normed = post_norm_inputs(block, layer.call_of(b), layer.resid_pre[b], z, rows)
    error = passing_error(block, layer.call_of(b), layer.resid_pre[b], rows)
    return LayerRows(inputs, post_parts(block, resid_mid, resid_post, normed, error), of_mid.bias)


def _known(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _following(decoder: Decoder, states: Tensor, token_ids: Tensor) -> Tensor:
    """[2, R] float32 on the CPU: logit and probability of each row's token. states: [R, D]."""
    step = max(1, min(_HEAD_ROWS, _HEAD_ELEMENTS // decoder.vocab_size))
    out = torch.empty(2, len(states))

    def skip(_: Block, hidden: Tensor, __: LayerCall) -> Tensor:
        return hidden

    with ExitStack() as stack:
        if can_batch(decoder):  # only the head is needed
            stack.enter_context(evaluating(decoder.model))
            stack.enter_context(decoder.overriding_layers(skip))
        for begin in range(0, len(states), step):
            rows = slice(begin, begin + step)
            logits = decoder.head(states[rows].to(decoder.device))
            ids = token_ids[rows, None].to(logits.device)
            of_device = _SOFTMAX_ROWS if logits.device.type == "cpu" else len(logits)
            for i in range(0, len(logits), of_device):
                block, its = logits[i : i + of_device].float(), ids[i : i + of_device]
                at = slice(begin + i, begin + i + len(block))
                out[0, at] = block.gather(1, its).squeeze(1).cpu()
                out[1, at] = block.log_softmax(-1).gather(1, its).squeeze(1).exp().cpu()
    return out
