"""TransformerLens on this engine: from a model and its activation cache to scores and graphs.

    logits, cache = model.run_with_cache(tokens)
    run = CachedRun(model, tokens, cache, logits)
    graph = run.trace(position=-1, threshold=0.04)

For a TransformerBridge (TransformerLens 3 and later) or a HookedTransformer (before 4), whatever
was done to its weights: folded norms, centred weights, moved value biases. Of each layer, the cache
gives `hook_resid_pre`, `attn.hook_pattern`, `attn.hook_v`, `hook_resid_mid` (in parallel blocks
`hook_mlp_out`) and `hook_resid_post`, the model `attn.W_O` and `attn.b_O`. Where a norm or a number
is between W_O and the residual stream, what the cache has of `ln1_post.hook_scale`, `hook_attn_out`
and `attn.hook_out` tells it.

1. A head's parts are pattern * (v @ W_O). The pattern is taken as it is and not computed of q and
   k, so what a hook made of it is what is explained (../given.py).
2. The node is `hook_resid_mid`; in a parallel block, where the MLP's output is one of its parts,
   and in one without an MLP it is `hook_resid_post`. resid_pre, the parts and b_O must add up to
   it, or `UnsupportedArchitectureError` is raised.
3. Scores and graphs are then those that `Tracer` makes of a text, with the same checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import UnsupportedArchitectureError
from ..given import given_rows, score_given
from ..graph import (
    Granularity,
    Prediction,
    RouteGraph,
    Routes,
    Span,
    assemble,
)
from ..lens import likeliest
from ..scoring import (
    Kernel,
    LayerScores,
    check_closure,
    choose_impl,
    closure,
    joined,
    load_kernel,
)
from ..tokens import token_strings
from ..tracer import (
    Position,
    check_options,
    grow,
    index_within,
    indices,
    spanned,
)

if TYPE_CHECKING:
    from torch import nn

# Rows of a kernel call, each of which lies beside its own keys: more would only fill tiles that
# are masked, fewer would prepare W_O more often (measured at 512 tokens of SmolLM2's shape).
_BLOCK_ROWS = 4
_BLOCK_VALUES = 1 << 25  # weighted values of such a block, off the CPU
_CHECKED = 8  # rows of a layer that are checked again after a kernel has scored them
_TOLERANCE = 1e-3  # relative error of a sum of parts that rounding explains, at least
_OF_LAYER = (
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


class Cache(Protocol):
    """An ActivationCache, or a dict of its entries."""

    def items(self) -> Iterable[tuple[str, Tensor]]: ...


class CachedRun:
    """A TransformerLens model's run on a text, ready to be traced at any position and threshold.

    model: a TransformerBridge or HookedTransformer, with the weights that it ran with.
    tokens: what it ran on, token ids [T] or [B, T], or the text. cache: what `run_with_cache`
    gave, of all positions, with or without its batch dimension; what is read is named above.
    logits: [T, vocab] or [B, T, vocab], for the graphs' predictions; without them there are none.
    batch_item: which text of several. impl: as in `Tracer`.

    Raises ValueError where the cache lacks something or is of another text, and
    `UnsupportedArchitectureError` where a layer's parts do not add up.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: str | Tensor,
        cache: Cache,
        logits: Tensor | None = None,
        *,
        batch_item: int = 0,
        impl: str = "auto",
    ) -> None:
        ids = _token_ids(model, tokens, batch_item)
        self.model = model
        self.token_ids = ids.cpu()
        self.tokens = token_strings(self.token_ids, getattr(model, "tokenizer", None))
        T = len(ids)
        entries = dict(cache.items())
        n_layers = int(model.cfg.n_layers)  # type: ignore[arg-type, union-attr]
        with torch.no_grad():
            self._layers = [
                _open_layer(model, _Entries(entries, i, T, batch_item)) for i in range(n_layers)
            ]
        first = self._layers[0]
        self.impl = choose_impl(impl, first.y.device, first.y.dtype)
        self._logits = None if logits is None else _item(logits.detach(), 2, batch_item, "logits")
        if self._logits is not None and len(self._logits) != T:
            raise ValueError(f"logits: expected those of {T} tokens, got {len(self._logits)}")

    @classmethod
    def of(cls, model: nn.Module, text: str | Tensor, *, impl: str = "auto") -> CachedRun:
        """Runs the model on a text, or on token ids [T] or [1, T], and caches what is needed."""
        ids = _token_ids(model, text, 0)
        names = {f"blocks.{i}.{x}" for i in range(int(model.cfg.n_layers)) for x in _OF_LAYER}  # type: ignore[arg-type, union-attr]
        with torch.no_grad():
            logits, cache = model.run_with_cache(ids[None], names_filter=names.__contains__)  # type: ignore[operator]
        return cls(model, ids, cache, logits, impl=impl)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def n_layers(self) -> int:
        """Blocks."""
        return len(self._layers)

    @property
    def n_heads(self) -> int:
        """Attention heads a layer."""
        return len(self._layers[0].W_O)

    def contributions(
        self,
        *,
        rows: Iterable[int] | Tensor | None = None,
        layers: Iterable[int] | None = None,
        keep: float = 0.01,
    ) -> Iterator[LayerScores]:
        """As `Tracer.contributions`: importances at `rows` of each of `layers`, top layer first."""
        if not 0 <= keep <= 1:
            raise ValueError(f"keep: expected a number from 0 to 1, got {keep}")
        at = torch.tensor(indices("rows", rows, len(self)))
        return self._contributions(at, indices("layers", layers, self.n_layers), keep)

    def _contributions(self, rows: Tensor, layers: list[int], keep: float) -> Iterator[LayerScores]:
        for layer in reversed(layers):
            scores = self._score(layer, rows, keep)
            check_closure({layer: scores.closure})
            yield scores

    @torch.no_grad()
    def trace(
        self,
        *,
        position: Position = -1,
        position_weights: Sequence[float] | Tensor | None = None,
        threshold: float = 0.04,
        granularity: Granularity = "token",
    ) -> RouteGraph:
        """As `Tracer.trace`: the route graph of the prediction made at `position`."""
        threshold = check_options(threshold, granularity)
        starts = spanned(position, position_weights, len(self))
        positions = list(starts)
        reached = torch.zeros(len(self), dtype=torch.bool, device=self._layers[0].y.device)
        reached[positions] = True
        grown = grow(
            lambda layer, rows: self._score(layer, rows, threshold),
            self.n_layers,
            reached,
            threshold,
            granularity,
        )
        predictions = self._predict(positions)
        return assemble(
            grown,
            [layer.parallel for layer in self._layers],
            tokens=self.tokens,
            token_ids=self.token_ids,
            position=positions[-1],
            threshold=threshold,
            granularity=granularity,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            predictions=predictions[-1],
            span=None
            if len(positions) == 1
            else Span(positions, list(starts.values()), predictions),
        )

    @torch.no_grad()
    def trace_all(self, *, threshold: float = 0.04, granularity: Granularity = "token") -> Routes:
        """As `Tracer.trace_all`: the route graphs of every position's prediction."""
        threshold = check_options(threshold, granularity)
        rows, device = torch.arange(len(self)), self._layers[0].y.device
        tables, closures = [], {}
        for layer in range(self.n_layers):
            scores = self._score(layer, rows, threshold)
            closures[layer] = scores.closure
            tables.append(scores.table(device))
        check_closure(closures)
        return Routes(
            tokens=self.tokens,
            token_ids=self.token_ids,
            threshold=threshold,
            granularity=granularity,
            layers=tables,
            predict=self._predict,
            scored_threshold=threshold,
        )

    @torch.no_grad()
    def _score(self, layer: int, rows: Tensor, keep: float) -> LayerScores:
        of, kernel = self._layers[layer], load_kernel(self.impl)
        step = _BLOCK_ROWS
        if of.y.device.type != "cpu":
            step = max(1, _BLOCK_VALUES // of.v.numel())
        checked = torch.arange(len(rows) - 1, -1, -math.ceil(len(rows) / _CHECKED))
        blocks = []
        for first in range(0, len(rows), step):
            sample = checked[(checked >= first) & (checked < first + step)] - first
            blocks.append(_score_block(kernel, layer, of, rows[first : first + step], sample, keep))
        return joined(blocks, rows)

    def _predict(self, positions: list[int]) -> list[list[Prediction]]:
        if self._logits is None:
            return [[] for _ in positions]
        return likeliest(self._logits[positions], getattr(self.model, "tokenizer", None))


class _Layer(NamedTuple):
    """One layer, in float32 or wider; T positions."""

    resid_pre: Tensor  # [T, D]
    y: Tensor  # [T, D] resid_mid, or resid_post in a parallel block
    resid_post: Tensor  # [T, D]
    ffn: Tensor | None  # [T, D], parallel blocks only
    pattern: Tensor  # [H, T, T]
    v: Tensor  # [T, H, V]
    W_O: Tensor  # [H, V, D] contiguous in V
    row_scale: Tensor | None  # [T] what a norm behind attention scales a row by
    bias: Tensor  # [D]; where a norm is behind it, [T, D]
    dtype: torch.dtype  # of the cache

    @property
    def parallel(self) -> bool:
        """Whether the MLP's output is a part of the same node as attention's."""
        return self.ffn is not None


def _score_block(
    kernel: Kernel, layer: int, of: _Layer, rows: Tensor, sample: Tensor, keep: float
) -> LayerScores:
    """Scores a few rows of a layer. sample: indices of those that are checked, on the CPU."""
    at = rows.to(of.y.device)
    S = int(rows[-1]) + 1
    weight = of.pattern[:, at, :S].permute(1, 2, 0)  # [R, S, H]
    if of.row_scale is not None:
        weight = weight * of.row_scale[at, None, None]
    ffn = None if of.ffn is None else of.ffn[at]
    inputs = given_rows(weight[..., None] * of.v[:S], of.W_O, of.resid_pre[at], of.y[at], ffn)
    scores = score_given(kernel, inputs, rows, keep)
    bias = of.bias if of.bias.ndim == 1 else of.bias[at[sample.to(at.device)]]
    sums = closure(inputs, scores.linear, bias, sample)
    sums = sums._replace(eps=torch.full_like(sums.eps, torch.finfo(of.dtype).eps))
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
        scores,
        sums,
    )


