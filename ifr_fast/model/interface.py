"""A model's attention function, overridden through transformers' own extension points.

Attention and masks go through `AttentionInterface` and `AttentionMaskInterface`. Nothing here knows
a model family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..errors import UnsupportedArchitectureError
from .attention import AttentionCall, AttentionHandler
from .masks import LazyMask

_NAME = "ifr_fast"
# Arguments of an attention function that do not change its output in eval mode.
_HARMLESS = {
    "dropout",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "sliding_window",
    "use_cache",
}
AttentionThrough = Callable[[PreTrainedModel, AttentionHandler], AbstractContextManager[None]]
_handler: ContextVar[AttentionHandler] = ContextVar("ifr_fast_attention_handler")


def overridden_attention(call: AttentionCall) -> Tensor:
    """The attention output [B, T, H, V] of the current handler."""
    return _handler.get()(call)


def _attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LazyMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    name = type(module).__name__
    unknown = {key for key, value in kwargs.items() if value is not None} - _HARMLESS
    if unknown:
        raise UnsupportedArchitectureError(
            f"model: {name} passes {', '.join(sorted(unknown))} to its attention function, "
            "whose effect on the weights is not known"
        )
    if not isinstance(mask, LazyMask):
        raise UnsupportedArchitectureError(
            f"model: {name} got {type(mask).__name__} as its mask instead of one from the mask "
            "interface"
        )
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return overridden_attention(AttentionCall(module, q, k, v, mask, scale, softcap, s_aux)), None


def _mask(
    *,
    mask_function: Callable[..., Tensor],
    device: torch.device | str = "cpu",
    **_: Any,
) -> LazyMask:
    return LazyMask(mask_function, torch.device(device))


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


def uses_interface(model: PreTrainedModel) -> bool:
    """True if transformers can set the model's attention function; it inspects the source."""
    check = getattr(model, "_can_set_attn_implementation", None)
    return check is None or bool(check())


@contextmanager
def attention_through(model: PreTrainedModel, handler: AttentionHandler) -> Iterator[None]:
    """Inside the context, `handler` computes the output of every attention module of `model`."""
    with exclusively(model), overriding(handler):
        before = model.config._attn_implementation
        try:
            _set_attention(model, _NAME)
            yield
        finally:
            _set_attention(model, before)


_single: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Sets the attention function, if possible directly in the one config that all modules share.

    `set_attn_implementation` visits all modules, which takes as long as a layer's decode step.
    """
    if _single.get(model):
        model.config._attn_implementation = name
        return
    model.set_attn_implementation(name)
    configs = {id(x.config) for x in model.modules() if isinstance(x, PreTrainedModel)}
    _single[model] = configs == {id(model.config)} and not model.config.sub_configs


_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_locks_lock = Lock()


@contextmanager
def exclusively(model: nn.Module) -> Iterator[None]:
    """Inside the context, no other thread watches or replays `model`, as threads share its hooks
    and settings.
    """
    with _locks_lock:
        lock = _locks.setdefault(model, RLock())
    with lock:
        yield


@contextmanager
def overriding(handler: AttentionHandler) -> Iterator[None]:
    """Inside the context, `handler` replaces the handler of `attention_through`."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)
