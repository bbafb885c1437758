"""Importances of a text by their definition, in float64, from a model's own eager run.

Nothing here goes through ifr_fast, and nothing is known of a family. A softmax attention is a
product of a lower triangular matrix of weights and values; each part is a derivative of the layer's
own code from that product to where it meets the residual stream, with the statistics of norms held.
The residual connection is what leads through the layer without a product with a matrix. A part that
it passes on is the derivative along that part, with such products left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from oracle import LayerImportance, proximity, shared
from recurrences import by_weights
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

_PRODUCTS = {"matmul", "__matmul__", "bmm"}
_WITH_WEIGHTS = _PRODUCTS | {"linear", "mm", "addmm", "baddbmm", "einsum", "conv1d"}
# Statistics of norms come of these and are held: they have no derivative.
_STATISTICS = {"rsqrt", "rsqrt_", "sqrt", "norm", "vector_norm", "var", "std"}


class NoAccountError(Exception):
    """The model's own run is not one that the definition can be applied to."""


class _Attention(NamedTuple):
    module: nn.Module  # the innermost one that computes it
    pattern: Tensor  # [H, T, T]
    v: Tensor  # [T, H, V]


class _Found(Exception):  # noqa: N818 - control flow
    pass


class _Watch(TorchFunctionMode):
    """Sees every product of attention weights and values; `answer` may give another result.

    Code that asks for float32 gets float64.
    """

    def __init__(self, n_tokens: int, running: list[nn.Module]) -> None:
        super().__init__()
        self._n_tokens, self._running = n_tokens, running
        self.seen: list[_Attention] = []
        self.answer: Callable[[Tensor], Tensor] | None = None
        self.answered = False
        self.is_run = True  # the whole model's run, and not one layer's
        self.only_residual = False  # whether products with weights have no derivative

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__
        if name == "float":
            return args[0].double()
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()}
        if self.only_residual and name in _WITH_WEIGHTS:
            args = tuple(_held(x) if isinstance(x, Tensor) else x for x in args)
        if name in _PRODUCTS and self._attends(*args[:2]):
            return self._attended(*args[:2], func(*args, **kwargs))
        if self.answer is not None:
            if name == "layer_norm":
                return self._layer_norm(*args, **kwargs)
            if name == "rms_norm":
                return self._rms_norm(*args, **kwargs)
            if name in _STATISTICS or (name in ("pow", "__pow__") and _below_one(args[1])):
                return _held(func(*args, **kwargs))
        return func(*args, **kwargs)

    def attend(self, weights: Callable[[], Tensor], v: Tensor, out: Tensor) -> Tensor:
        """A recurrence of the values [..., T, V] with the output `out`, and with these weights
        [..., T, T], which may be negative.
        """
        if self.is_run:
            pattern = weights()
            with torch._C.DisableTorchFunction():
                assert torch.allclose(out, pattern @ v, rtol=0, atol=1e-6 * float(out.abs().max()))
            return self._attended(pattern, v, out)
        if self.answer is None:
            return out
        self.answered = True
        return self.answer(out)

    def _attended(self, pattern: Tensor, v: Tensor, out: Tensor) -> Tensor:
        if self.answer is not None:
            self.answered = True
            return self.answer(out)
        T = self._n_tokens
        v = v.expand(*pattern.shape[:-2], *v.shape[-2:]).reshape(-1, T, v.shape[-1])
        of = _Attention(self._running[-1], pattern.reshape(-1, T, T), v.transpose(0, 1))
        self.seen.append(of)
        return out

    def _attends(self, pattern: Tensor, v: Tensor) -> bool:
        T = self._n_tokens
        if v.ndim != pattern.ndim or pattern.shape[-2:] != (T, T) or v.shape[-2] != T:
            return False
        weights = _held(pattern)
        above = weights.masked_select(torch.ones(T, T, dtype=torch.bool).triu(1))
        rows_are_weights = (weights >= 0).all() and (weights.sum(-1) < 1 + 1e-9).all()
        return bool((above == 0).all() and rows_are_weights)

    def _layer_norm(
        self, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Tensor:
        x = self._rms_norm(x - x.mean(-1, keepdim=True), shape, weight, eps)
        return x if bias is None else x + bias

    def _rms_norm(self, x: Tensor, _: Any, weight: Any = None, eps: float | None = None) -> Tensor:
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        x = x * _held(torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))
        return x if weight is None else x * weight