class _Entries(NamedTuple):
    """What a cache holds of one layer, without its batch dimension."""

    cache: dict[str, Tensor]
    layer: int
    n_tokens: int
    batch_item: int

    def get(self, name: str, ndim: int) -> Tensor | None:
        """The entry, which has `ndim` dimensions besides the batch's; None where there is none."""
        name = f"blocks.{self.layer}.{name}"
        if name not in self.cache:
            return None
        x = _item(self.cache[name].detach(), ndim, self.batch_item, name)
        length = x.shape[-1] if name.endswith("hook_pattern") else x.shape[0]
        if length != self.n_tokens:
            raise ValueError(
                f"cache: {name} is of {length} positions, expected {self.n_tokens} as in tokens"
            )
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def need(self, name: str, ndim: int) -> Tensor:
        """As `get`; raises ValueError where there is none."""
        x = self.get(name, ndim)
        if x is None:
            raise ValueError(
                f"cache: has no blocks.{self.layer}.{name}; expected a run_with_cache of the whole "
                "model, or with names_filter for at least the entries that CachedRun.of asks for"
            )
        return x


def _open_layer(model: nn.Module, entries: _Entries) -> _Layer:
    """Finds the map by which a layer's cache adds up, and that it does."""
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

    # What attention adds, by W_O, bias, row_scale: its output; that behind a norm; that times a
    # number. Factors are fitted only where the cache says that they are of this very output.
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
            return _Layer(pre, y, post, ffn, pattern, v, W_O, by_row, bias, dtype)
    raise UnsupportedArchitectureError(
        f"{name}: its parts do not add up ({min(errors):.1f} times what rounding explains); were "
        "activations changed by a hook, or weights after the run?"
    )


