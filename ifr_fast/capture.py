"""Watches and replays a model through transformers' extension points and module hooks.

Attention and masks go through `AttentionInterface` and `AttentionMaskInterface`; hooks see the
inputs and outputs of modules. Nothing here depends on a model family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock, RLock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .errors import UnsupportedArchitectureError

_NAME = "ifr_fast"
_BLOCK_ELEMENTS = 1 << 21  # limit on [H, R, S] when attention is computed in row blocks

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


class LazyMask:
    """The model's own mask as a function of rows and keys; no [T, T] tensor exists.

    The mask interface passes it to the attention function in place of a tensor. n_rows: the number
    of rows and keys that the function covers, if it reads a tensor; else None.
    """

    def __init__(
        self,
        mask_function: Callable[..., Tensor],
        device: torch.device,
        n_rows: int | None = None,
    ) -> None:
        self._function = mask_function
        self._device = device
        self.n_rows = n_rows

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Bool [R, S]: true where a row may read a key; rows [R], keys [S]: absolute positions."""
        return self._at(rows[:, None], keys).expand(len(rows), len(keys))

    def _at(self, rows: Tensor, keys: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.long, device=self._device)
        return self._function(zero, zero, rows.to(self._device), keys.to(self._device))

    def window(self, n_keys: int) -> int | None:
        """The number of keys that a row sees, itself included, if less than `n_keys`; else None.

        The row at `n_keys - 1` decides; it need not exist unless the mask has an end.
        """
        n_keys = n_keys if self.n_rows is None else min(n_keys, self.n_rows)
        seen = self.visible(torch.tensor([n_keys - 1]), torch.arange(n_keys))
        width = int(seen.sum())
        return None if width >= n_keys else width

    def is_causal(self, n_keys: int, window: int | None) -> Tensor:
        """0-d bool: true if each row t sees exactly itself and the past, at most `window` keys.

        Only the edges of each row's visible keys are checked; the device is not synchronized.
        """
        rows = torch.arange(n_keys, device=self._device)
        first = torch.zeros_like(rows) if window is None else (rows - window + 1).clamp(min=0)
        fine = self._at(rows, rows) & ~self._at(rows, rows + 1) & self._at(rows, first)
        if window is not None:
            fine &= ~(self._at(rows, (first - 1).clamp(min=0)) & (first > 0))
        return fine.all()


def causal_mask(window: int | None, device: torch.device) -> LazyMask:
    """The mask that shows a row all past keys and its own, or the last `window` of them."""

    def function(_: Any, __: Any, rows: Tensor, keys: Tensor) -> Tensor:
        past = keys <= rows
        return past if window is None else past & (keys > rows - window)

    return LazyMask(function, device)


class AttentionCall(NamedTuple):
    """The arguments with which an attention module calls its attention function."""

    module: nn.Module
    q: Tensor  # [B, H, T, K]
    k: Tensor  # [B, H_kv, S, K]
    v: Tensor  # [B, H_kv, S, V]
    mask: LazyMask
    scale: float
    softcap: float | None
    sinks: Tensor | None  # [H]
    alibi_slopes: Tensor | None = None  # [H]; slope * (j - t) is added to scores


AttentionHandler = Callable[[AttentionCall], Tensor]  # -> [B, T, H, V]

AttentionThrough = Callable[[PreTrainedModel, AttentionHandler], AbstractContextManager[None]]

_handler: ContextVar[AttentionHandler] = ContextVar("ifr_fast_attention_handler")


def asked(call: AttentionCall) -> Tensor:
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
    return asked(AttentionCall(module, q, k, v, mask, scale, softcap, s_aux)), None


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
    with exclusively(model), answering(handler):
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
def answering(handler: AttentionHandler) -> Iterator[None]:
    """Inside the context, `handler` replaces the handler of `attention_through`."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)


def attend(call: AttentionCall, window: int | None) -> Tensor:
    """The attention output [B, T, H, V], by torch's fused kernel wherever it applies."""
    if call.softcap is None and call.sinks is None and call.alibi_slopes is None:
        kv_heads, heads = call.k.shape[1], call.q.shape[1]
        if window is None:
            z = nn.functional.scaled_dot_product_attention(
                call.q,
                call.k,
                call.v,
                is_causal=True,
                scale=call.scale,
                enable_gqa=heads != kv_heads,
            )
            return z.transpose(1, 2)
    return attend_rows(call, call.q, torch.arange(call.q.shape[2]), window)


def may_sum(d_key: int, d_value: int) -> bool:
    """True if `attend_and_sum` may return sums at these widths. On GPUs
    scaled_dot_product_attention pads other widths before it calls the kernel.
    """
    return d_key == d_value and d_key % 8 == 0


def _sums_well(x: Tensor) -> bool:
    """False for half precision on CPUs, where torch's flash kernel rounds scores to it."""
    return not x.is_cpu or x.dtype in (torch.float32, torch.float64)


