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

from ..errors import IfrError, UnsupportedArchitectureError
from .attention import AttentionCall, AttentionHandler
from .given_masks import chosen, reads_tensor, with_own_mask
from .hooks import marked
from .masks import LazyMask
from .recurrences import recurrences_through

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


def is_watched() -> bool:
    """True in a thread, and a context, that has a handler."""
    return _handler.get() is not None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    if _handler.get() is None:
        options = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux}
        options = {name: value for name, value in options.items() if value is not None}
        own = _attention_of(module)
        return own(module, query, key, value, attention_mask, **options, **kwargs)
    name, mask = type(module).__name__, attention_mask
    indices = kwargs.pop("indices", None)
    unknown = {key for key, value in kwargs.items() if value is not None} - _HARMLESS
    if unknown:
        raise UnsupportedArchitectureError(
            f"model: {name} passes {', '.join(sorted(unknown))} to its attention function, "
            "whose effect on the weights is not known"
        )
    if mask is None:
        raise UnsupportedArchitectureError(
            f"model: {name} got None as its mask instead of one from the mask interface"
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    elif isinstance(scaling, Tensor) and scaling.numel() > 1:
        if scaling.shape[-1] != 1:
            raise UnsupportedArchitectureError(
                f"model: {name} scales its scores by a tensor that differs between keys"
            )
        query, scaling = query * scaling.to(query.dtype), 1.0
    if indices is not None:
        mask = chosen(mask, indices)
    return overridden_attention(
        with_own_mask(module, query, key, value, mask, float(scaling), softcap, s_aux)
    ), None


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
    q_length: int,
    kv_length: int,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Any:
    if _handler.get() is None:
        name = _replaced.get(id(config), "sdpa")
        if name not in ALL_MASK_ATTENTION_FUNCTIONS:  # its attention takes the mask as it came
            return kwargs.get("attention_mask")
        own = ALL_MASK_ATTENTION_FUNCTIONS[name]
        kwargs |= {"q_length": q_length, "kv_length": kv_length, "device": device}
        return own(mask_function=mask_function, config=config, **kwargs)
    name = _replaced.get(id(config), "sdpa")
    return LazyMask(
        mask_function,
        torch.device(device),
        kv_length if reads_tensor(mask_function) else None,
        (q_length, kv_length),
        kwargs.get("dtype", torch.bool) if name == "eager" else torch.bool,
    )


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


def uses_interface(model: PreTrainedModel) -> bool:
    """True if transformers can set the model's attention function; it inspects the source."""
    check = getattr(model, "_can_set_attn_implementation", None)
    return check is None or bool(check())


@contextmanager
def attention_through(model: PreTrainedModel, handler: AttentionHandler) -> Iterator[None]:
    """Inside the context, `handler` computes the output of every attention module of `model`."""
    watched = recurrences_through(model, overridden_attention, is_watched)
    with exclusively(model), overriding(handler), watched:
        own = _own_attention(model)
        try:
            _set_attention(model, _NAME)
            yield
        finally:
            for config, name in own:  # a config passes it on to those within, which follow
                config._attn_implementation = name


def _own_attention(model: PreTrainedModel) -> list[tuple[Any, str]]:
    """Each config of a model, outer ones first, and its attention function; noted where it is not
    ours, which replaces it.
    """
    configs = [model.config]
    if not _single.get(model):
        configs += [getattr(model.config, name) for name in model.config.sub_configs]
        configs += [x.config for x in model.modules() if isinstance(x, PreTrainedModel)]
    found = []
    for config in configs:
        own = getattr(config, "_attn_implementation", None)
        found.append((config, own))
        if own not in (None, _NAME):
            if id(config) not in _replaced:
                weakref.finalize(config, _replaced.pop, id(config), None)
            _replaced[id(config)] = own
    return [(config, own) for config, own in found if own is not None]


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
    float32 weights. What torch.compile compiled runs as it was written, since hooks and attention
    are no part of compiled code. Raises IfrError where autocast is active.
    """
    check_autocast(model)
    with _locks_lock:
        lock = _locks.setdefault(model, RLock())
    with lock, ExitStack() as stack:
        if model not in _held:
            _held.add(model)
            stack.callback(_held.discard, model)
            stack.enter_context(_uncompiled())
            for module in {model, getattr(model, "base_model", model)}:
                handle = module.register_forward_pre_hook(_waiting(lock), prepend=True)
                stack.callback(handle.remove)
        yield


def check_autocast(model: nn.Module) -> None:
    """Raises IfrError where autocast rounds what `model` and the kernels compute."""
    device = next((x.device.type for x in model.parameters()), "cpu")
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        raise IfrError(
            f"model: torch.autocast is active and rounds products to {dtype}, those of the kernels "
            "too; leave it, or load the model in that torch_dtype"
        )


_forced = 0  # threads that keep compiled code from running
_stance: list[AbstractContextManager[None]] = []


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Within, compiled modules run as they were written. The setting is all threads' together."""
    global _forced
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and the import is slow
        yield
        return
    with _locks_lock:
        if _forced == 0:
            _stance.append(torch.compiler.set_stance("force_eager"))
        _forced += 1
    try:
        yield
    finally:
        with _locks_lock:
            _forced -= 1
            if _forced == 0:
                _stance.pop().__exit__(None, None, None)


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
