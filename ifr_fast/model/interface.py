"""A model's attention function, overridden through transformers' own extension points.

Attention and masks go through `AttentionInterface` and `AttentionMaskInterface`. Nothing here knows
a model family.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock, RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedArchitectureError
from .attention import AttentionCall, AttentionHandler
from .hooks import marked
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
# None in threads that watch no model: their forward passes keep the model's own attention.
_handler: ContextVar[AttentionHandler | None] = ContextVar("ifr_fast_handler", default=None)
# The model's own attention function, by the id of the config that names ours meanwhile.
_replaced: dict[int, str] = {}


def overridden_attention(call: AttentionCall) -> Tensor:
    """The attention output [B, T, H, V] of the current handler."""
    handler = _handler.get()
    assert handler is not None
    return handler(call)


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
) -> tuple[Tensor, Any]:
    if _handler.get() is None:
        options = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux}
        options = {key: value for key, value in options.items() if value is not None}
        return _attention_of(module)(module, q, k, v, mask, **options, **kwargs)
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


def _attention_of(module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The model's own attention function, for a forward pass in a thread that watches nothing."""
    name = _replaced.get(id(getattr(module, "config", None)), "sdpa")
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return eager or ALL_ATTENTION_FUNCTIONS["sdpa"]


def _mask(
    *,
    mask_function: Callable[..., Tensor],
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Any:
    if _handler.get() is None:
        name = _replaced.get(id(config), "sdpa")
        if name not in ALL_MASK_ATTENTION_FUNCTIONS:  # its attention takes the mask as it came
            return kwargs.get("attention_mask")
        own = ALL_MASK_ATTENTION_FUNCTIONS[name]
        return own(mask_function=mask_function, device=device, config=config, **kwargs)
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
        _note_own(model)
        try:
            _set_attention(model, _NAME)
            yield
        finally:
            _set_attention(model, before)


def _note_own(model: PreTrainedModel) -> None:
    """Notes the attention function of each config of a model before ours replaces it."""
    configs = [model.config]
    if not _single.get(model):
        configs += [x.config for x in model.modules() if isinstance(x, PreTrainedModel)]
        configs += [getattr(model.config, name) for name in model.config.sub_configs]
    for config in configs:
        own = getattr(config, "_attn_implementation", None)
        if own not in (None, _NAME):
            if id(config) not in _replaced:
                weakref.finalize(config, _replaced.pop, id(config), None)
            _replaced[id(config)] = own


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
_held: WeakSet[nn.Module] = WeakSet()  # changed by the thread that holds the model


@contextmanager
def exclusively(model: nn.Module) -> Iterator[None]:
    """Inside the context, this thread alone runs `model`, whose hooks and settings threads share.

    Other threads that watch it wait, and so does a forward pass that a user starts in one. A pass
    that had begun before goes on with the model's own attention, unseen by our hooks. For the rest
    of such a pass, modules are in eval mode, and half-precision layers that are being opened hold
    float32 weights.
    """
    with _locks_lock:
        lock = _locks.setdefault(model, RLock())
    with lock, ExitStack() as stack:
        if model not in _held:
            _held.add(model)
            stack.callback(_held.discard, model)
            for module in {model, getattr(model, "base_model", model)}:
                handle = module.register_forward_pre_hook(_waiting(lock), prepend=True)
                stack.callback(handle.remove)
        yield


def _waiting(lock: RLock) -> Callable[..., None]:
    """A hook that has forward passes of other threads wait for the lock."""
    owner = get_ident()

    def wait(*_: Any) -> None:
        if get_ident() != owner:
            with lock:
                pass

    return marked(wait)


@contextmanager
def overriding(handler: AttentionHandler) -> Iterator[None]:
    """Inside the context, `handler` replaces the handler of `attention_through`."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)
