"""The residual stream outside of layers: between them, before the first and after the last."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from ..errors import UnsupportedArchitectureError
from .attention import AttentionCall
from .decoder import Decoder
from .hooks import LayerCall, StopForward, hooked, on_layer_call
from .modes import evaluating

_PROBE_LENGTH = 12


def same_bits(x: Tensor, y: Tensor) -> Tensor:
    """0-d bool: true if x and y hold the same numbers, NaN included. No synchronization."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return torch.zeros((), dtype=torch.bool, device=x.device)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    x, y = x.contiguous(), y.to(x.device).contiguous()
    return (x.view(whole) == y.view(whole)).all()


def check_n_keys(call: AttentionCall, n_tokens: int) -> None:
    """Raises UnsupportedArchitectureError unless attention reads a key for each of the tokens."""
    n_keys = call.k.shape[2]
    if n_keys != n_tokens or call.v.shape[2] != n_tokens:
        raise UnsupportedArchitectureError(
            f"model: {type(call.module).__name__} reads {n_keys} keys at {n_tokens} tokens, as "
            "with a prefix; every key has to be a token's"
        )


class Chain:
    """The residual stream between layers: each has to be entered with what the one before left.

    A hook, or code of the model, that changes the stream in between would add to a node something
    that is no part of it, and no sum within a layer shows it.
    """

    def __init__(self) -> None:
        self._left: Tensor | None = None
        self._flags: list[tuple[str, Tensor]] = []

    def leave(self, resid_post: Tensor) -> None:
        """Takes the output of a layer, as a copy: the stream may be changed in place."""
        self._left = resid_post.clone()

    def enter(self, where: str, resid_pre: Tensor) -> None:
        """Takes the input of the next module, described by `where`."""
        if self._left is not None:
            self._flags.append((where, same_bits(self._left, resid_pre)))
            self._left = None

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


@torch.no_grad()
def check_embeddings(decoder: Decoder) -> None:
    """Raises UnsupportedArchitectureError if the first layer is entered with rows that depend on
    other tokens than their own. Runs once for each set of hooks on modules outside of layers.
    """
    hooks = _hooks_outside(decoder)
    if hooks == decoder.checked_hooks:
        return
    T = min(_PROBE_LENGTH, decoder.max_length or _PROBE_LENGTH)
    token_ids = torch.arange(T) % decoder.vocab_size
    expected = _entered(decoder, token_ids)
    for kept in torch.arange(T).split(max(1, T // 3)):
        others = (token_ids + 1) % decoder.vocab_size
        others[kept] = token_ids[kept]
        if not bool(same_bits(_entered(decoder, others)[kept], expected[kept])):
            raise UnsupportedArchitectureError(
                f"model: {type(decoder.model).__name__} mixes the embeddings of several tokens "
                "before its first layer; a position's embedding has to be its token's alone"
            )
    decoder.checked_hooks = hooks


def _entered(decoder: Decoder, token_ids: Tensor) -> Tensor:
    """The input [T, D] of the first layer."""
    found: list[Tensor] = []

    def stop(hidden: Tensor, _: LayerCall) -> None:
        found.append(hidden[0])
        raise StopForward

    with (
        evaluating(decoder.model),
        hooked(on_layer_call(decoder.blocks[0].module, stop)),
        suppress(StopForward),
    ):
        decoder.forward(token_ids)
    return found[0]


def _hooks_outside(decoder: Decoder) -> list[tuple[int, ...]]:
    """The ids of the hooks on each module outside of layers."""
    if not decoder.modules_outside:
        inside = {m for block in decoder.blocks for m in block.module.modules()}
        decoder.modules_outside = [m for m in decoder.model.modules() if m not in inside]
    return [(*m._forward_pre_hooks, *m._forward_hooks) for m in decoder.modules_outside]
