"""Module hooks: the call of a layer, and the tensors that enter and leave modules."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.rows import on_device
from .masks import LazyMask


def map_tensors(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of `x` in which `change` is applied to every tensor."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, tuple | list):
        return type(x)(map_tensors(item, change) for item in x)
    if isinstance(x, dict):
        return {key: map_tensors(value, change) for key, value in x.items()}
    if isinstance(x, UserDict):  # keys and values that layers share
        return type(x)({key: map_tensors(value, change) for key, value in x.items()})
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
        dim 1 of 2 and 3, dim 2 of 4. A mask that all heads share, [B, 1, T, T], is cut to what the
        rows have among themselves.
        """

        def cut(x: Tensor) -> Tensor:
            if isinstance(x, LazyMask):
                return x.among(rows) if x.shape[2:] == (self.n_rows, self.n_rows) else x
            if x.ndim == 4 and x.shape[1:] == (1, self.n_rows, self.n_rows):
                at = on_device(rows, x.device)
                return x.index_select(2, at).index_select(3, at)
            dim = {1: 0, 2: 1, 3: 1, 4: 2}.get(x.ndim)
            if dim is not None and x.shape[dim] == self.n_rows:
                return x.index_select(dim, on_device(rows, x.device))
            return x

        return LayerCall(len(rows), map_tensors(self.args, cut), map_tensors(self.kwargs, cut))

    def float(self) -> LayerCall:
        """A copy of the call with all floating tensors in float32."""
        return LayerCall(
            self.n_rows, map_tensors(self.args, _float), map_tensors(self.kwargs, _float)
        )

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Runs the layer on `hidden` [1, n_rows, D]; returns its output [1, n_rows, D]. What the
        layer puts into containers among its arguments is dropped.
        """
        copied = LayerCall(*map_tensors(tuple(self), lambda x: x))
        return copied.in_place(layer, hidden)

    def in_place(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Runs the layer, which may change containers among its arguments."""
        if "hidden_states" in self.kwargs:
            return hidden_output(layer(*self.args, **{**self.kwargs, "hidden_states": hidden}))
        return hidden_output(layer(hidden, *self.args, **self.kwargs))


def hidden_output(output: Any) -> Tensor:
    """The hidden states in a module's output: itself, or its first element."""
    return output if isinstance(output, Tensor) else output[0]


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """A hook raises this to end a forward pass early."""


# The hooks of ours that run within each other: what they compute is no part of a forward pass.
running_hooks: ContextVar[int] = ContextVar("ifr_fast_running_hooks", default=0)


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """`hook` for calls from the thread that made it; calls from other threads do nothing.

    Hooks belong to modules, so that a forward pass of the user in another thread calls them too.
    """
    owner = get_ident()

    def called(*args: Any, **kwargs: Any) -> Any:
        if get_ident() != owner:
            return None
        token = running_hooks.set(running_hooks.get() + 1)
        try:
            return hook(*args, **kwargs)
        finally:
            running_hooks.reset(token)

    return marked(called)


def marked(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, told apart from those of users."""
    hook.of_ifr_fast = True  # type: ignore[attr-defined]
    return hook


def user_hooks(model: nn.Module) -> Iterator[tuple[str, int, Callable[..., Any]]]:
    """The hooks on all modules and on each module of a model, without those that are ours: the
    module's name and the hook's kind, its key, and the hook.
    """
    of_all = torch.nn.modules.module
    places = [
        ("all modules: pre-hook", of_all._global_forward_pre_hooks),
        ("all modules: hook", of_all._global_forward_hooks),
    ]
    for name, module in model.named_modules():
        places.append((f"{name}: pre-hook", module._forward_pre_hooks))
        places.append((f"{name}: hook", module._forward_hooks))
    for place, hooks in places:
        for key, hook in hooks.items():
            # Those that transformers leaves where hidden states were once asked for only look.
            looks = getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
            if not looks and not hasattr(hook, "of_ifr_fast"):
                yield place, key, hook


def hook_keys(model: nn.Module) -> list[tuple[str, int]]:
    """The places and keys of the hooks of users on a model, by which changes are noticed."""
    return [(place, key) for place, key, _ in user_hooks(model)]


@contextmanager
def hooked(*handles: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
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

    return layer.register_forward_pre_hook(in_this_thread(hook), with_kwargs=True)


def on_input(
    module: nn.Module, keep: Callable[[Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    """Passes the first argument of each call of `module` to `keep`, if it is a tensor."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if isinstance(x, Tensor):
            keep(x)

    return module.register_forward_pre_hook(in_this_thread(hook), with_kwargs=True)


def change_input(module: nn.Module, x: Tensor) -> torch.utils.hooks.RemovableHandle:
    """Replaces the first argument of each call of `module` by `x`."""
    return module.register_forward_pre_hook(in_this_thread(lambda _, args: (x, *args[1:])))


def on_output(
    module: nn.Module, keep: Callable[[Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    """Passes the hidden states that `module` returns to `keep`."""

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        x = hidden_output(output)
        if isinstance(x, Tensor):
            keep(x)

    return module.register_forward_hook(in_this_thread(hook))


def change_output(
    module: nn.Module, change: Callable[[Tensor], Tensor]
) -> torch.utils.hooks.RemovableHandle:
    """Applies `change` to the hidden states that `module` returns, at every call."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        return (change(output[0]), *output[1:])

    return module.register_forward_hook(in_this_thread(hook))
