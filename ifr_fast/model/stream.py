"""The residual stream outside of layers: between them, before the first and after the last."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedArchitectureError
from .attention import AttentionCall
from .block import Block
from .decoder import Decoder
from .hooks import (
    LayerCall,
    StopForward,
    hooked,
    map_tensors,
    on_input,
    on_layer_call,
    on_output,
)

_PROBE_LENGTH = 12


def same_bits(x: Tensor, y: Tensor) -> Tensor:
    """0-d bool: true if x and y hold the same numbers, NaN included. No synchronization."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return torch.zeros((), dtype=torch.bool, device=x.device)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    x, y = x.contiguous(), y.to(x.device).contiguous()
    return (x.view(whole) == y.view(whole)).all()


def unchanged(left: Tensor, entered: Tensor) -> Tensor:
    """0-d bool: true if what was entered is what was left, perhaps in a wider dtype, which holds
    the same numbers.
    """
    wider = torch.promote_types(left.dtype, entered.dtype)
    return same_bits(left.to(wider) if wider == entered.dtype else left, entered)


def check_n_keys(call: AttentionCall, n_tokens: int) -> None:
    """Raises UnsupportedArchitectureError unless attention reads a key for each of the tokens."""
    n_keys = call.k.shape[2]
    if n_keys != n_tokens or call.v.shape[2] != n_tokens:
        raise UnsupportedArchitectureError(
            f"model: {type(call.module).__name__} reads {n_keys} keys at {n_tokens} tokens, as "
            "with a prefix; every key has to be a token's"
        )


class SharedValues:
    """The keys and values that layers share, in one forward pass."""

    def __init__(self, value_layers: list[int] | None) -> None:
        self._value_layers = value_layers
        self._kept: dict[int, AttentionCall] = {}  # of the layers that others read from
        self._flags: dict[int, Tensor] = {}

    def of(self, layer: int, call: AttentionCall) -> AttentionCall:
        """The call with the very tensors of the layer whose keys and values it reads."""
        if self._value_layers is None:
            return call
        read = self._value_layers[layer]
        if read == layer:
            self._kept[layer] = call
            return call
        source = self._kept[read]
        self._flags[layer] = same_bits(source.k, call.k) & same_bits(source.v, call.v)
        return call._replace(k=source.k, v=source.v)

    def verify(self) -> None:
        """Raises UnsupportedArchitectureError where a layer read other keys or values than those of
        its source; a device synchronization where layers share any.
        """
        for layer, same in self._flags.items():
            if not bool(same):
                assert self._value_layers is not None
                raise UnsupportedArchitectureError(
                    f"model: layer {layer} reads other keys or values than those of layer "
                    f"{self._value_layers[layer]}, which it shared when the model was opened"
                )


class Chain:
    """The residual stream between layers: each has to be entered with what the one before left.

    A hook, or code of the model, that changes the stream in between would add to a node something
    that is no part of it, and no sum within a layer shows it.
    """

    def __init__(self, n_layers: int) -> None:
        self._n_layers, self._n_left = n_layers, 0
        self._left: Tensor | None = None
        self._flags: list[tuple[str, Tensor]] = []

    def leave(self, resid_post: Tensor) -> None:
        """Takes the output of a layer, as a copy: the stream may be changed in place."""
        self._left = resid_post.clone()
        self._n_left += 1

    def enter(self, where: str, resid_pre: Tensor) -> None:
        """Takes the input of the next layer, described by `where`."""
        if self._left is not None:
            self._flags.append((where, unchanged(self._left, resid_pre)))
            self._left = None

    def end(self, x: Tensor) -> None:
        """Takes the input of the module that reads the last layer's output, or what the head reads
        if there is none.
        """
        if self._n_left == self._n_layers:
            self.enter("the final norm", x)

    def flags(self) -> list[Tensor]:
        """One 0-d bool for each module that was entered."""
        return [flag for _, flag in self._flags]

    def verify(self) -> None:
        """Reads the flags and checks them; one device synchronization."""
        if self._flags:
            device = self._flags[0][1].device
            self.check(torch.stack([flag.to(device) for flag in self.flags()]).tolist())

    def check(self, flags: Sequence[bool]) -> None:
        """Raises UnsupportedArchitectureError unless all of `flags`, as read, are true."""
        for (where, _), same in zip(self._flags, flags, strict=True):
            if not same:
                raise UnsupportedArchitectureError(
                    f"model: {where} is not entered with the residual stream that the layer before "
                    "it left: a hook or the model itself changes it in between"
                )


