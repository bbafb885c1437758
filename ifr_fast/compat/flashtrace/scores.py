"""FlashTrace's arithmetic on this project's kernels: importances of token edges over layers.

In each layer, for a row (or a sum of rows, which is scored as one row) with node y:

    proximity(p, y) = max(|y|_1 - |y - p|_1, 0), 0 if below the given threshold,
    e[j] = sum over heads h of proximity(p[h, j], y) / (all of them + that of resid_pre + 1e-12).

Unlike in `Tracer`, a row without proximities scores 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.contract import LayerInputs
from ...model.block import Block
from ...model.node_parts import PostParts
from ...recording.layer_inputs import layer_inputs
from ...recording.recording import Recording
from ...scoring.closure import check_closure
from ...scoring.given_rows import rows_closure, summed_row
from ...scoring.implementations import Kernel, kernel_of
from ...tracer import Tracer

_EPS = 1e-12  # added to every denominator
_NORM_EPS = 1e-6  # FlashTrace's epsilon for a norm without an attribute `eps`
_BLOCK_PAIRS = 1 << 22  # pairs of row and key whose edges are listed at once


@dataclass
class IFRLayerResult:
    """One layer's importances at a row. Tensors are float32, on the CPU."""

    e_attn_tokens: Tensor  # [T]
    e_resid_attn: float
    head_importance: Tensor  # [H]
    e_ffn: float
    e_resid_ffn: float


@dataclass
class IFRAggregate:
    """A row's importances summed over layers. Tensors are float32, on the CPU."""

    per_layer: list[IFRLayerResult]
    token_importance_total: Tensor  # [T]
    head_importance_total: Tensor  # [H]
    ffn_importance_per_layer: Tensor  # [L]
    resid_ffn_importance_per_layer: Tensor  # [L]

    @staticmethod
    def zero(n_tokens: int, n_layers: int, n_heads: int) -> IFRAggregate:
        """The aggregate of a row that nothing flowed to."""
        L, T, H = n_layers, n_tokens, n_heads
        return IFRAggregate([], torch.zeros(T), torch.zeros(H), torch.zeros(L), torch.zeros(L))


class Options(NamedTuple):
    """Options for computing and counting parts."""

    threshold: float = 0.0  # proximities below it count as 0
    parity: bool = True  # compute values as FlashTrace does, not as attention read them


