"""States that a model is put into and brought back from: eval mode, float32, layers overridden."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .block import HALF, Block
from .hooks import LayerCall
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
    """Within, this thread holds the model, which is in eval mode; each module's own flag is
    restored after.
    """
    with exclusively(model), all_evaluating(model.modules()):
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


@contextmanager
def in_float32(layer: nn.Module) -> Iterator[None]:
    """Inside the context, a half-precision layer computes in float32: rounding would hide the
    errors that the closure check looks for.
    """
    tensors = [x for x in (*layer.parameters(), *layer.buffers()) if x.dtype in HALF]
    # Offloaded weights are loaded when they are used; quantized ones cannot be cast.
    if any(x.is_meta or not is_plain(x) for x in tensors):
        with _Upcast():
            yield
        return
    held = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in held:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in held:
            tensor.data = data
