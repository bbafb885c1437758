"""Attention weights, head outputs and FFN outputs, read from a layer's inputs; sentences, read
from an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...arguments import listed, shown
from ...errors import IfrError, UnsupportedArchitectureError
from ...kernels.contract import LayerInputs, visible
from ...model.decoder import Decoder


class NotRunError(IfrError, RuntimeError):
    """Results were read before the first `run`."""


@dataclass
class ModelInfo:
    """Name and sizes of a model."""

    name: str
    n_params_estimate: int  # all of its parameters
    n_layers: int
    n_heads: int
    d_model: int
    d_vocab: int


def check_plain(decoder: Decoder) -> None:
    """Raises UnsupportedArchitectureError where a layer does not pass its stream on as it is, or
    has linear attention.
    """
    decoder.refuse_recurrences("the tool's interface has no place for its weights")
    for block in decoder.blocks:
        if block.residual is not None:
            raise UnsupportedArchitectureError(
                f"model: layer {block.name} has norms or weights on its residual connection, for "
                "which the tool's interface has no place; ifr_fast.Tracer traces the model"
            )


def ffn_output(inputs: LayerInputs, resid_post: Tensor | None) -> Tensor:
    """The output [T, D] of the FFN."""
    if resid_post is None:
        assert inputs.ffn is not None
        return inputs.ffn
    return resid_post - inputs.y


def _wide(inputs: LayerInputs) -> LayerInputs:
    return inputs.to(torch.promote_types(inputs.y.dtype, torch.float32))


@torch.inference_mode()
def attention_pattern_of(inputs: LayerInputs) -> Tensor:
    """Attention weights [H, R, S]."""
    from ...kernels.rows import attention_pattern

    seen = visible(inputs.rows, len(inputs.k), inputs.window).to(inputs.k.device)
    return attention_pattern(_wide(inputs), seen)


def head_outputs(inputs: LayerInputs, pos: int) -> Tensor:
    """Outputs [H, V] of all heads at one row, before gates and output projection."""
    from ...kernels.rows import block_of

    pattern = attention_pattern_of(block_of(inputs, slice(pos, pos + 1)))[:, 0]  # [H, S]
    v = inputs.v[: pattern.shape[1]].to(pattern.dtype)
    v = v.repeat_interleave(len(pattern) // v.shape[1], 1)
    return torch.einsum("hj,jhv->hv", pattern, v)


@torch.inference_mode()
def formed_parts(inputs: LayerInputs) -> Tensor:
    """All parts of attention as one tensor [R, S, H, D]."""
    x = _wide(inputs)
    pattern = attention_pattern_of(x)
    H, _, D = x.W_O.shape
    if x.row_scale is not None:
        pattern = pattern * x.row_scale[:, None]
    out = pattern.new_empty(*pattern.shape[1:], H, D)
    for h in range(H):
        v = x.v[:, h * x.v.shape[1] // H]  # [S, V]
        if x.value_gate is not None:
            v = x.value_gate[:, h, None] * v  # [R, S, V]
        torch.mul(pattern[h, :, :, None], v @ x.W_O[h], out=out[:, :, h])
    return out


def listed_sentences(given: Sequence[Any]) -> list[Any]:
    """Sentences or token ids, several."""
    found = list(given) if isinstance(given, Tensor) and given.ndim == 2 else None
    found = listed("sentences", given) if found is None else found
    if any(isinstance(x, int | float | None) for x in found):
        raise ValueError(f"sentences: expected strings or token ids of each, got {shown(given)}")
    return found
