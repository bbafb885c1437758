"""A vector of the residual stream, read in tokens by the model's own final norm and head.

- Logit lens: the logits that the model would give if the vector were its last layer's output.
  The model itself makes them, in a run that skips its layers: whatever stands between its last
  layer and its logits (norm, scale, soft-cap) is applied as the model applies it.
- Direct logits: the logits that a part of the stream adds. They are linear in the part once the
  final norm is held at its value for that row. Norms are linear near 0 up to a number for each
  row (1/sqrt(eps) there), so the map is the derivative at 0, in forward mode, which is exact; and
  that number is read off the row. Soft-caps do not bend there, and biases belong to no part: the
  direct logits of all parts of a row sum to its logits before the soft-cap, less their bias.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import UnsupportedArchitectureError
from .block import Block
from .decoder import Decoder
from .hooks import LayerCall, hooked
from .modes import evaluating

_ROWS = 64  # rows whose logits are formed at once
_TOLERANCE = 1e-3  # relative error that rounding explains in float32


def lens_logits(decoder: Decoder, resid: Tensor) -> Tensor:
    """Logits [R, vocab] of residual streams [R, D], in the model's dtype."""
    with torch.inference_mode(), evaluating(decoder.model):
        return torch.cat([_run(decoder, rows)[1] for rows in resid.split(_rows(decoder))])


def direct_logits(decoder: Decoder, parts: Tensor, resid: Tensor) -> Tensor:
    """The logits [R, vocab], in float32 or wider, that `parts` [R, D] add to those of their rows,
    whose last layer's outputs are `resid` [R, D].

    Raises UnsupportedArchitectureError where the final norm is not linear but for a number a row.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        evaluating(decoder.model),
    ):
        n = max(1, _rows(decoder) // 2)  # a run has both
        pairs = zip(parts.clone().split(n), resid.clone().split(n), strict=True)
        return torch.cat([_direct(decoder, part, row) for part, row in pairs])


def _rows(decoder: Decoder) -> int:
    """Rows of a run, which is a text to the model."""
    return min(_ROWS, decoder.max_length or _ROWS)


def _direct(decoder: Decoder, parts: Tensor, resid: Tensor) -> Tensor:
    dtype = decoder.dtype
    wide = torch.promote_types(dtype, torch.float32)
    states, _ = _run(decoder, resid)
    with forward_ad.dual_level():
        tangent = torch.cat([parts, resid]).to(dtype)
        at_zero = forward_ad.make_dual(torch.zeros_like(tangent), tangent)
        dual_states, dual_logits = (forward_ad.unpack_dual(x) for x in _run(decoder, at_zero))
        moved, logits = dual_states.tangent[len(parts) :].to(wide), dual_logits.tangent
        added = states.to(wide) - dual_states.primal[len(parts) :].to(wide)
    scale = (moved * added).sum(-1) / moved.square().sum(-1).clamp(min=torch.finfo(wide).tiny)
    norm = torch.linalg.vector_norm
    error = norm(scale[:, None] * moved - added, dim=-1) / norm(added, dim=-1).clamp(min=1e-30)
    tolerance = max(_TOLERANCE, 8 * torch.finfo(dtype).eps)
    if not bool((error <= tolerance).all()):
        raise UnsupportedArchitectureError(
            "model: between its last layer and its head stands more than a norm (relative error "
            f"{float(error.max()):.1e}), so what a part adds to the logits is not known"
        )
    return logits[: len(parts)].to(wide) * scale[:, None].to(logits.device)


def _run(decoder: Decoder, resid: Tensor) -> tuple[Tensor, Tensor]:
    """The head's input [R, D] and the logits [R, vocab] if the last layer returned `resid`."""
    states: list[Tensor] = []

    def passed_by(block: Block, hidden: Tensor, _: LayerCall) -> Tensor:
        if block.layer < decoder.n_layers - 1:
            return hidden
        return resid[None].to(hidden.device, decoder.dtype)

    ids = torch.zeros(1, len(resid), dtype=torch.long, device=decoder.device)
    with (
        decoder.overriding_layers(passed_by),
        hooked(decoder.on_states(states.append)),
    ):
        logits: Tensor = decoder.model(input_ids=ids, use_cache=False).logits
    return states[0][0], logits[0]
