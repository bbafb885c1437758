"""The value biases b_V of a model, which parity removes from the values.

The tool's models have them folded into the bias of the output projection. Attention weights sum to
1, so value biases add the same whatever is attended to, and belong to no part. They are found in
any family of models: b_V is the value that attention computes from an input of 0.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ...model.attention import AttentionCall
from ...model.hooks import StopForward, hooked, in_this_thread
from ...model.modes import evaluating
from ...recording.recording import Recording

_TOLERANCE = 1e-3  # relative, within which values are affine in attention's input


@torch.inference_mode()
def biases(recording: Recording) -> list[Tensor]:
    """b_V [H_kv, V] of each layer, on its device, in float32 or wider.

    Raises ValueError if a layer's values are not affine in the input of its attention, or if its
    attention weights sum to less than 1.
    """
    decoder, found = recording.decoder, []
    values: list[Tensor] = []

    def answer(call: AttentionCall) -> Tensor:
        values.append(call.v[0, :, -1])
        raise StopForward

    with evaluating(decoder.model), decoder.attention_through(decoder.model, answer):
        for block, recorded in zip(decoder.blocks, recording.layers, strict=True):
            if recorded.sinks is not None:
                raise ValueError(
                    f"parity: attention of layer {block.layer} has sinks, with which a value bias "
                    "cannot be folded away; expected parity=False"
                )
            last = torch.tensor([len(recording) - 1])
            hidden = recorded.resid_pre[last.to(recorded.resid_pre.device)][None]
            for factor in (0.0, 1.0, 2.0):
                with (
                    suppress(StopForward),
                    hooked(_scale_input(block.attention, factor)),
                ):
                    recorded.call.at(last)(block.module, hidden)
            wide = torch.promote_types(values[-1].dtype, torch.float32)
            at_0, at_1, at_2 = (x.to(wide) for x in values[-3:])
            bend = torch.linalg.vector_norm(at_2 - 2 * at_1 + at_0)
            granted = max(_TOLERANCE, 8 * torch.finfo(values[-1].dtype).eps)
            if bend > granted * torch.linalg.vector_norm(at_2):
                raise ValueError(
                    f"parity: values of layer {block.layer} are not affine in the input of its "
                    "attention, so they have no bias to fold away; expected parity=False"
                )
            found.append(at_0.clone())
    return found


def _scale_input(module: nn.Module, factor: float) -> torch.utils.hooks.RemovableHandle:
    """A hook that multiplies the hidden states that `module` reads by a factor."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (factor * args[0], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": factor * kwargs["hidden_states"]}

    return module.register_forward_pre_hook(in_this_thread(hook), with_kwargs=True)