def attend_and_sum(call: AttentionCall, window: int | None) -> tuple[Tensor, Tensor | None]:
    """`attend`, and the scores' log-sum-exp [B, T, H] (natural log) where it costs nothing, else
    None. It comes from torch's flash kernel, if torch would choose that here. It has no gradient.
    """
    q, k, v = call.q, call.k, call.v
    plain = call.softcap is None and call.sinks is None and call.alibi_slopes is None
    if window is None and plain and may_sum(q.shape[-1], v.shape[-1]) and _sums_well(q):
        choice = torch._fused_sdp_choice(
            q, k, v, None, 0.0, True, scale=call.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        if choice == SDPBackend.FLASH_ATTENTION.value:
            if q.device.type == "cpu":
                flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            else:
                flash = torch.ops.aten._scaled_dot_product_flash_attention
            z, log_sum_exp, *_ = flash(q, k, v, 0.0, True, scale=call.scale)
            return z.transpose(1, 2), log_sum_exp.transpose(1, 2)
    return attend(call, window), None


def attend_rows(call: AttentionCall, q: Tensor, rows: Tensor, window: int | None = None) -> Tensor:
    """The attention output [B, R, H, V] of queries `q` [B, H, R, K] at ascending positions `rows`
    [R], computed in row blocks with the model's own mask.

    window: the number of keys visible to a row, itself included; no others are read.
    """
    heads, kv_heads = q.shape[1], call.k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    step = max(1, _BLOCK_ELEMENTS // (heads * call.k.shape[2]))
    out = []
    for i in range(0, len(rows), step):
        block = rows[i : i + step]
        begin = 0 if window is None else max(0, int(block[0]) - window + 1)
        keys = torch.arange(begin, int(block[-1]) + 1, device=q.device)
        k, v = (x[:, :, begin : int(block[-1]) + 1] for x in (call.k, call.v))
        block = block.to(q.device)
        if call.softcap is None and call.sinks is None and call.alibi_slopes is None:
            z = nn.functional.scaled_dot_product_attention(
                q[:, :, i : i + step],
                k,
                v,
                attn_mask=call.mask.visible(block, keys),
                scale=call.scale,
                enable_gqa=heads != kv_heads,
            )
            out.append(z.transpose(1, 2))
            continue
        # Heads that share keys become more rows of one head, so keys are not repeated.
        grouped = q[:, :, i : i + step].reshape(len(q), kv_heads, -1, q.shape[-1])
        scores = (grouped @ k.transpose(-1, -2)).to(wide) * call.scale
        scores = scores.view(len(q), heads, len(block), len(keys))
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if call.alibi_slopes is not None:
            distance = (keys - block[:, None]).to(wide)
            scores = scores.addcmul(call.alibi_slopes.to(wide)[:, None, None], distance)
        scores = scores.masked_fill_(~call.mask.visible(block, keys), float("-inf"))
        if call.sinks is not None:
            sinks = call.sinks.to(wide)[:, None, None].expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        z = weights.reshape(len(q), kv_heads, -1, len(keys)).to(v.dtype) @ v
        out.append(z.view(len(q), heads, len(block), -1).transpose(1, 2))
    return torch.cat(out, dim=1)


def map_tensors(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of `x` in which `change` is applied to every tensor."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, tuple | list):
        return type(x)(map_tensors(item, change) for item in x)
    if isinstance(x, dict):
        return {key: map_tensors(value, change) for key, value in x.items()}
    return x


def _float(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


class LayerCall(NamedTuple):
    """The arguments that a layer was called with, besides its hidden states."""

    n_rows: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, LayerCall]:
        """The hidden states [1, T, D] among the arguments of a layer, and the others."""
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden, LayerCall(hidden.shape[1], args[1:], kwargs)

    def at(self, rows: Tensor) -> LayerCall:
        """A copy of the call for some rows: every tensor with a row dimension is cut to them.

        The rank decides which dimension that is, if its size is the number of rows: dim 0 of 1,
        dim 1 of 2 and 3, dim 2 of 4.
        """

        def cut(x: Tensor) -> Tensor:
            dim = {1: 0, 2: 1, 3: 1, 4: 2}.get(x.ndim)
            if dim is not None and x.shape[dim] == self.n_rows:
                return x.index_select(dim, rows.to(x.device))
            return x

        return LayerCall(len(rows), map_tensors(self.args, cut), map_tensors(self.kwargs, cut))

    def float(self) -> LayerCall:
        """A copy of the call with all floating tensors in float32."""
        return LayerCall(
            self.n_rows, map_tensors(self.args, _float), map_tensors(self.kwargs, _float)
        )

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Runs the layer on `hidden` [1, n_rows, D]; returns its output [1, n_rows, D]."""
        if "hidden_states" in self.kwargs:
            return hidden_output(layer(*self.args, **{**self.kwargs, "hidden_states": hidden}))
        return hidden_output(layer(hidden, *self.args, **self.kwargs))


def hidden_output(output: Any) -> Tensor:
    """The hidden states in a module's output: itself, or its first element."""
    return output if isinstance(output, Tensor) else output[0]


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """A hook raises this to end a forward pass early."""


@contextmanager
def hooks(*handles: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Removes the hooks when the context ends."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def on_layer_call(
    layer: nn.Module, keep: Callable[[Tensor, LayerCall], None]
) -> torch.utils.hooks.RemovableHandle:
    """Passes the hidden states [1, T, D] and other arguments of each call of `layer` to `keep`."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(*LayerCall.of(args, kwargs))

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def on_input(
    module: nn.Module, keep: Callable[[Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    """Passes the first argument of each call of `module` to `keep`, if it is a tensor."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if isinstance(x, Tensor):
            keep(x)

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def change_input(module: nn.Module, x: Tensor) -> torch.utils.hooks.RemovableHandle:
    """Replaces the first argument of each call of `module` by `x`."""
    return module.register_forward_pre_hook(lambda _, args: (x, *args[1:]))


def on_output(
    module: nn.Module, keep: Callable[[Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    """Passes the hidden states that `module` returns to `keep`."""

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        x = hidden_output(output)
        if isinstance(x, Tensor):
            keep(x)

    return module.register_forward_hook(hook)


def change_output(
    module: nn.Module, change: Callable[[Tensor], Tensor]
) -> torch.utils.hooks.RemovableHandle:
    """Applies `change` to the hidden states that `module` returns, at every call."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        return (change(output[0]), *output[1:])

    return module.register_forward_hook(hook)
