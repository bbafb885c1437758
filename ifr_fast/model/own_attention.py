"""Models that compute their attention themselves, outside transformers' attention interface.

Their q kᵀ is not computed at first. A stand-in tensor records the product and the changes to it:
scale, mask, position bias, softmax. When the stand-in is multiplied by v, the attention handler is
called, as the interface would call it. Any other operation turns a stand-in into the tensor that it
stands for, so products that are not attention are unchanged. Nothing here depends on a model
family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..errors import UnsupportedArchitectureError
from .attention import AttentionCall, AttentionHandler
from .hooks import in_this_thread, map_tensors, running_hooks
from .interface import exclusively, overridden_attention, overriding
from .masks import HIDDEN, LazyMask
from .stand_ins import _CHANGES, _COMMUTE, _RESHAPES, _Meaning, _Scores

_PRODUCTS = {"matmul", "__matmul__", "bmm"}
_LOW = -9e3  # GPT's bias of a hidden key is -1e4
_METADATA = {"__get__", "size", "dim"}


class _Watch(TorchFunctionMode):
    """A mode in which products of batched matrices are stand-ins until their values are needed."""

    def __init__(self) -> None:
        super().__init__()
        # Modules whose forward is running, innermost last, and the hooks of ours around each.
        self._running: list[tuple[nn.Module, int]] = []

    def enter(self, module: nn.Module, _: Any) -> None:
        """The pre-hook of every module."""
        if not self._running:
            self.__enter__()
        self._running.append((module, running_hooks.get() - 1))  # this is a hook, too

    def leave(self, *_: Any) -> None:
        """The hook of every module, called after errors too."""
        self._running.pop()
        if not self._running:
            self.__exit__(None, None, None)

    def close(self) -> None:
        """Ends the mode if no hook has: torch calls no hooks after a KeyboardInterrupt."""
        if self._running:
            self._running.clear()
            self.__exit__(None, None, None)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if running_hooks.get() != self._running[-1][1]:  # a hook of ours computes something
            return func(*args, **kwargs)
        if not _holds_scores((*args, *kwargs.values())):
            if name in _PRODUCTS:
                return _product(func, *args, **kwargs)
            if name == "baddbmm":
                return _biased_product(func, *args, **kwargs)
            if name == "scaled_dot_product_attention":
                return self._fused(*args, **kwargs)
            return func(*args, **kwargs)
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in _PRODUCTS and isinstance(args[0], _Scores) and args[0].meaning.softmaxed:
            z = self._attended(args[0], args[1])
            if z is not None:
                return z
        if name == "type_as" and isinstance(args[0], _Scores):
            return args[0].to(_bare(args[1]).dtype)
        changed = _changed(name, func, args, kwargs)
        if changed is not None:
            return changed
        return func(*map_tensors(args, _computed), **map_tensors(kwargs, _computed))

    def _attended(self, weights: _Scores, v: Tensor) -> Tensor | None:
        """weights @ v [..., T, V] by the handler; None if the product is not attention."""
        meaning, (module, _) = weights.meaning, self._running[-1]
        with torch._C.DisableTorchFunctionSubclass():
            shape = weights.shape
        if v.ndim < 3 or v.shape[-2] != shape[-1]:
            return None
        q, k, values = (_by_head(x) for x in (meaning.q, meaning.k, v))
        kv_heads = max(k.shape[1], values.shape[1])
        wide = torch.promote_types(q.dtype, v.dtype)
        z = overridden_attention(
            AttentionCall(
                module,
                q.to(wide),
                k.to(wide).expand(-1, kv_heads, -1, -1),
                values.to(wide).expand(-1, kv_heads, -1, -1),
                _mask(meaning, shape, module),
                meaning.scale,
                None,
                None,
                _slopes(meaning, shape[-1], module),
            )
        )
        return z.transpose(1, 2).reshape(*shape[:-1], v.shape[-1]).to(v.dtype)

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`scaled_dot_product_attention`, expressed by the products that it fuses."""
        T, S = query.shape[-2], key.shape[-2]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        meaning = _Meaning(query, key, scale, softmaxed=True)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            meaning = meaning._replace(visible=(attn_mask,))
        elif attn_mask is not None:
            meaning = meaning._replace(biases=((1.0, attn_mask),))
        if is_causal:
            causal = torch.ones(T, S, dtype=torch.bool, device=query.device).tril()
            meaning = meaning._replace(visible=(*meaning.visible, causal))
        weights = _Scores.of(query.new_empty(*query.shape[:-1], S, device="meta"), meaning, _never)
        z = self._attended(weights, value)
        assert z is not None
        return z


def _never() -> Tensor:
    raise AssertionError("the weights of a fused attention were read")


def _holds_scores(args: Iterable[Any]) -> bool:
    return any(
        isinstance(x, _Scores) or (isinstance(x, tuple | list) and _holds_scores(x)) for x in args
    )


def _computed(x: Tensor) -> Tensor:
    return x.compute() if isinstance(x, _Scores) else x


def _bare(x: Any) -> Any:
    """A tensor's shape and dtype, on the meta device."""
    if not isinstance(x, Tensor):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _of_tokens(a: Tensor, b: Tensor) -> bool:
    """True if a and b may be q and kᵀ of the same tokens."""
    return (
        a.ndim == b.ndim >= 3
        and a.is_floating_point()
        and a.shape[-1] == b.shape[-2]
        and a.shape[-2] == b.shape[-1]
    )


