"""One layer of a cached run: the parts of its node, and their scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...arguments import index_within
from ...errors import UnsupportedArchitectureError
from ...scoring.closure import closure_of
from ...scoring.given_rows import given_rows, score_given
from ...scoring.implementations import Kernel
from ...scoring.scores import LayerScores

if TYPE_CHECKING:
    from torch import nn


_TOLERANCE = 1e-3  # relative error of a sum of parts that counts as rounding, at least
LAYER_ENTRIES = (
    "hook_resid_pre",
    "attn.hook_pattern",
    "attn.hook_v",
    "attn.hook_out",
    "hook_attn_out",
    "ln1_post.hook_scale",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
)


class Layer(NamedTuple):
    """One layer, in float32 or wider; T positions."""

    resid_pre: Tensor  # [T, D]
    y: Tensor  # [T, D] the node: resid_mid, or resid_post in a parallel block
    resid_post: Tensor  # [T, D]
    ffn: Tensor | None  # [T, D], parallel blocks only
    pattern: Tensor  # [H, T, T]
    v: Tensor  # [T, H, V]
    W_O: Tensor  # [H, V, D] contiguous in V
    row_scale: Tensor | None  # [T] factor of a norm behind attention
    bias: Tensor  # [D], or [T, D] with a norm behind attention
    dtype: torch.dtype  # dtype of the cache

    @property
    def parallel(self) -> bool:
        """True if the MLP's output is a part of the same node as attention's output."""
        return self.ffn is not None


def score_block(kernel: Kernel, layer: int, of: Layer, rows: Tensor, keep: float) -> LayerScores:
    """Scores a few rows of a layer."""
    at = rows.to(of.y.device)
    S = int(rows[-1]) + 1
    weight = of.pattern[:, at, :S].permute(1, 2, 0)  # [R, S, H]
    if of.row_scale is not None:
        weight = weight * of.row_scale[at, None, None]
    ffn = None if of.ffn is None else of.ffn[at]
    inputs = given_rows(weight[..., None] * of.v[:S], of.W_O, of.resid_pre[at], of.y[at], ffn)
    scores = score_given(kernel, inputs, rows, keep)
    bias = of.bias if of.bias.ndim == 1 else of.bias[at]
    errors = closure_of(inputs, scores.linear, bias, torch.finfo(of.dtype).eps)
    of_ffn = None if of.parallel else kernel.score_ffn(inputs.y, of.resid_post[at])
    ffn_share = scores.ffn if of_ffn is None else of_ffn.ffn
    assert ffn_share is not None
    return LayerScores(
        layer,
        rows,
        keep,
        scores.residual.float(),
        ffn_share.float(),
        None if of_ffn is None else of_ffn.residual.float(),
        scores.head_total.float(),
        scores.unattributed,
        None if of_ffn is None else of_ffn.unattributed,
        scores.edges,
        errors,
    )


class Entries(NamedTuple):
    """A cache's entries of one layer, without the batch dimension."""

    cache: dict[str, Tensor]
    layer: int
    n_tokens: int
    batch_item: int

    def get(self, name: str, ndim: int) -> Tensor | None:
        """An entry, which has `ndim` dimensions besides the batch's, or None."""
        name = f"blocks.{self.layer}.{name}"
        if name not in self.cache:
            return None
        x = batch_row(self.cache[name].detach(), ndim, self.batch_item, name)
        length = x.shape[-1] if name.endswith("hook_pattern") else x.shape[0]
        if length != self.n_tokens:
            raise ValueError(
                f"cache: {name} has {length} positions, expected {self.n_tokens} as in tokens"
            )
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def need(self, name: str, ndim: int) -> Tensor:
        """As `get`; raises ValueError if the cache has no such entry."""
        x = self.get(name, ndim)
        if x is None:
            raise ValueError(
                f"cache: has no blocks.{self.layer}.{name}; expected a run_with_cache of the whole "
                "model, or with names_filter for at least the entries that CachedRun.of asks for"
            )
        return x


