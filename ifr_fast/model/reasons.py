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
from .attention import AttentionCall, attend_rows
from .block import TOLERANCE, relative_error, rounding_tolerance
from .decoder import Decoder
from .hooks import LayerCall, hooked, in_this_thread, on_input, on_layer_call, on_output
from .interface import overriding
from .probing import Probe


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


def mixes_nothing(decoder: Decoder, token_ids: Tensor, layer: nn.Module) -> bool:
    """True if a layer is run once on a text, and its last row depends on that row alone."""
    calls: list[tuple[Tensor, LayerCall]] = []
    with hooked(on_layer_call(layer, lambda x, call: calls.append((x.clone(), call)))):
        decoder.forward(token_ids)
    if len(calls) != 1 or calls[0][0].shape[:-1] != (1, len(token_ids)):
        return False
    stream, call = calls[0]
    last = torch.tensor([len(token_ids) - 1])
    whole, alone = call(layer, stream)[0, -1:], call.at(last)(layer, stream[:, -1:])[0]
    return relative_error(alone, whole) <= rounding_tolerance(stream.dtype)


def why_unseen(decoder: Decoder, token_ids: Tensor, name: str, layer: nn.Module) -> str | None:
    """What a layer without softmax attention mixes positions by, as a sentence."""
    calls: list[tuple[Tensor, LayerCall]] = []
    with hooked(on_layer_call(layer, lambda x, call: calls.append((x.clone(), call)))):
        decoder.forward(token_ids)
    if not calls:
        return None
    stream, call = calls[0]
    n_rows = stream.shape[1:-1].numel()
    if stream.shape[0] == 1 and n_rows != len(token_ids):
        return (
            f"layer {name} is run on {n_rows} rows at {len(token_ids)} tokens, and every row has "
            "to be a token's"
        )
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


def why_other_keys(decoder: Decoder, token_ids: Tensor, attention: nn.Module) -> str:
    """Why an attention module reads keys that are neither all past ones nor a window's."""
    choosing: list[str] = []

    def look(name: str, module: nn.Module, _: Any, output: Any) -> None:
        made = output if isinstance(output, tuple | list) else (output,)
        if any(isinstance(x, Tensor) and not x.is_floating_point() for x in made):
            choosing.append(named(name, module))

    inside = [(name, module) for name, module in attention.named_modules() if name]
    hooks = (m.register_forward_hook(in_this_thread(partial(look, name))) for name, m in inside)

    def answer(call: AttentionCall) -> Tensor:
        return attend_rows(call, call.q, torch.arange(call.q.shape[2]))

    with suppress(Exception), overriding(answer), hooked(*hooks):
        decoder.forward(token_ids)
    if choosing:
        return f"reads keys that it chooses from the text, by {choosing[0]}"
    return "reads keys other than all past ones or those of one sliding window"


def why_no_parts(probe: Probe) -> str | None:
    """Why a layer was refused that does not add parts to a stream; None if that is not known."""
    with suppress(Exception):  # the layer is what no layer was expected to be
        return _why_no_parts(probe)
    return None


def _why_no_parts(probe: Probe) -> str | None:
    x, z, layer = probe.resid_pre[None], probe.z[None], probe.module

    def run(stream: Tensor, z: Tensor) -> Tensor:
        with overriding(lambda _: z):
            return probe.layer_call(layer, stream)

    mixer = mixer_of(layer, lambda stream: run(stream, z), x, {probe.attention})
    if mixer is not None:
        return f"besides attention, it mixes positions by {mixer}"
    return _why_other_rows(probe, run)


def _why_other_rows(probe: Probe, run: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    """Says so where what is made of attention's output differs between rows."""
    x, z = probe.resid_pre[None], probe.z[None]
    attended: list[Tensor] = []
    with hooked(on_output(probe.attention, lambda of: attended.append(of.clone()))):
        run(x, torch.zeros_like(z))
        run(x, z[:, -1:].expand_as(z).contiguous())  # the same output for every row
    none, same = (of.reshape(x.shape[1:]) for of in attended)
    added = same - none
    factor = (added * added[-1]).sum(-1, keepdim=True) / added[-1].square().sum()
    if relative_error(factor * added[-1], added, x[0]) > 10 * TOLERANCE:
        return (
            "what it makes of its heads' outputs differs from row to row, as where experts hold "
            "the output projection"
        )
    return None