@torch.no_grad()
def token_matrix(
    tracer: Tracer, recording: Recording, begin: int, end: int, options: Options
) -> Tensor:
    """Token importances [R, T] of the rows from `begin` to before `end`, summed over layers;
    float32, on the CPU.
    """
    T, kernel = len(recording), tracer.kernel
    blocks = []
    step = max(1, _BLOCK_PAIRS // T)
    for first in range(begin, end, step):
        rows = torch.arange(first, min(first + step, end))
        block = torch.zeros(len(rows), T, device=recording.resid_final.device)
        for layer in _layers(tracer, recording, rows, options.parity):
            found = _proximities(kernel, layer.inputs, options.threshold)
            total = found.beside.index_add(0, found.row, found.weight) + _EPS
            weight = (found.weight / total[found.row]).to(block)
            # If several entries have the same place, all but one are padding with weight 0.
            at = (found.row.to(block.device), found.source.to(block.device))
            block.index_put_(at, weight, accumulate=True)
        blocks.append(block.cpu())
    return torch.cat(blocks)


@torch.no_grad()
def aggregate(
    tracer: Tracer,
    recording: Recording,
    begin: int,
    end: int,
    options: Options,
    weights: Tensor | None = None,
) -> IFRAggregate:
    """The importances of the sum of the rows from `begin` to before `end`.

    weights: weights [R] of the rows, rescaled to sum to 1; None: 1 each.
    """
    rows, kernel = torch.arange(begin, end), tracer.kernel
    of_rows = torch.ones(len(rows))
    if weights is not None:
        of_rows = weights.float() / (weights.float().sum() + _EPS)
    n_tokens, n_heads = len(recording), tracer.decoder.n_heads
    found = [
        _layer_result(kernel, layer, of_rows, n_tokens, n_heads, options.threshold)
        for layer in _layers(tracer, recording, rows, options.parity)
    ]
    return IFRAggregate(
        found,
        torch.stack([x.e_attn_tokens for x in found]).sum(0),
        torch.stack([x.head_importance for x in found]).sum(0),
        torch.tensor([x.e_ffn for x in found]),
        torch.tensor([x.e_resid_ffn for x in found]),
    )


class _Layer(NamedTuple):
    inputs: LayerInputs
    post: PostParts | None  # None in a parallel block


def _layers(tracer: Tracer, recording: Recording, rows: Tensor, parity: bool) -> Iterator[_Layer]:
    """Inputs of the kernels for `rows` [R] of each layer, from the bottom up.

    Raises IfrError in the end if a layer's parts do not add up to the model's own activations.
    """
    closures: dict[int, Tensor] = {}
    for block in tracer.decoder.blocks:
        with recording.replaying():
            inputs, post, bias = layer_inputs(recording, block.layer, rows)
        closures[block.layer] = rows_closure(inputs, bias)
        if post is not None and post.error is not None:
            closures[block.layer] = closures[block.layer].maximum(post.error)
        if parity:
            resid_pre = recording.layers[block.layer].resid_pre.to(inputs.v.device)
            inputs = inputs._replace(v=_values(block, resid_pre, inputs.v))
        yield _Layer(inputs, post)
    check_closure(closures)


def _values(block: Block, resid_pre: Tensor, v: Tensor) -> Tensor:
    """Values v [S, H_kv, V] as FlashTrace computes them: without the bias of a v_proj, and with its
    epsilon in the norm of `resid_pre` [S, D].

    FlashTrace opens no model whose layers have other names; their v is returned unchanged.
    """
    projection = getattr(block.attention, "v_proj", None)
    norm = getattr(block.module, "input_layernorm", None)
    if projection is None or norm is None:
        return v
    bias = getattr(projection, "bias", None)
    if bias is not None:
        v = v - bias.detach().to(v).view(v.shape[1:])
    eps = getattr(norm, "variance_epsilon", _NORM_EPS)
    if type(norm).__name__.lower().endswith("rmsnorm") and not hasattr(norm, "eps"):
        wide = torch.promote_types(v.dtype, torch.float32)
        mean_square = resid_pre.to(wide).square().mean(-1)
        factor = ((mean_square + eps) / (mean_square + _NORM_EPS)).sqrt()
        v = v.to(wide) * factor[:, None, None]
    return v


class _Proximities(NamedTuple):
    """Nonzero proximities of a layer's pairs, and those of other parts, in float32 or wider."""

    row: Tensor  # [N]
    source: Tensor  # [N]
    weight: Tensor  # [N] summed over heads
    head_weight: Tensor  # [N, H]
    residual: Tensor  # [R]
    beside: Tensor  # [R] residual, in parallel blocks plus that of the FFN


def _proximities(kernel: Kernel, inputs: LayerInputs, threshold: float) -> _Proximities:
    """The kernel's shares times their total; 0 in rows without proximities."""
    scores = kernel_of(kernel, inputs).score_attention(inputs, 0.0)
    scale = scores.total.masked_fill(scores.unattributed, 0)
    row, source, weight, head_weight = scores.edges
    head_weight = head_weight * scale[row, None]
    weight = weight * scale[row]
    ffn = None if scores.ffn is None else scores.ffn * scale
    if threshold > 0:
        head_weight = head_weight.where(head_weight >= threshold, 0)
        weight = head_weight.sum(-1)
        ffn = None if ffn is None else ffn.where(ffn >= threshold, 0)
    residual = scores.residual * scale
    beside = residual if ffn is None else residual + ffn
    return _Proximities(row, source, weight, head_weight, residual, beside)


def _layer_result(
    kernel: Kernel, layer: _Layer, weights: Tensor, n_tokens: int, n_heads: int, threshold: float
) -> IFRLayerResult:
    """n_heads: of the layer that has most; the heads that this one lacks have importance 0."""
    row = summed_row(layer.inputs, weights)
    found = _proximities(kernel, row, threshold)
    total = found.beside.sum() + found.weight.sum() + _EPS
    tokens = torch.zeros(n_tokens)
    tokens.index_put_((found.source.cpu(),), (found.weight / total).float().cpu(), accumulate=True)
    heads = (found.head_weight.sum(0) / total).float().cpu()
    heads = torch.nn.functional.pad(heads, (0, n_heads - len(heads)))
    of_residual = float(found.residual / total)
    if layer.post is None:
        of_ffn = float((found.beside - found.residual) / total)
        return IFRLayerResult(tokens, of_residual, heads, of_ffn, of_residual)
    # FlashTrace weights a span's rows for attention only; the FFN takes their plain sum.
    mid, post = (x.to(row.y).sum(0) for x in (layer.post.residual, layer.post.y))
    given = layer.post.given_ffn
    rest = post - mid if given is None else given.to(row.y).sum(0)
    shares = _proximity(rest, post), _proximity(mid, post)
    ffn, passed = (x.where(x >= threshold, 0) for x in shares)
    both = ffn + passed + _EPS
    return IFRLayerResult(tokens, of_residual, heads, float(ffn / both), float(passed / both))


def _proximity(part: Tensor, y: Tensor) -> Tensor:
    """max(|y|_1 - |y - part|_1, 0) over the last dimension."""
    return (y.abs() - (y - part).abs()).sum(-1).clamp(min=0)
