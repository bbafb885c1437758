"""What a model that is refused computes, in words: modules that mix positions, and so on.

Found by running layers on two streams, as everything else; no class is known by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IfrError, UnsupportedArchitectureError
from .block import TOLERANCE, relative_error
from .decoder import Decoder
from .hooks import LayerCall, hooked, on_input, on_layer_call, on_output


def named(name: str, module: nn.Module) -> str:
    """A module in a message."""
    return f"{name} ({type(module).__name__})"


@contextmanager
def forward_errors_named(decoder: Decoder, token_ids: Tensor) -> Iterator[None]:
    """Whatever the model's own code raises within becomes UnsupportedArchitectureError."""
    model = f"model: {type(decoder.model).__name__}"
    try:
        yield
    except (IfrError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        try:
            decoder.forward(token_ids)
        except Exception as alone:
            raise UnsupportedArchitectureError(
                f"{model} cannot be run on token ids alone ({_first_line(alone)})"
            ) from alone
        raise UnsupportedArchitectureError(
            f"{model} cannot be run while its attention is watched ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def mixer_of(
    layer: nn.Module, run: Callable[[Tensor], Any], stream: Tensor, known: Collection[nn.Module]
) -> str | None:
    """The first module in a layer, other than those `known` and what holds them, whose output at
    the last row depends on earlier rows while what it reads at that row does not.

    run: runs the layer on a stream [1, T, D].
    """
    others = stream.clone()
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(0))
    others[:, :-1] *= noise.to(others)[:, :-1]
    inside = {
        name: module
        for name, module in layer.named_modules()
        if name and not any(m in known for m in module.modules())
    }
    read, read_of_others = (_last_rows(inside, on_input, run, x) for x in (stream, others))
    left, left_of_others = (_last_rows(inside, on_output, run, x) for x in (stream, others))
    mixing = [
        name
        for name in left.keys() & read.keys() & left_of_others.keys() & read_of_others.keys()
        if torch.equal(read[name], read_of_others[name])
        and relative_error(left[name], left_of_others[name]) > TOLERANCE
    ]
    if not mixing:
        return None
    name = min(mixing, key=lambda name: name.count("."))
    return named(name, layer.get_submodule(name))


def _last_rows(
    modules: dict[str, nn.Module],
    on: Callable[[nn.Module, Callable[[Tensor], None]], torch.utils.hooks.RemovableHandle],
    run: Callable[[Tensor], Any],
    stream: Tensor,
) -> dict[str, Tensor]:
    """The last row of what each of the modules reads or returns first, by its name."""
    T, found = stream.shape[1], dict[str, Tensor]()

    def keep(name: str, x: Tensor) -> None:
        if x.is_floating_point() and (x.shape[:2] == (1, T) or x.shape[:1] == (T,)):
            found.setdefault(name, x.reshape(T, -1)[-1:].clone())

    with hooked(*(on(module, partial(keep, name)) for name, module in modules.items())):
        run(stream)
    return found


def why_unseen(decoder: Decoder, token_ids: Tensor, name: str, layer: nn.Module) -> str | None:
    """What a layer without softmax attention mixes positions by, as a sentence."""
    calls: list[tuple[Tensor, LayerCall]] = []
    with hooked(on_layer_call(layer, lambda x, call: calls.append((x.clone(), call)))):
        decoder.forward(token_ids)
    if not calls:
        return None
    stream, call = calls[0]
    mixer = mixer_of(layer, lambda x: call(layer, x), stream, ())
    if mixer is None:
        return None
    return (
        f"layer {name} mixes positions by {mixer}, which shows no softmax(q k^T) v: how much of "
        "its output came from which position is not known"
    )


def why_not_one_each(
    decoder: Decoder,
    token_ids: Tensor,
    attentions: list[nn.Module],
    layers: list[tuple[str, nn.Module]],
    stack: list[nn.Module],
) -> str:
    """Why the layers of a model do not make one call of attention each.

    layers: of each of `attentions`; stack: all layers that stand in the first one's list.
    """
    names = {module: name for name, module in decoder.model.named_modules()}
    seen = {layer for _, layer in layers}
    counted = (
        f"of {len(stack)} layers, {len(layers)} calls of softmax attention were seen; every layer "
        "must make exactly one"
    )
    for layer in stack:
        if layer not in seen:
            of = ", ".join(type(child).__name__ for child in layer.children())
            none = f"{counted}; none came from {names[layer]} ({of}), whose sources are not known"
            return why_unseen(decoder, token_ids, names[layer], layer) or none
    name, layer = layers[0]
    calls: list[LayerCall] = []
    with hooked(on_layer_call(layer, lambda _, call: calls.append(call))):
        decoder.forward(token_ids)
    if len(calls) != 1:
        return f"layer {name} is run {len(calls)} times, one after another"
    own = [attention for attention, (_, of) in zip(attentions, layers, strict=True) if of is layer]
    if len(own) > 1:
        each = dict.fromkeys(named(names[module], module) for module in own)
        return f"layer {name} computes {len(own)} softmax attentions, in {' and '.join(each)}"
    return counted


def why_no_attention(decoder: Decoder, token_ids: Tensor) -> str | None:
    """`why_unseen` of the first layer of a model in which no softmax attention was seen."""
    for name, stack in decoder.model.named_modules():
        if isinstance(stack, nn.ModuleList) and len(stack):
            with suppress(Exception):
                why = why_unseen(decoder, token_ids, f"{name}.0", stack[0])
                if why is not None:
                    return why
    return None