def _below_one(power: Any) -> bool:
    return not isinstance(power, Tensor) and power < 1


def _held(x: Tensor) -> Tensor:
    """x without its derivative."""
    return forward_ad.unpack_dual(x).primal


class _Layer:
    """One layer of the run: its call, its input and its output."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.calls = 0
        self.resid_pre = self.resid_post = torch.empty(0)

    def before(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.args, self.kwargs, self.calls = args, kwargs, self.calls + 1
        self.resid_pre = _stream(args, kwargs).clone()

    def after(self, _: nn.Module, __: Any, out: Any) -> None:
        self.resid_post = (out if isinstance(out, Tensor) else out[0]).clone()

    def run(self, stream: Tensor) -> Tensor:
        if self.args:
            out = self.module(stream, *self.args[1:], **self.kwargs)
        else:
            out = self.module(**{**self.kwargs, "hidden_states": stream})
        return out if isinstance(out, Tensor) else out[0]


def _stream(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def importances_by_definition(model: PreTrainedModel, token_ids: Tensor) -> list[LayerImportance]:
    """Dense importances of every layer, bottom first. Raises NoAccountError where the run is not
    one softmax attention a layer whose parts add up.
    """
    model = copy.deepcopy(model).double().eval()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # The setter would refuse this for attention outside the interface.
            module.config._attn_implementation = "eager"
            module.config._experts_implementation = "eager"  # grouped products lack float64
    running: list[nn.Module] = []
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(lambda m, _: running.append(m)))
        handles.append(module.register_forward_hook(lambda *_: leave(running), always_call=True))
    watch = _Watch(len(token_ids), running)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), by_weights(model, watch.attend):
            layers = _run(model, token_ids, watch)
            watch.is_run = False
            found = []
            for layer in layers:
                inside = set(layer.module.modules())
                own = [of for of in watch.seen if of.module in inside]
                if len(own) > 1:
                    raise NoAccountError(f"{len(own)} attentions in a layer")
                found.append(_importances(layer, own[0], watch) if own else _unmixed(layer, watch))
            return found
    finally:
        torch.set_default_dtype(torch.float32)
        for handle in handles:
            handle.remove()


def leave(running: list[nn.Module]) -> None:
    running.pop()


def _run(model: PreTrainedModel, token_ids: Tensor, watch: _Watch) -> list[_Layer]:
    """Runs the model; its layers, which are the modules that stand in a list and attend."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    candidates = {m: _Layer(m) for of in lists for m in of}
    with contextmanager(_hooked)(candidates.values()), watch:
        model(
            input_ids=token_ids[None],
            attention_mask=torch.ones_like(token_ids)[None],
            use_cache=False,
        )
    if not watch.seen:
        raise NoAccountError("no attention")
    for of in lists:
        inside = [set(m.modules()) for m in of]
        if all(any(a.module in modules for modules in inside) for a in watch.seen):
            if any(candidates[m].calls != 1 for m in of):
                raise NoAccountError("a layer is not called once")
            return [candidates[m] for m in of]
    raise NoAccountError("attention stands in no list of layers")


