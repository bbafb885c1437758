"""The closure check: the parts that were scored add up to what the model computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import IfrError
from ..kernels.contract import LayerInputs


class Closure(NamedTuple):
    """Some of a layer's rows, whose parts should add up to their node."""

    y: Tensor  # [C, D]
    resid_pre: Tensor  # [C, D]
    moved: Tensor  # [C, D] the sum of the heads' outputs, taken from the model's own states
    linear: Tensor  # [C] `AttentionScores.linear`
    eps: Tensor  # [C] machine epsilon of the model's dtype


def closure(inputs: LayerInputs, linear: Tensor, bias: Tensor, sample: Tensor) -> Closure:
    """The rows of a layer that are checked. bias: [D]; sample: indices of rows, on the CPU."""

    def take(x: Tensor) -> Tensor:
        return x if len(sample) == len(x) else x[sample.to(x.device)]

    ffn = None if inputs.ffn is None else take(inputs.ffn)
    return closure_rows(take(inputs.y), take(inputs.resid_pre), ffn, bias, take(linear))


def closure_rows(
    y: Tensor, resid_pre: Tensor, ffn: Tensor | None, bias: Tensor, linear: Tensor
) -> Closure:
    """The rows to be checked, from y, resid_pre and (in parallel blocks) ffn [C, D]; bias [D] or
    [C, D]; linear [C].
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    eps = torch.full_like(y[:, 0], torch.finfo(y.dtype).eps, dtype=wide)
    y, resid_pre = y.to(wide), resid_pre.to(wide)
    moved = y - resid_pre - bias
    if ffn is not None:
        moved = moved - ffn
    return Closure(y, resid_pre, moved, linear.to(wide), eps)


def closure_errors(rows: Closure) -> Tensor:
    """[C] errors of the sum of parts and bias against the node, in units of the error that rounding
    explains (docs/design.md, section 3.4).

    The signs s of a node are independent of its parts, so for an error e of their sum, s . e has
    the mean square |e|_2^2: one row may miss an error that a few rows show. The kernel returns
    s . (sum of parts) as `linear`. This check finds errors that a probe cannot: windows, and
    weights that changed after the model was opened.
    """
    from ..kernels.breakpoints import signs

    y, resid_pre, moved, linear, eps = rows
    gap = linear - (signs(y) * moved).sum(-1)
    norm = torch.linalg.vector_norm
    granted = 8 * eps * (norm(y, dim=-1) + norm(resid_pre, dim=-1))
    granted += (8 * eps).clamp(min=1e-3) * norm(moved, dim=-1)
    return gap.abs() / granted.clamp(min=1e-30)


def check_closure(of_layer: dict[int, Closure]) -> None:
    """Raises IfrError if a layer's `closure_errors` exceed 1; one device synchronization."""
    device = next(iter(of_layer.values())).y.device
    rows = Closure(*(cat_on(device, parts) for parts in zip(*of_layer.values(), strict=True)))
    check_closed(rows, [layer for layer, of in of_layer.items() for _ in range(len(of.linear))])


def check_closed(rows: Closure, layers: list[int]) -> None:
    """Raises IfrError if `closure_errors` exceed 1; the message names the row's layer."""
    for layer, error in zip(layers, closure_errors(rows).tolist(), strict=True):
        if not error <= 1:
            raise IfrError(
                f"text: at layer {layer} the parts that were scored do not add up to what the "
                f"model computed ({error:.1f} times what rounding explains); were its weights "
                "changed after it was opened, or are they not finite?"
            )


def cat_on(device: torch.device, parts: Iterable[Tensor]) -> Tensor:
    """`parts` from any devices, concatenated along the first dimension on `device`."""
    return torch.cat([x if x.device == device else x.to(device) for x in parts])
