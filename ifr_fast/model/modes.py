"""States that a model is put into and brought back from: eval mode, float32, layers overridden."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..kernels.precision import exact_products
from .block import HALF, Block
from .hooks import LayerCall, map_tensors
from .interface import exclusively


@contextmanager
def overriding_layers(
    blocks: Sequence[Block], output_of: Callable[[Block, Tensor, LayerCall], Tensor]
) -> Iterator[None]:
    """Within, no layer runs. Its output [1, T, D] is that of `output_of`, called with the layer's
    input [1, T, D] and its other arguments.
    """
    owner = get_ident()

    def replace(block: Block) -> None:
        model_own = block.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if get_ident() != owner:
                return model_own(*args, **kwargs)
            call = LayerCall.of(args, kwargs)
            hidden = output_of(block, *call)
            return (
                hidden if block.n_outputs is None else (hidden,) + (None,) * (block.n_outputs - 1)
            )

        block.module.forward = forward

    own = [block.module.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            replace(block)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            block.module.__dict__.pop("forward", None)
            if forward is not None:  # offloading had replaced it before
                block.module.__dict__["forward"] = forward


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, this thread holds the model, which is in eval mode, and products are exact; each
    module's own flag is restored after.
    """
    with exclusively(model), all_evaluating(model.modules()), exact_products():
        yield


@contextmanager
def all_evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the context, each of `modules` is in eval mode; its flag is restored after."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Upcast(TorchFunctionMode):
    """Inside the context, every operation but moves reads half-precision tensors as float32."""

    _MOVES = frozenset({"__get__", "__set__", "to", "detach", "clone", "requires_grad_"})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        def upcast(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dtype not in HALF:
                return x
            return x.float() if is_plain(x) else x.dequantize().float()

        if func.__name__ in self._MOVES:
            return func(*args, **(kwargs or {}))
        return func(*map(upcast, args), **{key: upcast(x) for key, x in (kwargs or {}).items()})


def is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter)


def is_packed(module: nn.Module) -> bool:
    """True for a module without others inside whose weights are no plain tensors of numbers with
    at least 16 bits.
    """

    def is_wide(x: Tensor) -> bool:
        return x.is_meta or (x.is_floating_point() and x.dtype.itemsize > 1)

    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    packed = any(not is_plain(x) or not is_wide(x) for x in tensors)
    return packed and next(module.children(), None) is None


@contextmanager
def computing(
    module: nn.Module, change: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Within, `module` computes `change` of its own forward in this thread."""
    owner, own, given = get_ident(), module.forward, module.__dict__.get("forward")
    changed = change(own)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (changed if get_ident() == owner else own)(*args, **kwargs)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if given is not None:  # offloading had replaced it before
            module.forward = given


def _in_half(forward: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """`forward` for float32 arguments, computed in `dtype`."""

    def cast(to: torch.dtype) -> Callable[[Tensor], Tensor]:
        return lambda x: x.to(to) if x.is_floating_point() else x

    def called(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors((args, kwargs), cast(dtype))
        return map_tensors(forward(*args, **kwargs), cast(torch.float32))

    return called


@contextmanager
def in_float32(
    layer: nn.Module, dtype: torch.dtype, plain: Container[nn.Module] = ()
) -> Iterator[bool]:
    """Inside the context, a layer whose stream is in half precision computes in float32: rounding
    would hide the errors that the closure check looks for. Yields False if some of its modules
    still compute in `dtype`: packed ones, apart from those in `plain`.
    """
    packed = [module for module in layer.modules() if is_packed(module) and module not in plain]
    of_packed = {x for module in packed for x in (*module.parameters(), *module.buffers())}
    tensors = [x for x in (*layer.parameters(), *layer.buffers()) if x.dtype in HALF]
    # Offloaded weights are loaded when they are used; quantized ones cannot be cast.
    if any(x.is_meta or not is_plain(x) for x in tensors):
        with _Upcast():
            yield True
        return
    held = [(tensor, tensor.data) for tensor in tensors if tensor not in of_packed]
    with ExitStack() as stack:
        for module in packed if dtype in HALF else ():
            stack.enter_context(computing(module, lambda own: _in_half(own, dtype)))
        try:
            for tensor, data in held:
                tensor.data = data.float()
            yield not packed
        finally:
            for tensor, data in held:
                tensor.data = data