def _hooked(layers: Any) -> Iterator[None]:
    handles = []
    for layer in layers:
        handles.append(layer.module.register_forward_pre_hook(layer.before, with_kwargs=True))
        handles.append(layer.module.register_forward_hook(layer.after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _importances(layer: _Layer, of: _Attention, watch: _Watch) -> LayerImportance:
    (H, T, _), V = of.pattern.shape, of.v.shape[-1]
    pre, post = layer.resid_pre[0], layer.resid_post[0]
    site = _mid_site(layer, watch)
    way = None if site is None else _way(layer, watch, site)
    mid = post
    W = torch.empty(H, V, *pre.shape, dtype=torch.float64)  # what a head's output adds, by row
    behind = torch.empty_like(W)  # the same in resid_mid
    for h in range(H):
        for i in range(V):
            unit = torch.zeros(H, T, V, dtype=torch.float64)
            unit[h, :, i] = 1
            states, W[h, i] = _moved(layer, site, watch, unit)
            mid = mid if site is None else states
            if way is not None:
                behind[h, i] = W[h, i] if way.norm is None else way.norm(W[h, i])
    attended = torch.einsum("htj,jhv,hvtd->td", of.pattern, of.v, W)
    ffn = _without(layer, of.module) - pre if site is None else post - mid
    passed_on = pre if way is None else way.into_sum
    bias = mid - passed_on - attended - (ffn if site is None else 0)
    if float((bias - bias[0]).norm()) > 1e-7 * float(mid.norm()):
        raise NoAccountError("the parts do not add up")
    if way is None:
        parts = torch.einsum("htj,jhv,hvtd->htjd", of.pattern, of.v, W)
        return shared(pre, None, post, ffn, proximity(parts, mid[:, None]))
    parts = torch.einsum("htj,jhv,hvtd->htjd", of.pattern, of.v, behind)
    heads = proximity(parts, way.mid[:, None])
    return shared(way.into_mid, way.mid, post, way.ffn, heads, way.passed)


def _unmixed(layer: _Layer, watch: _Watch) -> LayerImportance:
    """Of a layer without attention: an FFN beside the stream, row by row."""
    pre, post = layer.resid_pre[0], layer.resid_post[0]
    half = len(pre) // 2
    layer.kwargs = {**layer.kwargs, "position_embeddings": None, "attention_mask": None}
    with watch:
        alone = layer.run(layer.resid_pre[:, half:])[0]
    if not torch.allclose(alone, post[half:], 1e-9, 1e-9):
        raise NoAccountError("a layer without attention mixes positions")
    nothing = torch.zeros(1, len(pre), len(pre), dtype=pre.dtype)
    return shared(pre, pre, post, post - pre, nothing)


class _Way(NamedTuple):
    """The residual connection of a sequential block, and what it passes on; [T, D] each."""

    norm: Callable[[Tensor], Tensor] | None  # makes resid_mid of what `site` reads; held
    into_sum: Tensor  # the part of resid_pre in what `site` reads
    into_mid: Tensor  # the same in resid_mid
    mid: Tensor
    passed: Tensor  # the part of resid_mid in resid_post
    ffn: Tensor


def _way(layer: _Layer, watch: _Watch, site: nn.Module) -> _Way:
    """The way of the residual connection. The stream is passed on behind `site` if nothing of it
    arrives where what `site` returns has no derivative.
    """
    x, post = layer.resid_pre, layer.resid_post[0]
    seen, _ = _along(layer, watch, x)
    summed, into_sum = seen[site]
    _, without = _along(layer, watch, x, {site: torch.zeros_like})
    if bool(without.any()):
        d = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        moved, out = _along(layer, watch, d)
        into, factor = moved[site][1] / d[0], out / moved[site][1]
        if _same_rows(factor):
            passed = factor[0] * summed
        elif _same_rows(into):
            seen, passed = _along(layer, watch, (summed / into)[None])
        else:
            raise NoAccountError("the residual connection is no multiple of the stream")
        ffn = _rest(seen, watch, passed, post)
        return _Way(None, into_sum, into_sum, summed, passed, ffn)

    def norm(part: Tensor) -> Tensor:
        return _through(site, watch, summed, part)

    mid = site(summed[None])[0]
    seen, passed = _along(layer, watch, torch.zeros_like(x), {site: lambda out: out})
    ffn = _rest(seen, watch, passed, post)
    return _Way(norm, into_sum, norm(into_sum), mid, passed, ffn)


def _same_rows(x: Tensor) -> bool:
    return float((x - x[0]).abs().max()) <= 1e-7 * float(x.abs().max())


def _rest(
    seen: dict[nn.Module, tuple[Tensor, Tensor]], watch: _Watch, passed: Tensor, post: Tensor
) -> Tensor:
    """The FFN's part [T, D]: what is not `passed` on; without the bias of a norm that makes the
    layer's output. seen: what modules read, with its derivative along the stream.
    """
    for module, (read, moved) in seen.items():
        elementwise = all(x.ndim == 1 for x in module.parameters()) and not [*module.children()]
        if elementwise and bool(moved.any()) and torch.allclose(module(read), post, 1e-12, 0):
            return _through(module, watch, read, read) - passed
    return post - passed


def _through(module: nn.Module, watch: _Watch, x: Tensor, part: Tensor) -> Tensor:
    """What a norm makes of a part [T, D] of its input x [T, D]."""
    watch.answer = _same
    try:
        with forward_ad.dual_level(), watch:
            made = module(forward_ad.make_dual(x[None], part[None]))
            return forward_ad.unpack_dual(made).tangent[0]
    finally:
        watch.answer = None


def _along(
    layer: _Layer,
    watch: _Watch,
    tangent: Tensor,
    given: dict[nn.Module, Callable[[Tensor], Tensor]] | None = None,
) -> tuple[dict[nn.Module, tuple[Tensor, Tensor]], Tensor]:
    """The derivative along a change of the stream [1, T, D] of what modules read behind attention,
    with what they read, and of the layer's output; by the residual connection alone, [T, D] each.

    given: the derivatives of what modules return, made of it.
    """
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    shape = layer.resid_pre.shape[1:]

    def parted(x: Tensor) -> tuple[Tensor, Tensor]:
        primal, moved = forward_ad.unpack_dual(x.reshape(shape))
        return primal, torch.zeros_like(primal) if moved is None else moved.clone()

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = _stream(args, kwargs)
        if watch.answered and isinstance(x, Tensor) and x.numel() == shape.numel():
            found[module] = parted(x)

    def change(module: nn.Module, _: Any, out: Tensor) -> Tensor:
        primal = _held(out)
        return forward_ad.make_dual(primal, (given or {})[module](primal))

    inside = [m for m in layer.module.modules() if m is not layer.module]
    handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in inside]
    handles += [m.register_forward_hook(change) for m in given or {}]
    watch.only_residual = True
    try:
        with forward_ad.dual_level():
            stream = forward_ad.make_dual(layer.resid_pre, tangent)
            out = _answered(layer, watch, _held, stream)
            return found, parted(out)[1]
    finally:
        watch.only_residual = False
        for handle in handles:
            handle.remove()


def _mid_site(layer: _Layer, watch: _Watch) -> nn.Module | None:
    """The first module that reads what the residual connection passes on with attention's output
    added; None if none does.
    """
    moved, _ = _along(layer, watch, layer.resid_pre)
    none, plain = (
        _read(layer, watch, answer, layer.resid_pre) for answer in (torch.zeros_like, _same)
    )
    for (module, at_none), (_, at) in zip(none, plain, strict=True):
        if bool(moved[module][1].any()) and not torch.equal(at, at_none):
            return module
    return None


def _read(
    layer: _Layer, watch: _Watch, answer: Callable[[Tensor], Tensor], stream: Tensor
) -> list[tuple[nn.Module, Tensor]]:
    """What the layer's modules read behind attention that is as wide as the stream."""
    found: list[tuple[nn.Module, Tensor]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = _stream(args, kwargs)
        if watch.answered and isinstance(x, Tensor) and x.numel() == stream.numel():
            found.append((module, x.reshape(stream.shape).clone()))

    inside = [m for m in layer.module.modules() if m is not layer.module]
    handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in inside]
    try:
        _answered(layer, watch, answer, stream)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _same(out: Tensor) -> Tensor:
    return out


def _answered(
    layer: _Layer, watch: _Watch, answer: Callable[[Tensor], Tensor], stream: Tensor
) -> Tensor:
    watch.answer, watch.answered = answer, False
    try:
        with watch:
            return layer.run(stream)
    finally:
        watch.answer = None


def _moved(
    layer: _Layer, site: nn.Module | None, watch: _Watch, tangent: Tensor
) -> tuple[Tensor, Tensor]:
    """What `site` reads, or the layer's output if None, and its derivative along a change of the
    attention's output [H, T, V]; both [T, D].
    """
    found: list[Tensor] = []

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        if watch.answered:
            found.append(_stream(args, kwargs))
            raise _Found

    def along(out: Tensor) -> Tensor:
        return forward_ad.make_dual(out, tangent.view(out.shape))

    handle = None if site is None else site.register_forward_pre_hook(stop, with_kwargs=True)
    with forward_ad.dual_level():
        try:
            found.append(_answered(layer, watch, along, layer.resid_pre))
        except _Found:
            pass
        finally:
            if handle is not None:
                handle.remove()
        states, moved = forward_ad.unpack_dual(found[0].reshape(layer.resid_pre.shape)[0])
        return states, torch.zeros_like(states) if moved is None else moved


def _without(layer: _Layer, attention: nn.Module) -> Tensor:
    """The layer's output [T, D] without what its attention module returns."""

    def drop(_: nn.Module, __: Any, out: Any) -> Any:
        if isinstance(out, Tensor):
            return torch.zeros_like(out)
        return (torch.zeros_like(out[0]), *out[1:])

    handle = attention.register_forward_hook(drop)
    try:
        return layer.run(layer.resid_pre)[0]
    finally:
        handle.remove()