def _product(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The product of two tensors; a stand-in if they may be q and kᵀ."""
    if len(args) != 2 or kwargs or not _of_tokens(*args):
        return func(*args, **kwargs)
    q, k = args[0], args[1].transpose(-1, -2)
    return _Scores.of(func(*map(_bare, args)), _Meaning(q, k), lambda: func(*args))


def _biased_product(
    func: Callable[..., Tensor],
    bias: Tensor,
    batch1: Tensor,
    batch2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    """beta * bias + alpha * batch1 @ batch2; a stand-in if the matrices may be q and kᵀ."""

    def compute() -> Tensor:
        return func(bias, batch1, batch2, beta=beta, alpha=alpha)

    if not _of_tokens(batch1, batch2):
        return compute()
    meaning = _Meaning(batch1, batch2.transpose(-1, -2), alpha, ((beta, bias),))
    return _Scores.of(torch.bmm(_bare(batch1), _bare(batch2)), meaning, compute)


def _changed(
    name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Scores | None:
    """The stand-in for `func` applied to a stand-in; None if the result has no meaning here."""
    if name not in _CHANGES:
        return None
    if name in _COMMUTE and not isinstance(args[0], _Scores):
        args = args[::-1]
    changed = args[1] if name == "where" else args[0]
    stand_ins = [x for x in (*args, *kwargs.values()) if isinstance(x, _Scores)]
    if len(stand_ins) != 1 or stand_ins[0] is not changed:
        return None
    dtype = kwargs.get("dtype")
    relevant = {key: x for key, x in kwargs.items() if key not in ("dtype", "_stacklevel")}
    with torch._C.DisableTorchFunctionSubclass():
        meaning = _CHANGES[name](*args, **relevant)
    if meaning is None:
        return None
    pending = [x.compute if isinstance(x, _Scores) else x for x in args]

    def compute() -> Tensor:
        values = [p() if isinstance(x, _Scores) else x for x, p in zip(args, pending, strict=True)]
        return func(*values, **kwargs)

    like = _bare(changed)
    if name in _RESHAPES:
        like = func(*map(_bare, args), **kwargs)
    elif dtype is not None:
        like = like.to(dtype)
    else:
        for x in args:
            if isinstance(x, Tensor) and x.ndim > 0 and x.is_floating_point():
                like = like.to(torch.promote_types(like.dtype, x.dtype))
    if name.endswith("_") and not name.endswith("__"):  # an in-place operation, seen by all users
        changed.meaning, changed.compute = meaning, compute
        return changed
    return _Scores.of(like, meaning, compute)


def _by_head(x: Tensor) -> Tensor:
    """[..., T, K] as [1, H, T, K]; heads may be merged with a batch of one."""
    return x.reshape(1, -1, *x.shape[-2:])


def _mask(meaning: _Meaning, shape: torch.Size, module: nn.Module) -> LazyMask:
    """The mask of the keys that are not hidden from scores of `shape` [..., T, S].

    Raises UnsupportedArchitectureError where a score is 0, whatever q and k are.
    """
    seen = torch.ones(shape[-2:], dtype=torch.bool, device=meaning.q.device)
    biases = (factor * bias > HIDDEN for factor, bias in meaning.biases)
    try:
        for visible in (*meaning.visible, *(~x for x in meaning.hidden), *biases):
            # A module may keep one mask for texts of any length, and a layer run on some rows alone
            # has masks for others: the values of such a mask are not read.
            seen = seen & visible
        for zero in meaning.zeroed:
            # Such a score is the bias alone, beside which other scores are small.
            seen = seen & ~(zero & (sum(c * bias for c, bias in meaning.biases) < _LOW))
            if bool((seen & zero).any()):
                raise UnsupportedArchitectureError(
                    f"model: {type(module).__name__} multiplies some of its scores by 0 and does "
                    "not hide them"
                )
    except RuntimeError:
        seen = torch.zeros_like(seen)
    return LazyMask.of_tensor(seen)


def _slopes(meaning: _Meaning, n_keys: int, module: nn.Module) -> Tensor | None:
    """ALiBi slopes [H] of the biases that differ between heads; None without such a bias.

    Raises UnsupportedArchitectureError where a bias is not linear in the distance.
    """
    total: Tensor | None = None
    for factor, bias in meaning.biases:
        # In a replay of rows, a bias for other keys is skipped: the recorded slopes are used.
        if bias.ndim < 3 or bias.shape[-3] == 1 or bias.shape[-1] != n_keys:
            continue
        last = factor * bias.flatten(0, -3)[:, -1].float()  # [H, S] of the last row
        slopes = (last[:, -1] - last[:, 0]) / max(n_keys - 1, 1)
        distance = torch.arange(1 - n_keys, 1, device=bias.device)
        error = (last - last[:, -1:] - slopes[:, None] * distance).abs()
        rounding = 4 * torch.finfo(bias.dtype).eps * last.abs().amax(-1, keepdim=True)
        if bool((error > rounding).any()):
            raise UnsupportedArchitectureError(
                f"model: {type(module).__name__} adds a position bias to its scores that is not "
                "linear in the distance"
            )
        total = slopes if total is None else total + slopes
    return total


@contextmanager
def attention_through(model: PreTrainedModel, handler: AttentionHandler) -> Iterator[None]:
    """`interface.attention_through` for a model that does not use the interface."""
    watch = _Watch()
    with exclusively(model), overriding(handler), ExitStack() as stack:
        stack.callback(watch.close)
        for module in model.modules():
            handle = module.register_forward_pre_hook(in_this_thread(watch.enter), prepend=True)
            stack.callback(handle.remove)
            handle = module.register_forward_hook(in_this_thread(watch.leave), always_call=True)
            stack.callback(handle.remove)
        yield