def _fit(x: Tensor, to: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The factor, one for all along `dim`, by which x is nearest to `to`."""
    return (x * to).sum(dim) / x.square().sum(dim).clamp(min=torch.finfo(x.dtype).tiny)


def _is_rms(scale: Tensor, x: Tensor, eps: float) -> bool:
    """Whether scale [T]² is the mean square of the rows of x [T, D] and a number, a norm's own."""
    number = scale.square() - x.square().mean(-1)
    strays = (number - number.median()).abs() / scale.square()
    return bool((strays <= max(_TOLERANCE, 8 * eps)).all())


def _error(got: Tensor, expected: Tensor, eps: float, *beside: Tensor) -> float:
    """The largest error of a row, in units of what rounding explains where `got` [T, D] is a
    difference of others `beside`.
    """
    norm = torch.linalg.vector_norm
    granted = max(8 * eps, _TOLERANCE) * norm(expected, dim=-1)
    granted += 8 * eps * sum(norm(x, dim=-1) for x in beside)
    error = norm(got - expected, dim=-1) / granted.clamp(min=1e-30)
    return float(error.max().nan_to_num(nan=float("inf")))


def _item(x: Tensor, ndim: int, batch_item: int, name: str) -> Tensor:
    """X of `ndim` dimensions, taken out of a batch if it is in one."""
    if x.ndim == ndim:
        return x
    if x.ndim != ndim + 1:
        raise ValueError(f"{name}: expected {ndim} or {ndim + 1} dimensions, got {x.ndim}")
    return x[index_within("batch_item", batch_item, len(x))]


def _token_ids(model: nn.Module, tokens: str | Tensor, batch_item: int) -> Tensor:
    if isinstance(tokens, str):
        tokens = model.to_tokens(tokens)  # type: ignore[operator]
    return _item(torch.as_tensor(tokens), 1, batch_item, "tokens")