def open_layer(model: nn.Module, entries: Entries) -> Layer:
    """Finds how a layer's parts add up to its node; raises an error if they do not."""
    layer, T = entries.layer, entries.n_tokens
    name = f"model: blocks.{layer}"
    pre, post = entries.need("hook_resid_pre", 2), entries.need("hook_resid_post", 2)
    pattern, v = entries.need("attn.hook_pattern", 3), entries.need("attn.hook_v", 3)
    y, ffn, mid = post, None, None
    if getattr(model.cfg, "parallel_attn_mlp", False):
        ffn = entries.need("hook_mlp_out", 2)
    elif not getattr(model.cfg, "attn_only", False):
        y = mid = entries.need("hook_resid_mid", 2)
    if pattern.shape[1:] != (T, T) or bool(pattern.triu(1).any()):
        raise UnsupportedArchitectureError(
            f"{name}: its attention pattern of shape {tuple(pattern.shape)} is not causal from the "
            "text to itself"
        )
    H, D = len(pattern), pre.shape[1]
    v = v.repeat_interleave(H // v.shape[1], dim=1) if H % v.shape[1] == 0 else v
    try:
        attention = model.blocks[layer].attn  # type: ignore[index, union-attr]
        W_O, b_O = attention.W_O, getattr(attention, "b_O", None)
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise UnsupportedArchitectureError(f"{name}: has no W_O by heads ({error})") from error
    if tuple(W_O.shape) != (H, v.shape[2], D) or v.shape[1] != H:
        raise UnsupportedArchitectureError(
            f"{name}: expected W_O of shape {(H, v.shape[2], D)}, heads, values, width, got "
            f"{tuple(W_O.shape)}"
        )
    W_O = W_O.detach().to(pre)
    b_O = pre.new_zeros(D) if b_O is None else b_O.detach().to(pre)
    attended = torch.einsum("hts,shv,hvd->td", pattern, v, W_O) + b_O

    # Attention may add its output, its output after a norm, or its output times a factor. Each has
    # its W_O, bias and row_scale. A norm or factor is fitted only if the cache shows that it
    # applies to this output.
    dtype = entries.cache[f"blocks.{layer}.hook_resid_pre"].dtype
    eps = torch.finfo(dtype).eps
    outputs: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = [(attended, W_O, b_O, None)]
    scale, attn_out = entries.get("ln1_post.hook_scale", 2), entries.get("hook_attn_out", 2)
    raw = entries.get("attn.hook_out", 2)
    if scale is not None and attn_out is not None:
        if _is_rms(scale[:, 0], attended, eps):
            row_scale = 1 / scale[:, 0]
            normed = attended * row_scale[:, None]
            weight = _fit(normed, attn_out, 0)
            bias = b_O * row_scale[:, None] * weight
            outputs.append((normed * weight, W_O * weight, bias, row_scale))
    elif mid is not None and raw is not None and _error(raw, attended, eps) <= 1:
        number = _fit(attended, mid - pre, (0, 1))
        outputs.append((attended * number, W_O * number, b_O * number, None))

    rest = y - pre if ffn is None else y - pre - ffn
    errors = []
    for output, effective, bias, by_row in outputs:
        errors.append(_error(rest, output, eps, y, pre))
        if errors[-1] <= 1:
            W_O = effective.transpose(1, 2).contiguous().transpose(1, 2)
            return Layer(pre, y, post, ffn, pattern, v, W_O, by_row, bias, dtype)
    raise UnsupportedArchitectureError(
        f"{name}: its parts do not add up (the error is {min(errors):.1f} times that of rounding); "
        "did a hook change activations, or did weights change after the run?"
    )


def _fit(x: Tensor, to: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The factor, constant along `dim`, that brings x nearest to `to`."""
    return (x * to).sum(dim) / x.square().sum(dim).clamp(min=torch.finfo(x.dtype).tiny)


def _is_rms(scale: Tensor, x: Tensor, eps: float) -> bool:
    """True if scale [T]² is the mean square of each row of x [T, D] plus a norm's epsilon."""
    number = scale.square() - x.square().mean(-1)
    strays = (number - number.median()).abs() / scale.square()
    return bool((strays <= max(_TOLERANCE, 8 * eps)).all())


def _error(got: Tensor, expected: Tensor, eps: float, *beside: Tensor) -> float:
    """The largest error of a row of `got` [T, D], in units of rounding.

    beside: tensors whose difference `got` is.
    """
    norm = torch.linalg.vector_norm
    granted = max(8 * eps, _TOLERANCE) * norm(expected, dim=-1)
    granted += 8 * eps * sum(norm(x, dim=-1) for x in beside)
    error = norm(got - expected, dim=-1) / granted.clamp(min=1e-30)
    return float(error.max().nan_to_num(nan=float("inf")))


def batch_row(x: Tensor, ndim: int, batch_item: int, name: str) -> Tensor:
    """`x` with `ndim` dimensions, taken out of a batch if it is in one."""
    if x.ndim == ndim:
        return x
    if x.ndim != ndim + 1:
        raise ValueError(f"{name}: expected {ndim} or {ndim + 1} dimensions, got {x.ndim}")
    return x[index_within("batch_item", batch_item, len(x))]