class StreamOutside:
    """The residual stream between layers and behind the last, in one forward pass."""

    def __init__(self, model: PreTrainedModel, layers: list[tuple[str, nn.Module]]) -> None:
        self._chain, self._readers = Chain(len(layers)), list[nn.Module]()
        self._left: Tensor | None = None  # the last layer's output
        inside = {module for _, layer in layers for module in layer.modules()}
        self.handles = []
        for i, (name, layer) in enumerate(layers):
            where = f"layer {name}"
            self.handles += [
                on_layer_call(layer, lambda x, _, where=where: self._chain.enter(where, x)),  # type: ignore[misc]
                on_output(layer, self._chain.leave if i + 1 < len(layers) else self._end),
            ]
        for module in model.modules():
            if module not in inside:
                self.handles.append(on_input(module, lambda x, m=module: self._read(m, x)))  # type: ignore[misc]

    def _end(self, x: Tensor) -> None:
        self._left = x.clone()

    def _read(self, module: nn.Module, x: Tensor) -> None:
        if self._left is not None and bool(unchanged(self._left, x)):
            self._readers.append(module)

    def check(self) -> None:
        """Raises UnsupportedArchitectureError where the stream is changed between layers."""
        self._chain.verify()

    def reader(self, states: Tensor) -> nn.Module | None:
        """The module that reads the last layer's output as it is; None if the head does, whose
        input is `states` [T, D]. Raises UnsupportedArchitectureError if it is changed before.
        """
        if self._readers:
            return self._readers[0]
        assert self._left is not None
        if bool(unchanged(self._left.view_as(states), states)):
            return None
        raise UnsupportedArchitectureError(
            "model: no module reads what its last layer returned; the residual stream is changed "
            "before the final norm"
        )


def on_end(decoder: Decoder, chain: Chain) -> torch.utils.hooks.RemovableHandle:
    """Hands the chain what is read behind the last layer."""
    if decoder.final_site is None:
        return decoder.on_states(chain.end)
    return on_input(decoder.final_site, chain.end)


def check_embeddings(decoder: Decoder) -> None:
    """Raises UnsupportedArchitectureError if the first layer is entered with rows that depend on
    other tokens than their own, or if a layer is called with other arguments that do.

    Finds too whether padding in a text moves the positions of the tokens behind it, and how many
    tokens the table of positions suffices for (RoBERTa's first is number 2).
    """
    pad = getattr(decoder.model.config.get_text_config(), "pad_token_id", None)
    decoder.counted_padding = (
        pad if isinstance(pad, int) and 0 <= pad < decoder.vocab_size else None
    )
    T = min(_PROBE_LENGTH, decoder.max_length or _PROBE_LENGTH)
    token_ids = decoder.without_padding(torch.arange(T) % decoder.vocab_size)
    with hooked(*_on_positions(decoder, T)):
        stream, given = _entered(decoder, token_ids)
    for kept in torch.arange(T).split(max(1, T // 3)):
        others = decoder.without_padding((token_ids + 1) % decoder.vocab_size)
        others[kept] = token_ids[kept]
        other_stream, other_given = _entered(decoder, others)
        if not bool(same_bits(other_stream[kept], stream[kept])):
            raise UnsupportedArchitectureError(
                f"model: {type(decoder.model).__name__} mixes the embeddings of several tokens "
                "before its first layer; a position's embedding has to be its token's alone"
            )
        pairs = zip(_rows_of(given, T, kept), _rows_of(other_given, T, kept), strict=True)
        if not all(torch.equal(x, y) for x, y in pairs):
            raise UnsupportedArchitectureError(
                f"model: {type(decoder.model).__name__} calls a layer with an argument that mixes "
                "several tokens; at a position it has to be made of that position's token alone"
            )

    if decoder.counted_padding is not None:
        padded, pad = token_ids.clone(), decoder.counted_padding
        padded[0], decoder.counted_padding = pad, None
        if T > 1 and not bool(same_bits(_entered(decoder, padded)[0][1:], stream[1:])):
            decoder.counted_padding = pad


def _on_positions(decoder: Decoder, n_tokens: int) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that take from the context what lies before the first number that is looked up in a
    table of all positions.
    """
    context = decoder.max_length

    def look(ids: Tensor) -> None:
        first = ids.flatten()[:1]
        if ids.numel() == n_tokens and torch.equal(
            ids.flatten(), first + torch.arange(n_tokens, device=ids.device)
        ):
            assert context is not None
            decoder.max_length = context - int(first)

    tables = [
        module
        for module in decoder.model.modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == context
    ]
    words = decoder.model.get_input_embeddings()
    return [on_input(module, look) for module in tables if module is not words]


def _entered(decoder: Decoder, token_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The input [T, D] of the first layer, and the other tensors that layers are called with."""
    found: list[Tensor] = []
    given: dict[int, Tensor] = {}
    n_called = 0

    def skip(_: Block, hidden: Tensor, call: LayerCall) -> Tensor:
        nonlocal n_called
        n_called += 1
        if not found:
            found.append(hidden[0])
        map_tensors((call.args, call.kwargs), lambda x: given.setdefault(id(x), x))
        if n_called == decoder.n_layers:
            raise StopForward
        return hidden

    with decoder.overriding_layers(skip), suppress(StopForward):
        decoder.forward(token_ids)
    return found[0], list(given.values())


def entered_rows(decoder: Decoder, token_ids: Tensor) -> Tensor:
    """The rows [T, D] that the first layer is entered with at `token_ids` [T]; no layer runs."""
    return _entered(decoder, token_ids)[0]


def _rows_of(given: list[Tensor], n_rows: int, rows: Tensor) -> list[Tensor]:
    """The arguments of layers at some of `n_rows` rows."""
    at: list[Tensor] = list(LayerCall(n_rows, tuple(given), {}).at(rows).args)
    return at
